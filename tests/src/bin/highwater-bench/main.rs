//! Measurements: `highwater-bench tracking|capture|replicate|vault|markers`, called by `cargo xtask bench`.
//!
//! What is compared is measured in turn in one run, so that what the machine does besides hits both alike: medians and
//! spread of several rounds. The targets of the design stand beside and are never asserted: machines differ. The results go to
//! `target/bench/SUBJECT.json` too.

mod agent;
mod baseline;
mod capture;
mod cpu;
mod ingest;
mod load;
mod markers;
mod programs;
mod replicate;
mod results;
mod tracking;
mod vault;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask bench tracking|capture|replicate|vault|markers [--rounds N] [--seconds N] [--part NAME] [--quick]\n\n\
    --rounds N    rounds of everything that is compared (5; replicate: 3; markers: 15)\n\
    --seconds N   of each load (3)\n\
    --part NAME   capture: only writer, programs, rpo, churn or freezes\n\
    \x20             replicate: only throughput, ingest, freezes or large-disk\n\
    \x20             vault: only ingest, read, open, merge, amplification, space or memory\n\
    --quick       capture, vault, markers: short or tiny, to see that it runs";

/// Begins the hidden subject: a step of `vault` in a process of its own.
const STEP: &str = "vault-step";

/// What the user chose.
struct Choice {
    rounds: Option<u32>,
    seconds: u32,
    part: Option<String>,
    quick: bool,
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
    if subject == STEP {
        return vault::step(arguments);
    }
    let mut choice = Choice { rounds: None, seconds: 3, part: None, quick: false };
    let parts: Vec<&str> = match subject.as_str() {
        "capture" => capture::PARTS.iter().map(|(part, _)| *part).collect(),
        "replicate" => replicate::PARTS.iter().map(|(part, _)| *part).collect(),
        "vault" => vault::PARTS.iter().map(|(part, _)| *part).collect(),
        _ => Vec::new(),
    };
    while let Some(name) = arguments.next() {
        if name == "--quick" && ["capture", "markers", "vault"].contains(&subject.as_str()) {
            choice.quick = true;
            continue;
        }
        let value = arguments.next().context(USAGE)?;
        let number = || value.parse().ok().filter(|n| *n > 0).context(USAGE);
        match name.as_str() {
            "--rounds" => choice.rounds = Some(number()?),
            "--seconds" => choice.seconds = number()?,
            "--part" if parts.contains(&value.as_str()) => choice.part = Some(value),
            _ => bail!(USAGE),
        }
    }
    let results = match subject.as_str() {
        "tracking" => tracking::measure(&choice)?,
        "capture" => capture::measure(&choice)?,
        "replicate" => replicate::measure(&choice)?,
        "vault" => vault::measure(&choice)?,
        "markers" => markers::measure(&choice)?,
        _ => bail!(USAGE),
    };
    results.finish(&subject)
}
