//! Whether this kernel's writes can be captured: architecture, and where structure members lie. A member that is not found is
//! never guessed: the agent stays in bitmap mode and says which it was.

use super::CaptureError;
use crate::tracker::{btf::BtfError, probe::Kernel};
use highwater_abi::stream::CaptureOffsets;

/// What capture needs to know of the kernel.
#[derive(Clone, Debug)]
pub struct Layout {
    /// For the programs.
    pub offsets: CaptureOffsets,
    /// Copies of the program that this kernel needs.
    pub copies: usize,
    /// See [`Kernel::preemptible_tracepoints`].
    pub preemptible_tracepoints: bool,
}

impl Layout {
    /// Looks it up.
    ///
    /// # Errors
    /// [`CaptureError::Unsupported`] names what is missing.
    pub fn of(kernel: &Kernel) -> Result<Self, CaptureError> {
        if !cfg!(target_arch = "x86_64") {
            // How a page's content is found from its structure is known, and tried, for x86-64 alone.
            return Err(CaptureError::Unsupported(format!("architecture {}", std::env::consts::ARCH)));
        }
        Ok(Self {
            offsets: offsets(kernel)
                .map_err(|e| CaptureError::Unsupported(format!("this kernel's layout: {e}")))?,
            copies: kernel.copies_needed(),
            preemptible_tracepoints: kernel.preemptible_tracepoints,
        })
    }
}

fn offsets(kernel: &Kernel) -> Result<CaptureOffsets, BtfError> {
    let btf = &kernel.btf;
    let at = |path| btf.offset(path);
    // What the programs take for granted of `struct bio_vec`.
    for (path, expected) in [("bio_vec.bv_page", 0), ("bio_vec.bv_len", 8), ("bio_vec.bv_offset", 12)] {
        if at(path)? != expected {
            return Err(BtfError::Missing(format!("{path} at byte {expected}")));
        }
    }
    if btf.size("bio_vec")? != 16 {
        return Err(BtfError::Missing("bio_vec of 16 bytes".into()));
    }
    Ok(CaptureOffsets {
        request_queue: at("request.q")?,
        request_sector: at("request.__sector")?,
        request_cmd_flags: at("request.cmd_flags")?,
        request_bio: at("request.bio")?,
        queue_disk: at("request_queue.disk")?,
        disk_part0: at("gendisk.part0")?,
        bdev_dev: at("block_device.bd_dev")?,
        bdev_disk: at("block_device.bd_disk")?,
        bio_bdev: at("bio.bi_bdev")?,
        bio_opf: at("bio.bi_opf")?,
        bio_status: at("bio.bi_status")?,
        bio_io_vec: at("bio.bi_io_vec")?,
        bio_sector: at("bio.bi_iter.bi_sector")?,
        bio_size: at("bio.bi_iter.bi_size")?,
        bio_idx: at("bio.bi_iter.bi_idx")?,
        // Renamed in 7.3, at the same place and with the same meaning.
        bio_done: at("bio.bi_iter.bi_bvec_done").or_else(|_| at("bio.bi_iter.bi_offset"))?,
        page_struct_bytes: btf.size("page")?,
        reserved: 0,
    })
}
