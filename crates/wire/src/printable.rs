//! Texts of a peer, made harmless to logs and terminals. Pure.

use std::fmt::Write;

/// The text with every character escaped that could begin a line, move a cursor or turn the direction of what
/// follows, cut off at `bytes_max`. Applied twice it changes nothing more.
#[must_use]
pub fn printable(text: &str, bytes_max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(bytes_max));
    for c in text.chars() {
        let before = out.len();
        let harmful = c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{feff}')
            || ('\u{202a}'..='\u{202e}').contains(&c)
            || ('\u{2066}'..='\u{2069}').contains(&c);
        if harmful {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() > bytes_max {
            out.truncate(before);
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn nothing_of_a_peer_begins_a_line_or_moves_a_cursor() {
        assert_eq!(printable("Käse \\ größer als 3 GiB – gut", 99), "Käse \\ größer als 3 GiB – gut");
        assert_eq!(printable("a\nb\r\t\0", 99), "a\\nb\\r\\t\\u{0}");
        assert_eq!(printable("\u{1b}[2J\u{9b}31m\u{7f}", 99), "\\u{1b}[2J\\u{9b}31m\\u{7f}");
        assert_eq!(printable("\u{202e}gpj.exe\u{2066}\u{2028}", 99), "\\u{202e}gpj.exe\\u{2066}\\u{2028}");
        let once = printable("\n\u{1b}x", 99);
        assert_eq!(printable(&once, 99), once);
        assert_eq!(printable("ab\u{1b}cd", 7), "ab", "an escape is not cut in two");
    }
}
