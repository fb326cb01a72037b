//! The stable number of an error, as operators read it and look it up: `HW-1206`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::fmt;

/// See the module. In documents it is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u16);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HW-{:04}", self.0)
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("HW-").filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        let number = digits.and_then(|digits| digits.parse().ok());
        number.map(Self).ok_or_else(|| D::Error::custom("a code like HW-1206 is expected"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_text_in_documents() {
        assert_eq!(serde_json::to_string(&Code(1206)).unwrap(), "\"HW-1206\"");
        assert_eq!(serde_json::from_str::<Code>("\"HW-0042\"").unwrap(), Code(42));
        for bad in ["1206", "\"1206\"", "\"HW-\"", "\"HW-+1\"", "\"HW-70000\""] {
            assert!(serde_json::from_str::<Code>(bad).is_err(), "{bad}");
        }
    }
}
