//! Where the kernel keeps its page structures, and where it maps all memory: by its own symbols, by calibration, or both.
//!
//! *Symbols*: `vmemmap_base` and `page_offset_base` in `/proc/kallsyms` give the addresses of the variables; their values are
//! read through `/proc/kcore` where that is there. *Calibration* needs nothing of that: a page of our own, whose frame number
//! `/proc/self/pagemap` tells, is read into from a device, and the bio shows where its structure lies; then the page's content is
//! looked for at each GiB at or below the thread's own `task_struct`, which lies in the direct mapping.
//!
//! Where both are there, they must agree. Whatever was found is used only after a known page was read back through
//! the capture path itself ([`super::page::read_back`]).

use super::{CaptureError, object::Object, page::KnownPage};
use crate::device::BlockDevice;
use highwater_abi::stream::{Bases, Probe, probe};
use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    os::unix::fs::FileExt,
};

const GIB: u64 = 1 << 30;
/// Candidates for the direct mapping's base: 64 TiB below the task, more than any machine has.
const STEPS_MAX: u64 = 64 << 10;

/// How the bases were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// By calibration alone.
    Calibrated,
    /// By calibration and the kernel's symbols, which agree.
    Agreed,
}

/// Finds them, reading from `device`.
///
/// # Errors
/// Calibration fails, or disagrees with the kernel's own word.
pub fn find(
    object: &mut Object,
    device: &BlockDevice,
    page_struct_bytes: u64,
) -> Result<(Bases, Found), CaptureError> {
    object.attach_probe()?;
    let calibrated = calibrate(object, device, page_struct_bytes);
    object.detach_probe();
    let calibrated = calibrated?;
    match symbols() {
        None => Ok((calibrated, Found::Calibrated)),
        Some(told) if told == calibrated => Ok((calibrated, Found::Agreed)),
        Some(_) => Err(CaptureError::Bases("the kernel's symbols and calibration disagree".into())),
    }
}

fn calibrate(
    object: &mut Object,
    device: &BlockDevice,
    page_struct_bytes: u64,
) -> Result<Bases, CaptureError> {
    let mut page = KnownPage::new().map_err(|e| CaptureError::kernel("lock a page", &e))?;
    let refused = |e: io::Error| CaptureError::kernel("read /proc/self/pagemap", &e);
    let frame = page.frame().map_err(refused)?;
    let located = page.probed(object, device, Probe { what: probe::LOCATE, ..Probe::default() })?;
    if located.page == 0 {
        return Err(CaptureError::Bases("a read of the agent's own was not shown to the program".into()));
    }
    // The segment may begin in an earlier page than ours only if it begins before it, which it does not.
    let pages = located.page.wrapping_add((located.offset >> 12) * page_struct_bytes);
    let pages = pages.wrapping_sub(frame * page_struct_bytes);
    let searched = page.probed(
        object,
        device,
        Probe {
            what: probe::SEARCH,
            frame,
            magic: page.magic(),
            from: located.task & !(GIB - 1),
            steps: STEPS_MAX.min(located.task / GIB),
            ..Probe::default()
        },
    )?;
    if page.frame().map_err(refused)? != frame {
        return Err(CaptureError::Bases("the page was moved meanwhile".into()));
    }
    if searched.hits != 1 {
        return Err(CaptureError::Bases(format!(
            "the page was found at {} places instead of one",
            searched.hits
        )));
    }
    Ok(Bases { pages, direct: searched.found })
}

/// The values of the kernel's own variables, where it tells their addresses and lets its memory be read.
fn symbols() -> Option<Bases> {
    let symbols = BufReader::new(File::open("/proc/kallsyms").ok()?);
    let (mut pages, mut direct) = (0, 0);
    for line in symbols.lines() {
        let line = line.ok()?;
        let mut words = line.split_ascii_whitespace();
        let (Some(address), _, Some(name)) = (words.next(), words.next(), words.next()) else { continue };
        match name {
            "vmemmap_base" => pages = u64::from_str_radix(address, 16).ok()?,
            "page_offset_base" => direct = u64::from_str_radix(address, 16).ok()?,
            _ => continue,
        }
        if pages != 0 && direct != 0 {
            return read_variables(pages, direct);
        }
    }
    None
}

fn read_variables(pages: u64, direct: u64) -> Option<Bases> {
    let kcore = File::open("/proc/kcore").ok()?;
    let word = |address: u64| -> Option<u64> {
        let mut bytes = [0u8; 8];
        kcore.read_exact_at(&mut bytes, file_offset(&kcore, address)?).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    Some(Bases { pages: word(pages)?, direct: word(direct)? })
}

/// Where an address lies in `/proc/kcore`, an ELF core file: by its program headers.
fn file_offset(kcore: &File, address: u64) -> Option<u64> {
    let mut head = [0u8; 64];
    kcore.read_exact_at(&mut head, 0).ok()?;
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    if head[..4] != *b"\x7fELF" {
        return None;
    }
    let (table, size) = (word(&head, 32)?, u64::from(u16::from_le_bytes([head[54], head[55]])));
    let count = u64::from(u16::from_le_bytes([head[56], head[57]]));
    for index in 0..count {
        let mut entry = [0u8; 56];
        kcore.read_exact_at(&mut entry, table + index * size).ok()?;
        let (offset, start, bytes) = (word(&entry, 8)?, word(&entry, 16)?, word(&entry, 32)?);
        if (start..start.saturating_add(bytes)).contains(&address) {
            return Some(offset + (address - start));
        }
    }
    None
}
