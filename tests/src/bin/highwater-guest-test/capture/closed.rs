//! A kernel whose structures are not those that capture knows: refused by the name of what is missing, and nothing is guessed.

use anyhow::{Context, Result, ensure};
use highwater_agent::capture::{CaptureError, Layout};
use highwater_agent::tracker::btf::KernelBtf;
use highwater_agent::tracker::probe::Kernel;

/// Members that are renamed in a copy of the running kernel's types, and how errors name them.
const RENAMED: [(&str, &str); 4] = [
    ("bv_offset", "bio_vec.bv_offset"),
    ("bi_io_vec", "bio.bi_io_vec"),
    ("part0", "gendisk.part0"),
    ("__sector", "request.__sector"),
];

/// Each member missing in turn.
pub fn check() -> Result<()> {
    let raw = std::fs::read("/sys/kernel/btf/vmlinux").context("there is no BTF")?;
    for (name, path) in RENAMED {
        let btf = KernelBtf::parse(without(&raw, name)?).context("renamed types do not parse")?;
        let told = match Layout::of(&Kernel { btf, preemptible_tracepoints: true }) {
            Err(CaptureError::Unsupported(told)) => told,
            other => anyhow::bail!("without {path}: {other:?}"),
        };
        ensure!(told.contains(path), "without {path}, this is said to be missing: {told}");
    }
    println!("  a kernel that lacks one of {} members is refused by its name", RENAMED.len());
    Ok(())
}

/// The kernel's types with another name for a member.
fn without(raw: &[u8], name: &str) -> Result<Vec<u8>> {
    // Names lie between zeros, each once.
    let held: Vec<u8> = [b"\0", name.as_bytes(), b"\0"].concat();
    let at = raw.windows(held.len()).position(|bytes| bytes == held);
    let mut raw = raw.to_vec();
    raw[at.with_context(|| format!("this kernel has no member {name}"))? + 1] = b'?';
    Ok(raw)
}
