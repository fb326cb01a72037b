//! What to do about a path that this process may not use: which user it is, and where the way ends.

use std::io::ErrorKind;
use std::path::Path;

/// What to do about it.
#[must_use]
pub fn advice(path: &Path) -> String {
    let user = user();
    // The first directory on the way whose entries cannot be reached: what lies behind may be all right.
    let closed = path.ancestors().collect::<Vec<_>>().into_iter().rev().find(|part| {
        let reached = part.join(".").metadata();
        part.is_dir() && matches!(reached, Err(e) if e.kind() == ErrorKind::PermissionDenied)
    });
    match closed {
        Some(dir) if dir != path => format!(
            "this runs as user {user}, who cannot enter {}: let others through (chmod o+x), or run it as root",
            dir.display()
        ),
        _ => format!(
            "this runs as user {user}: give {path} to the user that the collector runs as \
             (chown -R highwater: {path}), or run it as root",
            path = path.display()
        ),
    }
}

/// Whether this process may not read a file.
#[must_use]
pub fn is_denied(path: &Path) -> bool {
    matches!(std::fs::File::open(path), Err(e) if e.kind() == ErrorKind::PermissionDenied)
}

/// Name, or number, of the user that this process is.
fn user() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    let Some(effective) = uids.split_whitespace().nth(1) else { return "unknown".to_owned() };
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == effective).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| effective.to_owned())
}
