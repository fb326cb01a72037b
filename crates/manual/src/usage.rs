//! Arguments that make no sense: told as every other error is.

use clap::Parser;
use std::{ffi::OsString, io::Write};

/// The code of arguments that make no sense, of every program.
pub const USAGE_CODE: &str = "HW-1501";

/// The process's arguments. With ones that make no sense, or ask for help, it ends here: with 2, and with `--json` among them one document.
#[must_use]
pub fn parse<P: Parser>() -> P {
    let args: Vec<OsString> = std::env::args_os().collect();
    match P::try_parse_from(&args) {
        Ok(parsed) => parsed,
        Err(error) if error.use_stderr() && wants_json(&args) => {
            // Where even this cannot be written, the exit code still tells.
            let _ = writeln!(std::io::stdout(), "{}", document(&error, P::command().get_name()));
            std::process::exit(2)
        }
        Err(error) => error.exit(),
    }
}

/// Whether `--json` is among arguments that could not be parsed.
#[must_use]
pub fn wants_json(args: &[OsString]) -> bool {
    args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--json")
}

/// What is wrong with them: until the first empty line, since what lacks may stand beneath.
#[must_use]
pub fn cause(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

fn document(error: &clap::Error, program: &str) -> serde_json::Value {
    let action = format!("See `{program} --help`.");
    serde_json::json!({ "error": { "code": USAGE_CODE, "cause": cause(error), "action": action } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    #[test]
    fn what_lacks_is_named() {
        let command = Command::new("a-b").arg(Arg::new("to").long("to").required(true));
        let error = command.try_get_matches_from(["a-b"]).unwrap_err();
        let told = document(&error, "a-b");
        assert_eq!(told["error"]["code"], USAGE_CODE);
        assert!(told["error"]["cause"].as_str().unwrap().contains("--to"), "{told}");
        assert!(wants_json(&["a-b".into(), "--json".into()]) && !wants_json(&["--".into(), "--json".into()]));
    }
}
