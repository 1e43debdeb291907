/*
 * A program that looks for VMX or SVM before it opens /dev/kvm, as kvmtool does, and does not go on without. With an
 * argument it prints all of CPUID's answers instead. Each look is compiled as the compiler likes it.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

struct answer {
	uint32_t eax, ebx, ecx, edx;
};

static inline void cpuid(uint32_t leaf, struct answer *a)
{
	a->eax = leaf;
	a->ecx = 0;
	asm volatile("cpuid" : "+a"(a->eax), "=b"(a->ebx), "+c"(a->ecx), "=d"(a->edx));
}

/* What a leaf function keeps below its stack pointer, and flags, must be there afterwards. */
__attribute__((noinline)) static int keeps_flags_and_red_zone(void)
{
	uint64_t before = 0x0123456789abcdef, after;
	unsigned char carry;
	uint32_t eax = 1, ecx = 0;

	asm volatile("mov %[before], -128(%%rsp)\n\t"
		     "mov %[before], -8(%%rsp)\n\t"
		     "stc\n\t"
		     "cpuid\n\t"
		     "setc %[carry]\n\t"
		     "mov -128(%%rsp), %[after]\n\t"
		     "xor -8(%%rsp), %[after]\n\t"
		     : [carry] "=&r"(carry), [after] "=&r"(after), "+a"(eax), "+c"(ecx)
		     : [before] "r"(before)
		     : "rbx", "rdx", "cc", "memory");
	return carry && !after;
}

static int supports_vm(void)
{
	struct answer a;
	char vendor[12];

	cpuid(0, &a);
	memcpy(vendor, &a.ebx, 4);
	memcpy(vendor + 4, &a.edx, 4);
	memcpy(vendor + 8, &a.ecx, 4);
	if (!memcmp(vendor, "GenuineIntel", 12)) {
		cpuid(1, &a);
		return a.ecx >> 5 & 1;
	}
	cpuid(0x80000000, &a);
	if (a.eax < 0x80000001)
		return 0;
	cpuid(0x80000001, &a);
	return a.ecx >> 2 & 1;
}

static void print(uint32_t leaf)
{
	struct answer a;

	cpuid(leaf, &a);
	/* The APIC's id is that of whichever CPU this runs on. */
	if (leaf == 1)
		a.ebx &= 0xffffff;
	printf("%08x: %08x %08x %08x %08x\n", leaf, a.eax, a.ebx, a.ecx, a.edx);
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1) {
		static const uint32_t leaves[] = { 0, 1, 2, 7, 0x80000000, 0x80000001, 0x80000002, 0x80000008 };

		for (unsigned i = 0; i < sizeof leaves / sizeof *leaves; i++)
			print(leaves[i]);
		return 0;
	}
	if (!keeps_flags_and_red_zone()) {
		puts("CPUID does not keep what it should");
		return 3;
	}
	if (!supports_vm()) {
		puts("Your CPU does not support hardware virtualization");
		return 1;
	}
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, 0xae01, 0);
	int vcpu = ioctl(vm, 0xae41, 0);
	void *run = mmap(0, ioctl(kvm, 0xae04, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

	if (kvm < 0 || vm < 0 || vcpu < 0 || run == MAP_FAILED) {
		perror("KVM");
		return 2;
	}
	puts("goes on");
	return 0;
}
