//! The parsers of this module, for `fuzz/`.

use std::path::Path;

/// `/proc/*/mountinfo`.
pub fn mountinfo(text: &[u8]) {
    let _ = super::namespaces::parse(text, Path::new("/proc/1/root"));
}

/// An answer of device-mapper.
pub fn dm_table(reply: &[u8]) {
    let _ = super::dm::parse(reply);
}

/// The first pages of what may be a swap area.
pub fn swap_header(head: &[u8]) {
    for page in [4096, 16384, 65536] {
        let _ = super::swap::header_end(head, page);
    }
}
