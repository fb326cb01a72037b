//! Measurements: `highwater-bench tracking|replicate`, called by `cargo xtask bench`.
//!
//! What is compared is measured in turn in one run, so that what the machine does besides hits both alike: medians and
//! spread of several rounds. The targets of the design stand beside and are never asserted: machines differ. The results go to
//! `target/bench/SUBJECT.json` too.

mod agent;
mod baseline;
mod ingest;
mod programs;
mod replicate;
mod results;
mod tracking;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask bench tracking|replicate [--rounds N] [--seconds N] [--part NAME]\n\n\
    --rounds N    rounds of everything that is compared (5; replicate: 3)\n\
    --seconds N   of each load (3)\n\
    --part NAME   replicate: only throughput, ingest, freezes or large-disk";

/// What the user chose.
struct Choice {
    rounds: Option<u32>,
    seconds: u32,
    part: Option<String>,
}

fn main() -> ExitCode {
    match measure() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let subject = arguments.next().context(USAGE)?;
    let mut choice = Choice { rounds: None, seconds: 3, part: None };
    while let Some(name) = arguments.next() {
        let value = arguments.next().context(USAGE)?;
        let number = || value.parse().ok().filter(|n| *n > 0).context(USAGE);
        match name.as_str() {
            "--rounds" => choice.rounds = Some(number()?),
            "--seconds" => choice.seconds = number()?,
            "--part" if subject == "replicate" && replicate::PARTS.iter().any(|(part, _)| *part == value) => {
                choice.part = Some(value);
            }
            _ => bail!(USAGE),
        }
    }
    let results = match subject.as_str() {
        "tracking" => tracking::measure(&choice)?,
        "replicate" => replicate::measure(&choice)?,
        _ => bail!(USAGE),
    };
    results.finish(&subject)
}
