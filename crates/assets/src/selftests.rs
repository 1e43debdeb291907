//! The KVM selftests of Linux 6.1, from Debian's `linux-source-6.1`: downloaded, checked by apt, built once in the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::packages::{self, Need, output_of, require_apt, updating};
use crate::{Progress, cache, lock};

/// The package, and the name of the archive and its folder inside.
const SOURCE: &str = "linux-source-6.1";
/// Where the tests lie in it.
const TESTS: &str = "tools/testing/selftests/kvm";
/// What building them takes.
const BUILD: &[Need] = &[
    Need { file: "gcc", package: "gcc" },
    Need { file: "make", package: "make" },
    Need { file: "xz", package: "xz-utils" },
    Need { file: "/usr/include/stdio.h", package: "libc6-dev" },
    Need { file: "/usr/include/linux/kvm.h", package: "linux-libc-dev" },
];
/// `make` of the tests as they are, but for slips of 6.1's: dirty_log_test.c asks for `TEST_ASSERT_EQ`, which is
/// `ASSERT_EQ` there, and steal_time.c includes asm/kvm.h before the header that it needs.
const FLAGS: &str = "EXTRA_CFLAGS=-DTEST_ASSERT_EQ=ASSERT_EQ -include linux/stddef.h";

/// Slips that no flag mends: the file, what stands there, what should.
///
/// dirty_log_test lets the vCPU go on before it tells the guest the number of the iteration. A guest that has read the old number
/// and then loses its CPU for longer than an iteration marks a page with a number that is two behind when its dirty bit is
/// looked at: "Set page … value 44 incorrect (iteration=46)". Later Linux has them in this order.
const SLIPS: &[(&str, &str, &str)] = &[(
    "dirty_log_test.c",
    "\t\tsem_post(&sem_vcpu_cont);\n\t\tsync_global_to_guest(vm, iteration);\n",
    "\t\tsync_global_to_guest(vm, iteration);\n\t\tsem_post(&sem_vcpu_cont);\n",
)];

/// What a test asks for and cannot have where vCPUs are files of FUSE, as [`SLIPS`]: what comes behind it shall be tested all the same.
///
/// Nobody is asked about mmap(2) of a file of FUSE, so a private mapping of the dirty ring is not refused. The tests go on with the
/// shared one.
const CONCESSIONS: &[(&str, &str, &str)] = &[
    (
        "lib/kvm_util.c",
        "\t\tTEST_ASSERT(addr == MAP_FAILED, \"Dirty ring mapped private\");\n",
        "\t\tif (addr != MAP_FAILED)\n\t\t\tmunmap(addr, size);\n",
    ),
    (
        "lib/kvm_util.c",
        "\t\tTEST_ASSERT(addr == MAP_FAILED, \"Dirty ring mapped exec\");\n",
        "\t\tif (addr != MAP_FAILED)\n\t\t\tmunmap(addr, size);\n",
    ),
];

/// The built tests.
#[derive(Debug, Clone)]
pub struct Selftests {
    folder: PathBuf,
}

impl Selftests {
    /// What the Makefile has for x86-64, in its order: `x86_64/cpuid_test`, `dirty_log_test`.
    pub fn names(&self) -> Result<Vec<String>> {
        let makefile = self.folder.join("Makefile");
        let text = fs::read_to_string(&makefile).with_context(|| format!("cannot read {}", makefile.display()))?;
        Ok(named_in(&text))
    }

    /// The program of that name.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The cached tests, or those of the archive's current source, built now. The archive is asked only when the cache has
/// none: remove the folder `selftests` of the cache to get newer ones.
pub fn ensure(progress: &dyn Progress) -> Result<Selftests> {
    let cache = cache()?;
    let _one_at_a_time = lock(&cache, "selftests")?;
    let target = cache.join("selftests");
    if !target.is_dir() {
        require_apt(&format!("the KVM selftests ({SOURCE})"))?;
        packages::ensure(BUILD, progress)?;
        let work = target.with_extension("part");
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        build(&work, progress)?;
        fs::rename(work.join(SOURCE), &target).with_context(|| format!("cannot rename to {}", target.display()))?;
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    let folder = target.join(TESTS);
    // A cache of earlier times may have slips that were not known then.
    if mend(&folder)? {
        make(&folder, progress)?;
    }
    Ok(Selftests { folder })
}

/// Mends the sources. True: there was something to mend.
fn mend(folder: &Path) -> Result<bool> {
    let mut mended = false;
    for (file, slip, right) in SLIPS.iter().chain(CONCESSIONS) {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if text.contains(slip) {
            fs::write(&path, text.replace(slip, right)).with_context(|| format!("cannot write {}", path.display()))?;
            mended = true;
        }
    }
    Ok(mended)
}

fn make(folder: &Path, progress: &dyn Progress) -> Result<()> {
    progress.step("building the KVM selftests");
    output_of("make", &["-j2", FLAGS], folder).map(drop)
}

/// Downloads, unpacks and builds in `work`.
fn build(work: &Path, progress: &dyn Progress) -> Result<()> {
    updating(|| packages::download(&[SOURCE], work, progress))?;
    progress.step(&format!("unpacking {SOURCE}"));
    let deb = packages::debs(work).pop().with_context(|| format!("apt-get download {SOURCE} left no .deb"))?;
    output_of("dpkg-deb", &["-x", &deb.to_string_lossy(), "package"], work)?;
    // The tests use what is below `tools`, and of the kernel one Makefile.
    let archive = format!("package/usr/src/{SOURCE}.tar.xz");
    let members = ["tools", "scripts/subarch.include"].map(|member| format!("{SOURCE}/{member}"));
    let left_out = format!("--exclude={SOURCE}/tools/perf");
    output_of("tar", &["-xJf", &archive, &left_out, &members[0], &members[1]], work)?;
    let folder = work.join(SOURCE).join(TESTS);
    mend(&folder)?;
    make(&folder, progress)
}

/// The scripts and programs that a Makefile of the selftests lists for this architecture.
fn named_in(makefile: &str) -> Vec<String> {
    let name = |line: &str| {
        let (list, name) = line.split_once('=')?;
        let list = list.trim_end_matches('+').trim();
        matches!(list, "TEST_PROGS_x86_64" | "TEST_GEN_PROGS_x86_64").then(|| name.trim().to_owned())
    };
    makefile.lines().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as tools/testing/selftests/kvm/Makefile of Linux 6.1 has them.
    #[test]
    fn tests_are_read_from_the_makefile() {
        let text = "TEST_PROGS_x86_64 += x86_64/nx_huge_pages_test.sh\n\
                    TEST_GEN_PROGS_x86_64 = x86_64/cpuid_test\nTEST_GEN_PROGS_x86_64 += dirty_log_test\n\
                    TEST_GEN_PROGS_EXTENDED_x86_64 += x86_64/nx_huge_pages_test\n\
                    TEST_GEN_PROGS_aarch64 += aarch64/psci_test\nTEST_GEN_PROGS += $(TEST_GEN_PROGS_$(UNAME_M))\n";
        assert_eq!(named_in(text), ["x86_64/nx_huge_pages_test.sh", "x86_64/cpuid_test", "dirty_log_test"]);
    }
}
