//! Member offsets from the running kernel's BTF (`/sys/kernel/btf/vmlinux`).
//!
//! The format is the kernel's `Documentation/bpf/btf.rst`. The file comes from the kernel, yet is parsed as untrusted: every
//! read is bounds-checked and a malformed one is an error, because a wrong offset would track the wrong device.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
/// Anonymous members nest at most so deep.
const DEPTH_MAX: u32 = 16;

/// Why an offset could not be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BtfError {
    /// Not BTF, or cut off.
    #[error("the kernel's BTF is malformed at byte {0}")]
    Malformed(usize),
    /// No such structure or member.
    #[error("the kernel's BTF has no {0}")]
    Missing(String),
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    info: u32,
    size_or_type: u32,
    tail: usize,
}

impl Type {
    fn kind(self) -> u32 {
        (self.info >> 24) & 31
    }
    fn members(self) -> usize {
        (self.info & 0xffff) as usize
    }
}

/// The kernel's types.
pub struct KernelBtf {
    raw: Vec<u8>,
    strings: (usize, usize),
    types: Vec<Type>,
    structs: HashMap<String, usize>,
}

impl KernelBtf {
    /// Parses the content of `/sys/kernel/btf/vmlinux`.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(raw: Vec<u8>) -> Result<Self, BtfError> {
        let word = |at: usize| read_u32(&raw, at);
        let magic = raw.get(..2).ok_or(BtfError::Malformed(0))?;
        if u16::from_le_bytes([magic[0], magic[1]]) != MAGIC {
            return Err(BtfError::Malformed(0));
        }
        let section = |offset: u32, len: u32, header: u32| {
            let start = (header as usize).checked_add(offset as usize);
            let end = start.and_then(|s| s.checked_add(len as usize));
            match (start, end) {
                (Some(s), Some(e)) if e <= raw.len() => Ok((s, e)),
                _ => Err(BtfError::Malformed(8)),
            }
        };
        let header = word(4)?;
        let (mut at, end) = section(word(8)?, word(12)?, header)?;
        let strings = section(word(16)?, word(20)?, header)?;
        // Type 0 is void.
        let mut types = vec![Type { name: 0, info: 0, size_or_type: 0, tail: 0 }];
        while at < end {
            let ty =
                Type { name: word(at)?, info: word(at + 4)?, size_or_type: word(at + 8)?, tail: at + 12 };
            let vlen = ty.members();
            at += 12
                + match ty.kind() {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => 12 * vlen,
                    6 | 13 => 8 * vlen,
                    0 | 2 | 7..=12 | 16 | 18 => 0,
                    _ => return Err(BtfError::Malformed(at)),
                };
            types.push(ty);
        }
        let mut btf = Self { raw, strings, types, structs: HashMap::new() };
        for id in 1..btf.types.len() {
            let ty = btf.types[id];
            if ty.kind() == KIND_STRUCT && ty.name != 0 {
                let name = btf.string(ty.name)?.to_owned();
                btf.structs.entry(name).or_insert(id);
            }
        }
        Ok(btf)
    }

    /// Byte offset of a member, `"bio.bi_iter.bi_sector"`.
    ///
    /// # Errors
    /// [`BtfError::Missing`] names the path that does not exist.
    pub fn offset(&self, path: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(path.to_owned());
        let mut parts = path.split('.');
        let name = parts.next().ok_or_else(missing)?;
        let mut id = *self.structs.get(name).ok_or_else(missing)?;
        let mut offset = 0;
        for part in parts {
            let (at, ty) = self.member(id, part, DEPTH_MAX)?.ok_or_else(missing)?;
            offset += at;
            id = self.resolve(ty)?;
        }
        Ok(offset)
    }

    /// Bytes of a structure.
    ///
    /// # Errors
    /// [`BtfError::Missing`] if there is none of that name.
    pub fn size(&self, name: &str) -> Result<u32, BtfError> {
        let id = self.structs.get(name).ok_or_else(|| BtfError::Missing(name.to_owned()))?;
        self.types.get(*id).map(|ty| ty.size_or_type).ok_or(BtfError::Malformed(*id))
    }

    /// Whether a typedef or function of that name is there: `btf_trace_block_rq_complete` says that the tracepoint exists.
    #[must_use]
    pub fn has_name(&self, name: &str) -> bool {
        self.types.iter().any(|ty| self.string(ty.name).is_ok_and(|n| n == name))
    }

    fn member(&self, id: usize, name: &str, depth: u32) -> Result<Option<(u32, usize)>, BtfError> {
        let ty = *self.types.get(id).ok_or(BtfError::Malformed(id))?;
        if !matches!(ty.kind(), KIND_STRUCT | KIND_UNION) || depth == 0 {
            return Ok(None);
        }
        for index in 0..ty.members() {
            let at = ty.tail + index * 12;
            let (member, member_type) = (read_u32(&self.raw, at)?, read_u32(&self.raw, at + 4)? as usize);
            let mut bits = read_u32(&self.raw, at + 8)?;
            // With kind_flag the upper byte is a bit field's size.
            if ty.info >> 31 != 0 {
                bits &= 0x00ff_ffff;
            }
            if member == 0 {
                if let Some((inner, found)) = self.member(self.resolve(member_type)?, name, depth - 1)? {
                    return Ok(Some((bits / 8 + inner, found)));
                }
            } else if self.string(member)? == name {
                return Ok(Some((bits / 8, member_type)));
            }
        }
        Ok(None)
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, mut id: usize) -> Result<usize, BtfError> {
        for _ in 0..DEPTH_MAX {
            let ty = self.types.get(id).ok_or(BtfError::Malformed(id))?;
            if !matches!(ty.kind(), 8..=11 | 18) {
                return Ok(id);
            }
            id = ty.size_or_type as usize;
        }
        Err(BtfError::Malformed(id))
    }

    fn string(&self, offset: u32) -> Result<&str, BtfError> {
        let (start, end) = self.strings;
        let from = start + offset as usize;
        let bytes = self.raw.get(from..end).ok_or(BtfError::Malformed(from))?;
        let len = bytes.iter().position(|b| *b == 0).ok_or(BtfError::Malformed(from))?;
        std::str::from_utf8(&bytes[..len]).map_err(|_| BtfError::Malformed(from))
    }
}

fn read_u32(raw: &[u8], at: usize) -> Result<u32, BtfError> {
    let bytes = at.checked_add(4).and_then(|end| raw.get(at..end)).ok_or(BtfError::Malformed(at))?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn running_kernel() {
        let Ok(raw) = std::fs::read("/sys/kernel/btf/vmlinux") else { return };
        let btf = KernelBtf::parse(raw).unwrap();
        assert!(btf.offset("bio.bi_iter.bi_sector").unwrap() > 0);
        assert!(btf.offset("request.__sector").unwrap() > 0);
        assert_eq!(btf.offset("bio.no_such_member"), Err(BtfError::Missing("bio.no_such_member".into())));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_not_a_panic(mut raw in proptest::collection::vec(any::<u8>(), 0..400), header: bool) {
            if header && raw.len() > 24 {
                raw[..2].copy_from_slice(&MAGIC.to_le_bytes());
                raw[4..8].copy_from_slice(&24u32.to_le_bytes());
                for at in [8, 12, 16, 20] { raw[at + 1..at + 4].fill(0); }
            }
            if let Ok(btf) = KernelBtf::parse(raw) {
                let _ = btf.offset("bio.bi_iter");
                let _ = btf.has_name("x");
            }
        }
    }
}
