//! What each purpose needs, and how to see that it is there.

use std::path::Path;

use clap::ValueEnum;

use crate::workspace;

/// What a machine is to be made ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    /// Compiling everything, the eBPF programs included
    Build,
    /// Running `cargo xtask demo`
    Demo,
    /// Running `cargo xtask test`
    Test,
    /// Running `cargo xtask bench`
    Bench,
    /// Running `cargo xtask check` with nothing skipped
    Check,
    /// Running kernels in virtual machines
    Kernels,
}

impl Purpose {
    /// Whether programs that use the kernel's tracing will run on this machine.
    pub fn runs_programs(self) -> bool {
        matches!(self, Purpose::Demo | Purpose::Test | Purpose::Bench)
    }

    /// Whether metrics are checked.
    pub fn uses_promtool(self) -> bool {
        self == Purpose::Test
    }

    /// Whether a virtual machine with QEMU's guest agent in it is booted.
    pub fn uses_guest_agent(self) -> bool {
        self == Purpose::Test
    }

    /// Whether Azure's emulator is started.
    pub fn uses_azurite(self) -> bool {
        self == Purpose::Test
    }
}

/// Something to be there, and the Debian package that brings it.
pub struct Need {
    /// The package.
    pub package: &'static str,
    /// A program, or an absolute path.
    pub evidence: &'static str,
}

impl Need {
    /// Whether it is there.
    pub fn is_met(&self) -> bool {
        if self.evidence.starts_with('/') {
            return Path::new(self.evidence).exists();
        }
        workspace::find_program(self.evidence).is_some()
    }
}

const fn need(package: &'static str, evidence: &'static str) -> Need {
    Need { package, evidence }
}

const DEMO: &[Need] = &[
    need("e2fsprogs", "mkfs.ext4"),
    need("mount", "losetup"),
    need("util-linux", "fstrim"),
    need("util-linux", "blkdiscard"),
];

const TEST: &[Need] = &[
    need("e2fsprogs", "mkfs.ext4"),
    need("xfsprogs", "mkfs.xfs"),
    need("btrfs-progs", "mkfs.btrfs"),
    need("mount", "losetup"),
    need("util-linux", "addpart"),
    need("util-linux", "setpriv"),
    // Networks of machines of a group.
    need("iproute2", "ip"),
    need("iproute2", "tc"),
    need("util-linux", "nsenter"),
    need("fio", "fio"),
    // Its server; programs of the server itself lie in a directory named by their version.
    need("postgresql", "pg_ctlcluster"),
    need("sqlite3", "sqlite3"),
    // Only the programs: the packages that are called after the servers also make services of them, and start those.
    need("mariadb-server-core", "mariadbd"),
    need("mariadb-client-core", "mariadb"),
    // The server itself under another name.
    need("redis-tools", "redis-check-rdb"),
    // A virtual machine that is protected from outside; what KERNELS has besides goes into its base file system.
    need("qemu-system-x86", "qemu-system-x86_64"),
    need("busybox-static", "busybox"),
    need("kmod", "depmod"),
    need("lvm2", "lvm"),
    need("zstd", "zstd"),
    need("xz-utils", "xz"),
    need("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
];

const BENCH: &[Need] = &[
    need("e2fsprogs", "mkfs.ext4"),
    need("mount", "losetup"),
    need("util-linux", "taskset"),
    need("fio", "fio"),
    need("zstd", "zstd"),
    need("openssl", "openssl"),
    need("restic", "restic"),
    need("borgbackup", "borg"),
];

/// `cargo xtask check`, beside what cargo brings.
const CHECK: &[Need] = &[need("shellcheck", "shellcheck")];

/// For what is installed by npm.
pub const NODE: &[Need] = &[need("nodejs", "node"), need("npm", "npm")];

const KERNELS: &[Need] = &[
    need("e2fsprogs", "mkfs.ext4"),
    need("qemu-system-x86", "qemu-system-x86_64"),
    need("busybox-static", "busybox"),
    need("kmod", "depmod"),
    need("lvm2", "lvm"),
    need("zstd", "zstd"),
    need("xz-utils", "xz"),
    need("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
];

/// The packages a purpose needs beside the compiler and the linker.
pub fn packages(purpose: Purpose) -> &'static [Need] {
    match purpose {
        Purpose::Build => &[],
        Purpose::Check => CHECK,
        Purpose::Demo => DEMO,
        Purpose::Test => TEST,
        Purpose::Bench => BENCH,
        Purpose::Kernels => KERNELS,
    }
}
