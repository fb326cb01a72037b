//! The documentation says what the code says.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of this repository").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Codes in match arms (`=> 1234`) and in log lines (`HW-1234`).
fn codes(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for mark in ["=> 1", "HW-1"] {
        for (at, _) in text.match_indices(mark) {
            let digits: String =
                text[at + mark.len() - 1..].chars().take_while(char::is_ascii_digit).collect();
            if digits.len() == 4 && digits.as_bytes()[1] <= b'6' {
                found.insert(digits);
            }
        }
    }
    found
}

#[test]
fn every_error_code_is_documented() {
    let mut files = vec![];
    for dir in ["agent/src", "collector/src", "crates"] {
        sources(&root().join(dir), &mut files);
    }
    let documented = codes(&fs::read_to_string(root().join("docs/ERRORS.md")).unwrap());
    let mut missing = vec![];
    for file in files {
        // Tests name codes that do not exist, on purpose.
        if file.components().any(|c| c.as_os_str() == "tests") || file.ends_with("tests.rs") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        missing.extend(codes(text).difference(&documented).map(|c| format!("HW-{c} ({})", file.display())));
    }
    assert!(missing.is_empty(), "not in docs/ERRORS.md: {}", missing.join(", "));
}
