//! Amounts as people write them: `64MiB`, `5m`, `unlimited`.

use highwater_delta::size;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{fmt, str::FromStr, time::Duration};

const TIMES_MS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A length of time; whole milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval(pub Duration);

/// Bytes per second; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bandwidth(pub Option<u64>);

impl ByteSize {
    /// For people: three digits of the largest unit, `1.5 KiB`.
    #[must_use]
    pub fn rounded(self) -> String {
        size::rounded(self.0)
    }
    /// As a size in memory, cut to what the machine can address.
    #[must_use]
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // A rate without a unit is too easily one of bytes that was meant otherwise.
        let has_unit = !text.trim_end().ends_with(|last: char| last.is_ascii_digit());
        let wrong = || format!("\"{text}\" is no size: write a whole number and KiB, MiB, GiB, TiB or B");
        size::parse(text).filter(|_| has_unit).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&size::exact(self.0))
    }
}

impl FromStr for Interval {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no length of time: write 100ms, 10s, 5m, 1h30m or 2d");
        let mut rest = text;
        let mut total_ms = 0_u64;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let letters = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
            let (_, unit_ms) = TIMES_MS.iter().find(|(n, _)| *n == &rest[..letters]).ok_or_else(wrong)?;
            rest = rest[letters..].trim_start();
            total_ms =
                number.checked_mul(*unit_ms).and_then(|ms| total_ms.checked_add(ms)).ok_or_else(wrong)?;
        }
        if text.is_empty() { Err(wrong()) } else { Ok(Self(Duration::from_millis(total_ms))) }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, unit_ms) in TIMES_MS {
            if rest >= unit_ms {
                write!(f, "{}{unit}", rest / unit_ms)?;
                rest %= unit_ms;
            }
        }
        Ok(())
    }
}

impl FromStr for Bandwidth {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        match text.strip_suffix("/s").unwrap_or(text).parse::<ByteSize>() {
            Ok(ByteSize(0)) => {
                Err("a bandwidth of 0 would send nothing: write \"unlimited\", or pause the disk".into())
            }
            Ok(size) => Ok(Self(Some(size.0))),
            Err(_) => Err(format!(
                "\"{text}\" is no bandwidth: write \"unlimited\", or a size per second like \"50MiB\""
            )),
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("unlimited"),
            Some(bytes) => write!(f, "{}/s", ByteSize(bytes)),
        }
    }
}

macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}
as_text!(ByteSize, Interval, Bandwidth);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(bytes: u64, ms in 0_u64..1 << 50, rate in 1_u64..) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
            let interval = Interval(Duration::from_millis(ms));
            prop_assert_eq!(interval.to_string().parse(), Ok(interval));
            prop_assert_eq!(Bandwidth(Some(rate)).to_string().parse(), Ok(Bandwidth(Some(rate))));
        }
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = (text.parse::<ByteSize>(), text.parse::<Interval>(), text.parse::<Bandwidth>());
        }
    }

    #[test]
    fn people_units() {
        assert_eq!("64MiB".parse(), Ok(ByteSize(64 << 20)));
        assert_eq!("1h30m".parse(), Ok(Interval(Duration::from_secs(5400))));
        assert_eq!("unlimited".parse(), Ok(Bandwidth(None)));
        assert_eq!(ByteSize(1536).rounded(), "1.5 KiB");
        for wrong in ["", "MiB", "5", "5 ", "5 M", "-1MiB", "99999999999TiB"] {
            assert!(wrong.parse::<ByteSize>().is_err(), "{wrong}");
            assert!(wrong.parse::<Interval>().is_err(), "{wrong}");
        }
        assert!("0MiB".parse::<Bandwidth>().is_err());
    }
}
