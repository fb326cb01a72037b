//! Man pages and completions of the programs, from their command lines: one table for help, manual and shells. And what is said of arguments
//! that make no sense.

pub mod usage;

pub use clap_complete::Shell;

use clap::Command;
use clap_mangen::Man;
use std::io::{self, ErrorKind, Write};

/// Writes a program's man page, with a section for each of its subcommands and their options.
pub fn man(mut command: Command, out: &mut dyn Write) -> io::Result<()> {
    command.build();
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    sections(&command, &mut page)?;
    // The subcommands are told here, and not on pages of their own.
    let name = command.get_name().replace('-', "\\-");
    for sub in command.get_subcommands() {
        let sub = sub.get_name().replace('-', "\\-");
        page = page.replace(&format!("{name}\\-{sub}(1)"), &format!("{name} {sub}"));
    }
    quietly(out.write_all(page.as_bytes()))
}

fn sections(command: &Command, page: &mut String) -> io::Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        let man = Man::new(sub.clone());
        let mut text = Vec::new();
        man.render_synopsis_section(&mut text)?;
        man.render_description_section(&mut text)?;
        if sub.get_arguments().next().is_some() {
            man.render_options_section(&mut text)?;
        }
        let name = sub.get_bin_name().unwrap_or(sub.get_name()).to_uppercase();
        page.push_str(&format!(".SH \"{name}\"\n"));
        page.push_str(&String::from_utf8_lossy(&text).replace(".SH ", ".SS "));
        sections(sub, page)?;
    }
    Ok(())
}

/// Writes a program's completions for a shell.
pub fn completions(mut command: Command, shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    quietly(out.write_all(&text))
}

/// Whoever closes the pipe early has read enough.
fn quietly(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;

    #[test]
    fn every_subcommand_has_its_section_with_its_options() {
        let deep = Command::new("create").about("Create one").arg(Arg::new("ttl").long("ttl"));
        let command = Command::new("a-b").subcommand(Command::new("token").about("Tokens").subcommand(deep));
        let mut page = Vec::new();
        man(command.clone(), &mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        assert!(page.contains(".SH \"A-B TOKEN CREATE\"") && page.contains("\\-\\-ttl"), "{page}");
        assert!(page.contains("a\\-b token") && !page.contains("token(1)"), "{page}");
        let mut script = Vec::new();
        completions(command, Shell::Bash, &mut script).unwrap();
        assert!(String::from_utf8(script).unwrap().contains("--ttl"));
    }
}
