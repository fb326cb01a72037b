//! What a guest's agent says, as lines and answers. Pure.
//!
//! **Nothing of it is trusted.** The bytes come out of a guest, which may be hostile: it can say anything, endlessly, or never. A line
//! is kept up to [`LINE_BYTES_MAX`] and is worth nothing beyond; what comes before the answer to the greeting is thrown away as it
//! comes. Time and the number of bytes are bounded by whoever reads ([`super::qga`]).

use serde::Deserialize;
use serde_json::Value;

/// The longest answer: a list of some two hundred commands takes a tenth of it.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// In no JSON text: before it, whatever was under way is void.
pub const SENTINEL: u8 = 0xFF;

/// Cuts bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    delimited: bool,
    overlong: bool,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// It came right behind the sentinel.
    pub delimited: bool,
    /// Without its end. `None`: it was too long to keep.
    pub text: Option<Vec<u8>>,
}

impl Lines {
    /// Takes one byte; answers the line that it ends. Empty lines are none.
    pub fn push(&mut self, byte: u8) -> Option<Line> {
        match byte {
            SENTINEL => {
                self.line.clear();
                (self.delimited, self.overlong) = (true, false);
                None
            }
            b'\n' => {
                let text = std::mem::take(&mut self.line);
                let (delimited, overlong) = (self.delimited, self.overlong);
                if text.is_empty() && !overlong {
                    return None;
                }
                (self.delimited, self.overlong) = (false, false);
                Some(Line { delimited, text: (!overlong).then_some(text) })
            }
            _ if self.line.len() >= LINE_BYTES_MAX => {
                self.line.clear();
                self.overlong = true;
                None
            }
            _ if self.overlong => None,
            _ => {
                self.line.push(byte);
                None
            }
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// What was asked for.
    Return(Value),
    /// The agent refuses; why, in its words, cut short and without anything that could disturb a terminal or a log.
    Error(String),
    /// This is none.
    Garbage,
}

#[derive(Deserialize)]
struct Told {
    #[serde(default, rename = "return")]
    returned: Option<Value>,
    #[serde(default)]
    error: Option<Refused>,
}

#[derive(Deserialize)]
struct Refused {
    #[serde(default)]
    desc: String,
}

impl Line {
    /// What it says.
    #[must_use]
    pub fn answer(&self) -> Answer {
        let Some(text) = &self.text else { return Answer::Garbage };
        match serde_json::from_slice::<Told>(text) {
            Ok(Told { error: Some(refused), .. }) => Answer::Error(tame(&refused.desc)),
            Ok(Told { returned: Some(value), .. }) => Answer::Return(value),
            _ => Answer::Garbage,
        }
    }
}

/// A guest's words for a log.
#[must_use]
pub fn tame(text: &str) -> String {
    let shown: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    if shown.is_empty() { "it does not say why".into() } else { shown }
}

/// Whether a list of commands (`guest-info`) has all of these, enabled.
#[must_use]
pub fn offers(info: &Value, wanted: &[&str]) -> bool {
    let commands = info["supported_commands"].as_array().map_or(&[][..], Vec::as_slice);
    wanted.iter().all(|name| commands.iter().any(|c| c["name"] == *name && c["enabled"] == true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(bytes: &[u8]) -> Vec<Line> {
        let mut lines = Lines::default();
        bytes.iter().filter_map(|byte| lines.push(*byte)).collect()
    }

    #[test]
    fn the_sentinel_voids_what_came_before() {
        let said = lines(b"{\"return\": 1\xFF{\"return\": 7}\n\n{\"return\": 8}\n{\"ret");
        assert_eq!(said.len(), 2);
        assert_eq!((said[0].delimited, said[0].answer()), (true, Answer::Return(7.into())));
        assert_eq!((said[1].delimited, said[1].answer()), (false, Answer::Return(8.into())));
    }

    #[test]
    fn an_error_is_told_tamely() {
        let said = lines(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[31m\\nway\"}}\n{\"error\": {}}\n");
        assert_eq!(said[0].answer(), Answer::Error("no[31mway".into()));
        assert_eq!(said[1].answer(), Answer::Error("it does not say why".into()));
    }

    #[test]
    fn commands_must_be_there_and_enabled() {
        let info = serde_json::json!({"supported_commands": [
            {"name": "guest-fsfreeze-freeze", "enabled": true},
            {"name": "guest-fsfreeze-thaw", "enabled": false},
        ]});
        assert!(offers(&info, &["guest-fsfreeze-freeze"]));
        assert!(!offers(&info, &["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]));
        assert!(!offers(&Value::Null, &["x"]) && !offers(&serde_json::json!([1]), &["x"]));
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut lines = Lines::default();
        for _ in 0..LINE_BYTES_MAX * 3 {
            assert_eq!(lines.push(b'['), None);
            assert!(lines.line.len() <= LINE_BYTES_MAX);
        }
        assert_eq!(lines.push(b'\n').map(|line| line.answer()), Some(Answer::Garbage));
        for byte in b"{\"return\": {}}" {
            assert_eq!(lines.push(*byte), None);
        }
        assert!(matches!(lines.push(b'\n').map(|line| line.answer()), Some(Answer::Return(_))));
    }

    #[test]
    fn depth_does_not_exhaust_the_stack() {
        let deep = [b"{\"return\": ".as_slice(), &vec![b'['; LINE_BYTES_MAX - 64], b"\n"].concat();
        assert_eq!(lines(&deep)[0].answer(), Answer::Garbage);
    }

    proptest! {
        #[test]
        fn anything_may_be_said(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            for line in lines(&bytes) {
                let _ = line.answer();
            }
        }

        #[test]
        fn how_it_comes_in_pieces_makes_no_difference(noise in proptest::collection::vec(any::<u8>(), 0..256), id in any::<u64>()) {
            let said = [&noise[..], &[SENTINEL], format!("{{\"return\": {id}}}\n").as_bytes()].concat();
            let last = lines(&said).pop().expect("a line");
            prop_assert!(last.delimited);
            prop_assert_eq!(last.answer(), Answer::Return(id.into()));
        }
    }
}
