/* The workloads of `cargo xtask bench` that need no file: one static program, the same in every guest.
 * `work SCALE NAME...` runs each NAME in turn, SCALE in percent of its full size, and prints on standard output
 *
 *     BEGIN name
 *     END name RESULT
 *
 * where RESULT is the same on every machine that computes right. Time is measured by whoever reads the lines. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint32_t noise(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

static void fill(void *to, size_t size)
{
	uint32_t state = 2463534242u;
	for (uint8_t *p = to; size--;)
		*p++ = noise(&state) >> 24;
}

/* CRC-32 by a table of 256 words. */
static uint64_t crc(long rounds)
{
	static uint32_t table[256];
	static uint8_t data[64 << 10];
	for (uint32_t i = 0; i < 256; i++) {
		table[i] = i;
		for (int bit = 0; bit < 8; bit++)
			table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
	}
	fill(data, sizeof data);
	uint32_t sum = ~0u;
	while (rounds--)
		for (size_t i = 0; i < sizeof data; i++)
			sum = sum >> 8 ^ table[(sum ^ data[i]) & 0xff];
	return ~sum;
}

/* Primes below 512 Ki. */
static uint64_t sieve(long rounds)
{
	enum { END = 512 << 10 };
	static uint8_t composite[END];
	uint64_t sum = 0;
	while (rounds--) {
		memset(composite, 0, sizeof composite);
		for (uint32_t i = 2; i < END; i++) {
			if (composite[i])
				continue;
			sum += i;
			for (uint64_t k = (uint64_t)i * i; k < END; k += i)
				composite[k] = 1;
		}
	}
	return sum;
}

static int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

/* The C library's sort, which calls back for every comparison. */
static uint64_t sort(long rounds)
{
	enum { COUNT = 32 << 10 };
	static uint32_t data[COUNT];
	uint32_t state = 123456789;
	uint64_t sum = 0;
	while (rounds--) {
		for (size_t i = 0; i < COUNT; i++)
			data[i] = noise(&state);
		qsort(data, COUNT, sizeof *data, ascending);
		for (size_t i = 0; i < COUNT; i++)
			sum = sum * 31 + data[i];
	}
	return sum;
}

/* A machine of 16 registers, its instructions told apart by a switch; some jump forward when a number is odd. */
static uint64_t interpreter(long rounds)
{
	enum { ADD, SUB, MUL, XOR, AND, OR, SHIFT, LOAD, STORE, MOVE, NEGATE, SKIP, OPS };
	static struct { uint8_t op, to, from, by; } program[1024];
	static uint64_t memory[256];
	uint64_t r[16] = { 1, 2, 3, 5, 8, 13, 21, 34 };
	uint32_t state = 987654321;
	enum { LENGTH = sizeof program / sizeof *program };
	for (int i = 0; i < LENGTH; i++) {
		uint32_t bits = noise(&state);
		program[i].op = bits % OPS;
		program[i].to = bits >> 8 & 15;
		program[i].from = bits >> 12 & 15;
		program[i].by = bits >> 16 & 7;
	}
	while (rounds--) {
		for (int pc = 0; pc < LENGTH; pc++) {
			uint64_t *to = &r[program[pc].to], from = r[program[pc].from];
			switch (program[pc].op) {
			case ADD: *to += from; break;
			case SUB: *to -= from; break;
			case MUL: *to *= from | 1; break;
			case XOR: *to ^= from; break;
			case AND: *to &= from | 0xff00ff; break;
			case OR: *to |= from & 0xf0f0f0f0; break;
			case SHIFT: *to = from << program[pc].by | from >> 7; break;
			case LOAD: *to += memory[from & 255]; break;
			case STORE: memory[from & 255] ^= *to; break;
			case MOVE: *to = from + program[pc].by; break;
			case NEGATE: *to = -from; break;
			case SKIP: if (from & 1) pc += program[pc].by; break;
			}
		}
	}
	uint64_t sum = 0;
	for (int i = 0; i < 16; i++)
		sum = sum * 31 + r[i];
	return sum;
}

/* A product of matrices of doubles, all of whose numbers are whole: the order of sums does not matter. */
static uint64_t matrix(long rounds)
{
	enum { N = 96 };
	static double a[N][N], b[N][N], c[N][N];
	uint32_t state = 42;
	for (int i = 0; i < N * N; i++) {
		a[i / N][i % N] = noise(&state) & 0xff;
		b[i / N][i % N] = noise(&state) & 0xff;
	}
	while (rounds--) {
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j++) {
				double sum = 0;
				for (int k = 0; k < N; k++)
					sum += a[i][k] * b[k][j];
				c[i][j] = sum;
			}
		a[rounds % N][0] += 1;
	}
	double sum = 0;
	for (int i = 0; i < N * N; i++)
		sum += c[i / N][i % N];
	return sum;
}

/* The shortest system call. */
static uint64_t getppids(long rounds)
{
	uint64_t sum = 0;
	while (rounds--)
		sum += getppid() > 0;
	return sum;
}

/* A child that ends at once, and waiting for it. */
static uint64_t forks(long rounds)
{
	uint64_t sum = 0;
	while (rounds--) {
		pid_t child = fork();
		if (child < 0)
			die("fork");
		if (!child)
			_exit(rounds & 0x7f);
		int status;
		if (waitpid(child, &status, 0) != child)
			die("waitpid");
		sum += WEXITSTATUS(status);
	}
	return sum;
}

/* The first touch of each of 4096 pages. */
static uint64_t faults(long rounds)
{
	enum { SIZE = 16 << 20, PAGE = 4096 };
	uint64_t sum = 0;
	while (rounds--) {
		uint8_t *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED)
			die("mmap");
		madvise(p, SIZE, MADV_NOHUGEPAGE);
		for (size_t at = 0; at < SIZE; at += PAGE)
			sum += p[at]++ + 1;
		munmap(p, SIZE);
	}
	return sum;
}

/* The C library's copy: a page, 64 KiB, and 4 MiB, from places that are not aligned alike. */
static uint64_t copies(long rounds)
{
	enum { SIZE = 4 << 20 };
	static uint8_t from[SIZE + 64], to[SIZE + 64];
	fill(from, 64 << 10);
	while (rounds--) {
		for (int i = 0; i < 256; i++)
			memcpy(to + (i & 15), from + (i >> 4), 4096);
		for (int i = 0; i < 32; i++)
			memcpy(to + i, from, 64 << 10);
		memcpy(to, from + 1, SIZE);
		from[rounds & 0xffff]++;
	}
	uint64_t sum = 0;
	for (int i = 0; i < 64 << 10; i++)
		sum = sum * 31 + to[i];
	return sum;
}

/* A byte there and back between two processes, by two pipes. */
static uint64_t pingpong(long rounds)
{
	int there[2], back[2];
	if (pipe(there) || pipe(back))
		die("pipe");
	pid_t child = fork();
	uint8_t byte = 0;
	if (child < 0)
		die("fork");
	if (!child) {
		close(there[1]);
		while (read(there[0], &byte, 1) == 1) {
			byte++;
			if (write(back[1], &byte, 1) != 1)
				_exit(1);
		}
		_exit(0);
	}
	close(there[0]);
	uint64_t sum = 0;
	while (rounds--) {
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			die("pipe");
		sum += byte;
	}
	close(there[1]);
	close(back[0]);
	close(back[1]);
	waitpid(child, NULL, 0);
	return sum;
}

/* MiB of the disk, past the page cache. */
static uint64_t disk(long rounds)
{
	enum { CHUNK = 256 << 10 };
	int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
	if (fd < 0)
		die("/dev/vda");
	uint8_t *data = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t sum = 0;
	for (long i = 0; i < rounds * ((1 << 20) / CHUNK); i++) {
		ssize_t n = pread(fd, data, CHUNK, i * CHUNK % (16 << 20));
		if (n != CHUNK)
			die("pread");
		for (int at = 0; at < CHUNK; at += 512)
			sum = sum * 31 + data[at];
	}
	close(fd);
	return sum;
}

static struct sockaddr_in address(const char *host, int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	inet_aton(host, &to.sin_addr);
	return to;
}

/* 64 KiB each to a server behind the machine's network that sends back what it gets. */
static uint64_t tcp(long rounds)
{
	enum { CHUNK = 64 << 10 };
	static uint8_t out[CHUNK], in[CHUNK];
	struct sockaddr_in to = address("10.0.2.100", 7);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
		die("connect");
	fill(out, CHUNK);
	size_t total = rounds * CHUNK, sent = 0, got = 0;
	uint64_t sum = 0;
	while (got < total) {
		struct pollfd it = { .fd = fd, .events = POLLIN | (sent < total ? POLLOUT : 0) };
		if (poll(&it, 1, -1) < 0)
			die("poll");
		if (it.revents & POLLOUT) {
			ssize_t n = send(fd, out + sent % CHUNK, CHUNK - sent % CHUNK, MSG_DONTWAIT);
			sent += n > 0 ? n : 0;
		}
		if (it.revents & (POLLIN | POLLHUP)) {
			ssize_t n = recv(fd, in + got % CHUNK, CHUNK - got % CHUNK, 0);
			if (n <= 0)
				die("recv");
			got += n;
			if (got % CHUNK == 0)
				sum += !memcmp(in, out, CHUNK);
		}
	}
	close(fd);
	return sum;
}

/* Blocks of 512 bytes of a file, each asked for when the last has come: TFTP, RFC 1350. */
static uint64_t udp(long rounds)
{
	enum { DATA = 3, ACK = 4, HEAD = 4, BLOCK = 512 };
	static const char request[] = "\0\1udp\0octet";
	struct sockaddr_in to = address("10.0.2.2", 69);
	socklen_t length = sizeof to;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || sendto(fd, request, sizeof request, 0, (struct sockaddr *)&to, sizeof to) < 0)
		die("sendto");
	uint64_t sum = 0;
	for (long block = 1; block <= rounds; block++) {
		uint8_t data[HEAD + BLOCK];
		ssize_t n = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&to, &length);
		if (n != sizeof data || data[1] != DATA || (data[2] << 8 | data[3]) != block)
			die("recvfrom");
		for (int i = HEAD; i < n; i++)
			sum = sum * 31 + data[i];
		data[1] = ACK;
		if (sendto(fd, data, HEAD, 0, (struct sockaddr *)&to, sizeof to) != HEAD)
			die("sendto");
	}
	close(fd);
	return sum;
}

/* `full`: rounds of the full size, which is one to three seconds on QEMU's JIT. */
static const struct { const char *name; uint64_t (*run)(long); long full; } WORK[] = {
	{ "crc", crc, 2400 },
	{ "sieve", sieve, 240 },
	{ "qsort", sort, 60 },
	{ "switch", interpreter, 60000 },
	{ "matrix", matrix, 80 },
	{ "getppid", getppids, 5000000 },
	{ "fork", forks, 2500 },
	{ "faults", faults, 60 },
	{ "memcpy", copies, 300 },
	{ "pingpong", pingpong, 40000 },
	{ "disk", disk, 512 },
	{ "tcp", tcp, 256 },
	{ "udp", udp, 8000 },
};

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	long scale = atol(argv[1]);
	for (char **name = argv + 2; *name; name++) {
		size_t i = 0;
		while (i < sizeof WORK / sizeof *WORK && strcmp(WORK[i].name, *name))
			i++;
		if (i == sizeof WORK / sizeof *WORK)
			return 2;
		long rounds = WORK[i].full * scale / 100;
		printf("BEGIN %s\n", *name);
		fflush(stdout);
		tcdrain(1);
		printf("END %s %llx\n", *name, (unsigned long long)WORK[i].run(rounds > 0 ? rounds : 1));
		fflush(stdout);
		tcdrain(1);
		/* Whoever measures looks at the machine's counters now. */
		nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
	}
	return 0;
}
