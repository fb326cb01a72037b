//! Key files: one line, readable by their owner only.

use crate::{
    Result, VaultError, VaultKey,
    key::{Secret, random},
};
use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};
use zeroize::Zeroizing;

const PREFIX: &str = "highwater-key-file-2 ";
const BYTES_MAX: usize = 256;

/// What a key file holds.
pub(super) enum KeyFile {
    /// A vault's root key itself, as the first release wrote it.
    Root(VaultKey),
    /// A key under which the root key is wrapped.
    Wrapping(Secret),
}

impl KeyFile {
    pub(super) fn load(path: &Path) -> Result<Self> {
        let text = read_private(path, BYTES_MAX).map_err(|e| refusal(path, &e))?;
        let text = std::str::from_utf8(&text).map_err(|_| refusal(path, &"not a key file"))?;
        match text.trim_end().strip_prefix(PREFIX) {
            None => VaultKey::parse(text).map(Self::Root).map_err(|cause| refusal(path, &cause)),
            Some(digits) => parse_hex(digits)
                .map(|key| Self::Wrapping(Secret(key)))
                .ok_or_else(|| refusal(path, &"64 hexadecimal digits expected")),
        }
    }

    /// The wrapping key in a file, which is made if it is not there: so whoever was interrupted can do the same again.
    pub(super) fn load_or_create(path: &Path) -> Result<Secret> {
        match Self::load(path) {
            Ok(Self::Wrapping(key)) => return Ok(key),
            Ok(Self::Root(_)) => {
                return Err(refusal(
                    path,
                    &"it holds a root key itself, which wraps nothing; name a new file",
                ));
            }
            Err(error) if path.symlink_metadata().is_ok() => return Err(error),
            Err(_) => {}
        }
        let mut key = Secret(Zeroizing::new([0; 32]));
        random(key.0.as_mut())?;
        let mut text = Zeroizing::new(String::with_capacity(BYTES_MAX));
        text.push_str(PREFIX);
        text.push_str(&to_hex(&key.0));
        text.push('\n');
        write_private(path, text.as_bytes()).map_err(|e| refusal(path, &e))?;
        Ok(key)
    }
}

pub(super) fn refusal(path: &Path, cause: &dyn ToString) -> VaultError {
    VaultError::KeyFile { path: path.to_owned(), cause: cause.to_string() }
}

/// Reads a file of at most so many bytes that nobody but its owner may read or write.
pub(crate) fn read_private(path: &Path, bytes_max: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = fs::File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        let cause = format!("mode {:03o} lets others than its owner read or write it", mode & 0o777);
        return Err(io::Error::new(ErrorKind::PermissionDenied, cause));
    }
    // As large as it may become: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(bytes_max + 1));
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("it is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Writes a new file that only its owner may read, and syncs it and its directory. One that is there is refused.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all())?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir).and_then(|dir| dir.sync_all())
}

/// As 64 lower-case hexadecimal digits.
pub(crate) fn to_hex(bytes: &[u8; 32]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(64));
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
        }
    }
    text
}

/// 32 bytes from 64 hexadecimal digits.
pub(crate) fn parse_hex(digits: &str) -> Option<Zeroizing<[u8; 32]>> {
    let digits = digits.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut out = Zeroizing::new([0; 32]);
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |d: u8| char::from(d).to_digit(16).map(|n| n as u8);
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(out)
}
