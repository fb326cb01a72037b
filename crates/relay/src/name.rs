//! Names of objects, as far as a relay may use them. Pure.
//!
//! Parts separated by `/`, each of letters, digits, `-`, `.` and `_`, and neither `.` nor `..`: nothing else is ever named by a vault,
//! nothing needs escaping, and no store takes such a name for anything but a name beneath its prefix.

use crate::RelayError;
use object_store::path::Path;
use std::{fmt, str::FromStr};

/// Most bytes of a name.
pub const NAME_BYTES_MAX: usize = 1024;
/// Most bytes of a part: a file's name, with what a store adds to it.
pub const PART_BYTES_MAX: usize = 200;
/// Most parts.
pub const PARTS_MAX: usize = 32;

/// In this folder there are only folders, one of each machine: a store is asked for all of them at once.
const MACHINES: &str = "machines";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the folder of machines' folders.
    #[must_use]
    pub fn is_machines(&self) -> bool {
        self.0 == MACHINES
    }

    /// Whether an object may be put there.
    #[must_use]
    pub fn may_be_object(&self) -> bool {
        let inner = self.0.strip_prefix(MACHINES).and_then(|rest| rest.strip_prefix('/'));
        !self.is_machines() && inner.is_none_or(|inner| inner.contains('/'))
    }

    /// As an object store's path.
    #[must_use]
    pub fn path(&self) -> Path {
        // The alphabet of a name needs no escaping.
        Path::from(self.0.as_str())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = RelayError;

    fn from_str(text: &str) -> Result<Self, RelayError> {
        let plain = |part: &str| part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let good =
            |part: &str| !matches!(part, "" | "." | "..") && part.len() <= PART_BYTES_MAX && plain(part);
        if text.len() > NAME_BYTES_MAX || text.split('/').count() > PARTS_MAX || !text.split('/').all(good) {
            return Err(RelayError::Name(text.chars().take(100).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<&Path> for Name {
    type Error = RelayError;
    fn try_from(path: &Path) -> Result<Self, RelayError> {
        path.as_ref().parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn among_machines_there_are_only_folders() {
        let may = |name: &str| name.parse::<Name>().unwrap().may_be_object();
        assert!(may("vault.json") && may("machines/m/key") && may("machinesx") && may("x/machines"));
        assert!(!may("machines") && !may("machines/m"));
    }

    #[test]
    fn only_plain_names_pass() {
        for good in ["vault.json", "machines/0/manifest/00000000000000000001", "a/..b", "a/...", "-", "_"] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
            assert_eq!(good.parse::<Name>().unwrap().path().as_ref(), good);
        }
        let long = "a".repeat(PART_BYTES_MAX + 1);
        let deep = ["a"; PARTS_MAX + 1].join("/");
        let longer = [&*"a".repeat(150); 7].join("/");
        for bad in [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "a b", "a%2fb", "a\\b", "ä",
            "a#1", "a\0", "a?b", "a\n", &long, &deep, &longer,
        ] {
            assert_eq!(bad.parse::<Name>().unwrap_err().code(), 1601, "{bad:?}");
        }
    }
}
