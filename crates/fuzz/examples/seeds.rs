//! Writes the seeds to the directory given, a directory for each target: the corpus that `cargo xtask fuzz` begins with.

use std::{error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let corpus = PathBuf::from(std::env::args_os().nth(1).ok_or("give the corpus' directory")?);
    for (number, (target, bytes)) in highwater_fuzz::seeds()?.into_iter().enumerate() {
        fs::create_dir_all(corpus.join(target))?;
        fs::write(corpus.join(target).join(format!("seed-{number:02}")), bytes)?;
    }
    Ok(())
}
