//! Sizes as people write them: `4MiB`, `512 KiB`, `1GiB`, `4096`.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];

/// Bytes of a size.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = text[digits..].trim();
    let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

/// A size in the largest unit that is exact.
#[must_use]
pub fn show_bytes(bytes: u64) -> String {
    let exact = UNITS.into_iter().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    exact.map_or_else(|| "0".to_owned(), |(name, factor)| format!("{}{name}", bytes / factor))
}

/// For serde's `with`.
pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show_bytes(*bytes))
}

/// For serde's `with`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_bytes(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no size; write it like \"4MiB\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_back() {
        for (text, bytes) in
            [("0", 0), ("1", 1), ("4MiB", 4 << 20), ("1GiB", 1 << 30), ("1025KiB", 1025 << 10)]
        {
            assert_eq!(parse_bytes(text), Some(bytes));
            assert_eq!(show_bytes(bytes), text);
        }
        assert_eq!(parse_bytes("4 MiB"), Some(4 << 20));
        for bad in ["", "MiB", "4MB", "-1", "4.5MiB", "99999999999999999999", "99999999999999GiB"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
    }
}
