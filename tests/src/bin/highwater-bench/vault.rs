//! What the vault costs: time, requests, space and memory, against the least that could be done with the same bytes.
//!
//! The histories are made by the vault's own writer and maintainer, with a clock set by hand. Content is half noise, half text
//! unless told otherwise, so that zstd makes about half of it. Everything lies in directories of its own, which go at the end; what does not
//! ask for a disk lies on a tmpfs.

mod amplification;
mod counted;
mod files;
mod ingest;
mod made;
mod memory;
mod merge;
mod open;
mod read;
mod space;

pub use memory::step;

use crate::Choice;
use crate::results::Results;
use anyhow::Result;
use highwater_tests::S3Server;
use tokio::runtime::Runtime;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const BLOCK: u64 = 4096;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const ROUNDS: u32 = 5;

type Part = fn(&Choice, &mut Results) -> Result<()>;
/// What there is to measure, by name.
pub const PARTS: [(&str, Part); 7] = [
    ("ingest", ingest::ingest),
    ("read", read::read),
    ("open", open::open),
    ("merge", merge::merge),
    ("amplification", amplification::amplification),
    ("space", space::space),
    ("memory", memory::memory),
];

/// All of it, or the part chosen.
pub fn measure(choice: &Choice) -> Result<Results> {
    // Nothing else of this process looks at the environment yet.
    S3Server::keys_by_environment();
    let mut results = Results::default();
    for (name, part) in PARTS {
        if choice.part.as_ref().is_none_or(|chosen| chosen == name) {
            eprintln!("{name}");
            part(choice, &mut results)?;
        }
    }
    if choice.quick {
        results.note("Tiny sizes (--quick): this shows that everything runs, and measures nothing.");
    }
    Ok(results)
}

impl Choice {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { ROUNDS })
    }

    /// A size: as measured, or tiny.
    fn sized(&self, whole: u64, tiny: u64) -> u64 {
        if self.quick { tiny } else { whole }
    }
}

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// 10^6 bytes a second.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}
