//! Numbers of bytes as people write them: `64MiB`, `512 KiB`, `1GB`, `4096`.

/// Units, each beneath a larger one; `B` and none are bytes.
const UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
    ("", 1),
];

/// Bytes of a whole number and a unit; blanks may lie between them. None: it is no size, or too large.
#[must_use]
pub fn parse(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit = text[digits..].trim();
    let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

/// A size in the first unit in which it is a whole number, so that [`parse`] reads it back.
#[must_use]
pub fn exact(bytes: u64) -> String {
    let fits = |factor: u64| bytes >= factor && bytes.is_multiple_of(factor);
    let exact = UNITS.into_iter().find(|(_, factor)| fits(*factor));
    exact.map_or_else(|| "0B".to_owned(), |(name, factor)| format!("{}{name}", bytes / factor))
}

/// The same to three digits, in binary units: `1.5 KiB`.
#[must_use]
pub fn rounded(bytes: u64) -> String {
    let (unit, factor) = UNITS[..4].iter().find(|(_, factor)| bytes >= *factor).unwrap_or(&("B", 1));
    let tenths = (u128::from(bytes) * 10 + u128::from(*factor) / 2) / u128::from(*factor);
    if tenths >= 1000 || tenths.is_multiple_of(10) {
        format!("{} {unit}", (tenths + 5) / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(bytes: u64) {
            prop_assert_eq!(parse(&exact(bytes)), Some(bytes));
        }
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = parse(&text);
        }
    }

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in [
            ("0B", 0),
            ("1B", 1),
            ("4MiB", 4 << 20),
            ("1GiB", 1 << 30),
            ("1025KiB", 1025 << 10),
            ("3GB", 3_000_000_000),
        ] {
            assert_eq!(parse(text), Some(bytes));
            assert_eq!(exact(bytes), text);
        }
        assert_eq!((parse("4 MiB"), parse("4096")), (Some(4 << 20), Some(4096)));
        for bad in ["", "MiB", "4M", "-1", "4.5MiB", "99999999999999999999", "99999999999999GiB", "4MiB x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(
            (rounded(1536), rounded(0), rounded(150 << 20)),
            ("1.5 KiB".into(), "0 B".into(), "150 MiB".into())
        );
    }
}
