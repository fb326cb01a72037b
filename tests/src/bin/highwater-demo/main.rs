//! The demo: a disk is protected while it is written to, destroyed, and recovered, each step told in plain words.
//!
//! **Proof.** At each point the writers of documents and database rest, and the checksum of every file is noted; a journal is
//! appended to all the time. A recovered disk must hold exactly those files, a journal that ends between what was synced
//! when the point was asked for and what was written when it was there, and pass a check of its filesystem.
//!
//! **Nothing is left behind**, also when interrupted ([`interrupt`]): everything has a destructor, and [`highwater_tests::Arena`]
//! looks afterwards.

mod disk;
mod files;
mod interrupt;
mod journal;
mod report;
mod stage;
mod story;
mod workload;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--json"] => true,
        _ => {
            eprintln!("usage: cargo xtask demo [--json]\n\n--json: only the figures, as JSON");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = interrupt::listen() {
        eprintln!("demo: cannot listen to signals: {error}");
        return ExitCode::FAILURE;
    }
    match story::run(json) {
        Ok(figures) => {
            if json {
                println!("{figures:#}");
            }
            ExitCode::SUCCESS
        }
        Err(_) if interrupt::interrupted() => {
            eprintln!("Interrupted. Nothing is left behind.");
            ExitCode::from(interrupt::EXIT_CODE)
        }
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
