//! Sizes as people write them: `4MiB`, `512 KiB`, `1GiB`, `4096`.

use highwater_delta::size;
use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// For serde's `with`.
pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&size::exact(*bytes))
}

/// For serde's `with`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    size::parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no size; write it like \"4MiB\"")))
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
