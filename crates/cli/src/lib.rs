//! The operator's command, as a library: [`run`] takes arguments and a console and answers an exit code.
//!
//! # Contract
//!
//! - It needs a vault and one of its keys, and nothing else: no collector runs, no configuration is required.
//! - With `--json` exactly one JSON document is written to standard output, for success and for failure; field names
//!   are kebab-case and never change their meaning. A failure is `{"error": {"code", "cause", "action"}}`.
//! - Nothing is overwritten without a plan shown before and a confirmation (`--yes`, or typed).
//! - A reader that closes the pipe early is no failure.

mod args;
mod confirm;
mod context;
mod erase;
mod error;
mod group;
mod keys;
mod list;
mod maintain;
mod output;
mod point;
mod policy;
mod recover;
mod repair;
mod secret;
mod verify;

pub use error::{CliError, Exit};
pub use output::{bytes_text, rfc3339};
pub use secret::ask_on_terminal;

use clap::{CommandFactory, Parser};
use highwater_manual::usage;
use std::{
    ffi::OsString,
    io::{BufRead, Write},
};
use zeroize::Zeroizing;

/// Where a command reads and writes.
pub struct Console<'a> {
    /// Results.
    pub out: &'a mut dyn Write,
    /// Plans, progress and errors.
    pub err: &'a mut dyn Write,
    /// Typed confirmations.
    pub input: &'a mut dyn BufRead,
    /// Asks for a secret where it is not shown: [`ask_on_terminal`].
    pub secrets: &'a mut dyn FnMut(&str) -> std::io::Result<Zeroizing<Vec<u8>>>,
    /// Whether `err` is a terminal: progress bars instead of lines.
    pub terminal: bool,
    /// Whether somebody can be asked.
    pub can_ask: bool,
}

/// Runs one command.
pub fn run(args: impl IntoIterator<Item = OsString>, console: &mut Console<'_>) -> Exit {
    let args: Vec<OsString> = args.into_iter().collect();
    let json = usage::wants_json(&args);
    let outcome = match args::Cli::try_parse_from(&args) {
        Ok(cli) => dispatch(cli, console),
        Err(error) if !error.use_stderr() => {
            write!(console.out, "{error}").map(|()| Exit::Success).map_err(CliError::from)
        }
        Err(error) if !json => {
            let _ = write!(console.err, "{error}");
            return Exit::Usage;
        }
        Err(error) => Err(CliError::Usage(usage::cause(&error))),
    };
    match outcome {
        Ok(exit) => console.out.flush().map_or_else(|e| fail(&e.into(), json, console), |()| exit),
        Err(error) => fail(&error, json, console),
    }
}

fn dispatch(cli: args::Cli, console: &mut Console<'_>) -> Result<Exit, CliError> {
    match &cli.verb {
        args::Verb::Completions { shell } => {
            highwater_manual::completions(args::Cli::command(), *shell, console.out)?;
            return Ok(Exit::Success);
        }
        args::Verb::Man => {
            highwater_manual::man(args::Cli::command(), console.out)?;
            return Ok(Exit::Success);
        }
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let work = async {
            match &cli.verb {
                args::Verb::Machines => list::machines(&cli.global, console).await,
                args::Verb::Points { machine } => list::points(&cli.global, machine, console).await,
                args::Verb::Group { verb } => group::run(&cli.global, verb, console).await,
                args::Verb::Point { verb: args::PointVerb::Create(what) } => {
                    point::create(&cli.global, what, console).await
                }
                args::Verb::Recover(what) => recover::recover(&cli.global, what, console).await,
                args::Verb::Verify(what) | args::Verb::Vault { verb: args::VaultVerb::Verify(what) } => {
                    verify::verify(&cli.global, what, console).await
                }
                args::Verb::Vault { verb: args::VaultVerb::Key { verb } } => {
                    keys::run(&cli.global, verb, console).await
                }
                args::Verb::Vault { verb: args::VaultVerb::Keep(verb) } => {
                    keep(&cli.global, verb, console).await
                }
                args::Verb::Vault { verb: args::VaultVerb::Repair(what) } => {
                    repair::repair(&cli.global, what, console).await
                }
                args::Verb::Vault { verb: args::VaultVerb::EraseMachine(what) } => {
                    erase::machine(&cli.global, what, console).await
                }
                args::Verb::Completions { .. } | args::Verb::Man => Ok(Exit::Success),
            }
        };
        tokio::select! {
            outcome = work => outcome,
            _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted),
        }
    })
}

async fn keep(
    global: &args::Global,
    verb: &args::KeepVerb,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    use args::KeepVerb;
    match verb {
        KeepVerb::Plan { machine, grace } => {
            maintain::plan(global, machine.as_deref(), *grace, console).await
        }
        KeepVerb::Maintain { machine, grace, rate, yes } => {
            let settings = maintain::settings(*rate, *grace);
            maintain::maintain(global, machine.as_deref(), settings, *yes, console).await
        }
        KeepVerb::Policy { verb } => policy::run(global, verb, console).await,
        KeepVerb::Pin(what) => {
            let pin = Some(highwater_vault::Hold::Pin);
            policy::hold(global, &what.machine, what.point, pin, &what.reason, console).await
        }
        KeepVerb::Hold(what) => {
            let legal = Some(highwater_vault::Hold::Legal);
            policy::hold(global, &what.machine, what.point, legal, &what.reason, console).await
        }
        KeepVerb::Release { machine, point, yes } => {
            policy::release(global, machine, *point, *yes, console).await
        }
    }
}

fn fail(error: &CliError, json: bool, console: &mut Console<'_>) -> Exit {
    if error.is_broken_pipe() {
        return Exit::Success;
    }
    let code = format!("HW-{}", error.code());
    // Where even this cannot be written, the exit code still tells.
    let _ = if json {
        let document = serde_json::json!({
            "error": { "code": code, "cause": error.to_string(), "action": error.action() }
        });
        writeln!(console.out, "{document}").and_then(|()| console.out.flush())
    } else {
        writeln!(console.err, "error {code}: {error}\n  → {}", error.action())
    };
    error.exit()
}
