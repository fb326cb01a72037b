//! What the usual tools make of the same bytes, on the same machine, in turn with ours.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use highwater_tests::command;

/// What a pipe of tools took.
pub struct Took {
    /// From its start to its end.
    pub seconds: f64,
    /// Of zstd's alone, in user space and in the kernel.
    pub zstd_cpu_seconds: f64,
}

/// `dd iflag=direct | zstd -1 -T1`, to nowhere; on one processor of this number, or on any.
pub fn compress(from: &Path, processor: Option<usize>) -> Result<Took> {
    let on = processor.map(|number| format!("taskset -cp {number} $$ > /dev/null; ")).unwrap_or_default();
    shell(&format!("{on}{} {ZSTD} > /dev/null; }}", read(from)))
}

/// The same, then encrypted and written out durably, as ours is.
pub fn compress_and_store(from: &Path, to: &Path) -> Result<Took> {
    shell(&format!(
        "{} {ZSTD}; }} | openssl enc -aes-256-ctr -pbkdf2 -pass pass:bench \
         | dd of={} bs=1M conv=fsync status=none; rm {}",
        read(from),
        to.display(),
        to.display(),
    ))
}

const ZSTD: &str = "time zstd -q -1 -T1 -c 2>&4";

fn read(from: &Path) -> String {
    format!("dd if={} bs=1M iflag=direct status=none | {{", from.display())
}

/// bash's `time` tells what zstd took on the script's standard output.
fn shell(script: &str) -> Result<Took> {
    let script = format!("TIMEFORMAT='%U %S'; exec 4>&2 2>&1; {script}");
    let began = Instant::now();
    let said = command::run("bash", &["-o", "pipefail", "-e", "-c", &script])?;
    let seconds = began.elapsed().as_secs_f64();
    let times: Vec<f64> = said.split_whitespace().filter_map(|time| time.parse().ok()).collect();
    ensure!(times.len() == 2, "unexpected answer of the baseline: {said}");
    Ok(Took { seconds, zstd_cpu_seconds: times.iter().sum() })
}
