//! `highwater-guardian`: thaws what the agent froze when the agent no longer can. Started by `highwater-agent` only.

use std::{ffi::CString, os::unix::ffi::OsStringExt, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let log = match (arguments.next(), arguments.next(), arguments.next()) {
        (None, None, None) => None,
        (Some(flag), Some(path), None) if flag == "--log" => CString::new(path.into_vec()).ok(),
        _ => {
            eprintln!(
                "usage: highwater-guardian [--log PATH] (started by highwater-agent, with its socket as input)"
            );
            return ExitCode::from(2);
        }
    };
    match highwater_agent::guardian::process::run(log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("highwater-guardian: {cause}");
            ExitCode::from(2)
        }
    }
}
