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

/// Addresses to listen on.
pub mod address {
    use super::{Deserialize, Deserializer, Error};
    use std::net::SocketAddr;

    /// For serde's `deserialize_with`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = |_| {
            D::Error::custom(format!(
                "{text:?} is no address; write it like \"0.0.0.0:9443\" or \"[::]:9443\""
            ))
        };
        text.parse().map_err(wrong)
    }
}

/// Times as people write them, and whole days as days.
pub mod time {
    use super::{Deserialize, Deserializer, Error, Serializer};
    use std::time::Duration;

    const DAY_SECONDS: u64 = 86_400;

    /// For serde's `with`.
    pub fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        let seconds = time.as_secs();
        if seconds >= DAY_SECONDS && seconds.is_multiple_of(DAY_SECONDS) && time.subsec_nanos() == 0 {
            let days = seconds / DAY_SECONDS;
            return serializer.serialize_str(&format!("{days}{}", if days == 1 { "day" } else { "days" }));
        }
        humantime_serde::serialize(time, serializer)
    }

    /// For serde's `with`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime_serde::re::humantime::parse_duration(&text).map_err(|_| {
            D::Error::custom(format!("{text:?} is no time; write it like \"500ms\", \"90s\" or \"365days\""))
        })
    }
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
