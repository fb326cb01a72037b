//! `cargo xtask`: the one door to building, trying, testing, measuring and checking Highwater.
//!
//! Every verb that needs tools or the eBPF object calls [`setup`] and [`ebpf`] itself, so that each of
//! `cargo xtask demo` and `cargo xtask test` is the only command needed on a fresh Debian machine.

mod ebpf;
mod sh;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs of the door.
#[derive(Subcommand)]
enum Verb {
    /// Compile the eBPF programs to target/ebpf/highwater-agent-ebpf.o
    BuildEbpf,
}

fn main() -> Result<()> {
    match Args::parse().verb {
        Verb::BuildEbpf => ebpf::build().map(drop),
    }
}
