//! What the running kernel offers. Features are probed, never versions; what is missing is named.

use super::{TrackerError, btf::KernelBtf};
use highwater_abi::{COPIES_MAX, Offsets};
use std::fs;

/// What was found.
pub struct Kernel {
    /// Its types.
    pub btf: KernelBtf,
    /// Tracepoints are preemptible (from 7.0, or PREEMPT_RT): programs are skipped more often, and replacing a bitmap
    /// does not outlast a running tracepoint.
    pub preemptible_tracepoints: bool,
}

impl Kernel {
    /// Looks at the running kernel.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] names what is missing.
    pub fn probe() -> Result<Self, TrackerError> {
        if fs::read_to_string("/sys/kernel/security/lockdown")
            .is_ok_and(|text| text.contains("[confidentiality]"))
        {
            return Err(TrackerError::Unsupported(
                "permission to read kernel memory from BPF (lockdown is at level confidentiality)".into(),
            ));
        }
        let raw = fs::read("/sys/kernel/btf/vmlinux")
            .map_err(|_| TrackerError::Unsupported("BTF (/sys/kernel/btf/vmlinux)".into()))?;
        let btf = KernelBtf::parse(raw)?;
        for (name, what) in [
            ("btf_trace_block_rq_complete", "tracepoint block_rq_complete"),
            ("btf_trace_block_rq_issue", "tracepoint block_rq_issue"),
            ("btf_trace_block_bio_queue", "tracepoint block_bio_queue"),
            ("btf_trace_block_bio_complete", "tracepoint block_bio_complete"),
            ("bpf_loop", "BPF helper bpf_loop"),
            ("bpf_ringbuf_reserve", "BPF ring buffers"),
        ] {
            if !btf.has_name(name) {
                return Err(TrackerError::Unsupported(what.into()));
            }
        }
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let version = fs::read_to_string("/proc/version").unwrap_or_default();
        Ok(Self { btf, preemptible_tracepoints: preemptible(&release, &version) })
    }

    /// How many copies of each program this kernel needs.
    #[must_use]
    pub fn copies_needed(&self) -> usize {
        // Before 7.0 task, softirq and hard-irq context can each hold one copy. With preemptible tracepoints any number of
        // tasks can; five copies and more were measured to leave one clean witness in every window.
        if self.preemptible_tracepoints { COPIES_MAX } else { 3 }
    }

    /// The offsets that the programs need.
    ///
    /// # Errors
    /// [`TrackerError::Layout`] names the member that is missing: nothing is guessed.
    pub fn offsets(&self) -> Result<Offsets, TrackerError> {
        let at = |path| self.btf.offset(path);
        Ok(Offsets {
            request_queue: at("request.q")?,
            request_sector: at("request.__sector")?,
            request_cmd_flags: at("request.cmd_flags")?,
            request_data_len: at("request.__data_len")?,
            request_start_time: at("request.start_time_ns")?,
            request_bio: at("request.bio")?,
            queue_disk: at("request_queue.disk")?,
            disk_part0: at("gendisk.part0")?,
            bdev_dev: at("block_device.bd_dev")?,
            bdev_disk: at("block_device.bd_disk")?,
            bio_next: at("bio.bi_next")?,
            bio_bdev: at("bio.bi_bdev")?,
            bio_opf: at("bio.bi_opf")?,
            bio_sector: at("bio.bi_iter.bi_sector")?,
            bio_size: at("bio.bi_iter.bi_size")?,
            bio_status: at("bio.bi_status")?,
        })
    }
}

/// No interface tells whether tracepoints are preemptible; the change came with 7.0. Unknown means yes: more copies and a
/// longer barrier are only slower.
fn preemptible(release: &str, version: &str) -> bool {
    let major = release.split('.').next().and_then(|m| m.trim().parse::<u32>().ok());
    major.is_none_or(|m| m >= 7) || version.contains("PREEMPT_RT")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_kernels_count_as_preemptible() {
        assert!(!preemptible("6.18.44-x", "#1 SMP PREEMPT_DYNAMIC"));
        assert!(preemptible("7.0.1", "#1 SMP"));
        assert!(preemptible("6.12.1-rt", "#1 SMP PREEMPT_RT Debian"));
        assert!(preemptible("strange", ""));
    }
}
