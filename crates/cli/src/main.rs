//! `highwater`: the operator's command.

use highwater_cli::{Console, ask_on_terminal, run};
use std::io::{IsTerminal, stderr, stdin, stdout};

fn main() -> std::process::ExitCode {
    let terminal = stderr().is_terminal();
    let can_ask = stdin().is_terminal() && terminal;
    let mut console = Console {
        out: &mut stdout().lock(),
        err: &mut stderr(),
        input: &mut stdin().lock(),
        secrets: &mut ask_on_terminal,
        terminal,
        can_ask,
    };
    run(std::env::args_os(), &mut console).into()
}
