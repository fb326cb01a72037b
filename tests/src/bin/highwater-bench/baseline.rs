//! What the usual tools make of the same bytes, on the same machine, in turn with ours.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use highwater_tests::command;

/// `dd iflag=direct | zstd -1 -T1`, to nowhere; seconds.
pub fn compress(from: &Path) -> Result<f64> {
    shell(&format!("dd if={} bs=1M iflag=direct status=none | zstd -q -1 -T1 -c > /dev/null", from.display()))
}

/// The same, then encrypted and written out durably, as ours is; seconds.
pub fn compress_and_store(from: &Path, to: &Path) -> Result<f64> {
    shell(&format!(
        "dd if={} bs=1M iflag=direct status=none | zstd -q -1 -T1 -c \
         | openssl enc -aes-256-ctr -pbkdf2 -pass pass:bench | dd of={} bs=1M conv=fsync status=none; rm {}",
        from.display(),
        to.display(),
        to.display(),
    ))
}

fn shell(script: &str) -> Result<f64> {
    let began = Instant::now();
    command::run("bash", &["-o", "pipefail", "-e", "-c", script])?;
    Ok(began.elapsed().as_secs_f64())
}
