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
        bio_done: at("bio.bi_iter.bi_bvec_done")
            .or_else(|old| at("bio.bi_iter.bi_offset").map_err(|_| old))?,
        page_struct_bytes: btf.size("page")?,
        bio_next: at("bio.bi_next")?,
        bio_crypt: at("bio.bi_crypt_context").unwrap_or(0),
        reserved: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::btf::KernelBtf;

    /// Structures with their members, a member's byte, and the structure that it is, if it is one.
    type Structs = Vec<(&'static str, u32, Vec<(&'static str, u32, Option<&'static str>)>)>;

    fn structs() -> Structs {
        vec![
            ("page", 64, vec![]),
            ("bio_vec", 16, vec![("bv_page", 0, None), ("bv_len", 8, None), ("bv_offset", 12, None)]),
            (
                "request",
                256,
                vec![("q", 0, None), ("cmd_flags", 24, None), ("__sector", 48, None), ("bio", 56, None)],
            ),
            ("request_queue", 64, vec![("disk", 8, None)]),
            ("gendisk", 64, vec![("part0", 16, None)]),
            ("block_device", 64, vec![("bd_disk", 16, None), ("bd_dev", 52, None)]),
            (
                "bvec_iter",
                24,
                vec![
                    ("bi_sector", 0, None),
                    ("bi_size", 8, None),
                    ("bi_idx", 12, None),
                    ("bi_bvec_done", 16, None),
                ],
            ),
            (
                "bio",
                128,
                vec![
                    ("bi_next", 0, None),
                    ("bi_bdev", 8, None),
                    ("bi_opf", 16, None),
                    ("bi_status", 25, None),
                    ("bi_iter", 32, Some("bvec_iter")),
                    ("bi_io_vec", 112, None),
                ],
            ),
        ]
    }

    /// As the kernel would tell of them: a header, types, strings. Type 1 is an integer, then come the structures.
    fn kernel(structs: &Structs) -> Kernel {
        let (mut types, mut strings) = (vec![], vec![0u8]);
        let mut name = |text: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(text.as_bytes());
            strings.push(0);
            at
        };
        types.extend([name("int"), 1 << 24, 4, 32]);
        for (structure, bytes, members) in structs {
            types.extend([name(structure), 4 << 24 | members.len() as u32, *bytes]);
            for (member, at, of) in members {
                let index = of.and_then(|of| structs.iter().position(|(held, ..)| *held == of));
                types.extend([name(member), index.map_or(1, |index| index as u32 + 2), at * 8]);
            }
        }
        let length = types.len() as u32 * 4;
        let head = [0x0001_eb9f, 24, 0, length, length, strings.len() as u32];
        let raw = head.iter().chain(&types).flat_map(|word| word.to_le_bytes()).chain(strings).collect();
        Kernel { btf: KernelBtf::parse(raw).unwrap(), preemptible_tracepoints: false }
    }

    fn missing(structs: &Structs) -> String {
        match Layout::of(&kernel(structs)) {
            Err(CaptureError::Unsupported(told)) => told,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn whatever_member_is_missing_is_named() {
        let layout = Layout::of(&kernel(&structs())).unwrap();
        assert_eq!((layout.offsets.bio_done, layout.offsets.bio_io_vec, layout.copies), (48, 112, 3));
        assert_eq!(layout.offsets.page_struct_bytes, 64);
        for (at, (structure, _, members)) in structs().iter().enumerate() {
            for (index, (member, ..)) in members.iter().enumerate() {
                let mut without = structs();
                without[at].2.remove(index);
                let told = missing(&without);
                // What lies within a bio is asked for by its way there.
                let path = match (*structure, *member) {
                    ("bvec_iter", member) => format!("bio.bi_iter.{member}"),
                    (structure, member) => format!("{structure}.{member}"),
                };
                assert!(told.contains(&path), "without {path}: {told}");
            }
        }
        let mut without = structs();
        without.remove(0);
        assert!(missing(&without).contains("no page"));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_new_name_of_a_member_is_known_and_a_moved_one_is_refused() {
        let mut renamed = structs();
        renamed[6].2[3].0 = "bi_offset";
        assert_eq!(Layout::of(&kernel(&renamed)).unwrap().offsets.bio_done, 48);
        for (index, at) in [(0, 8), (1, 12), (2, 8)] {
            let mut moved = structs();
            moved[1].2[index].1 = at;
            assert!(missing(&moved).contains("bio_vec.bv_"));
        }
        let mut grown = structs();
        grown[1].1 = 24;
        assert!(missing(&grown).contains("bio_vec of 16 bytes"));
    }
}
