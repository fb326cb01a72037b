//! A database's own command line as a client: statements go in, and it answers when they have been carried out.

use crate::census::ENVIRONMENT;
use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// What [`gapless`] reads of the records of each client.
pub const COUNTED: &str = "client, count(*), min(number), max(number), count(DISTINCT number)";

/// A row of [`COUNTED`]: which client, and how many records, which must be the first ones without a gap.
pub fn gapless(row: &str, separator: char) -> Result<(usize, u64)> {
    let numbers: Vec<u64> = row.split(separator).map(str::parse).collect::<Result<_, _>>()?;
    let [client, count, least, most, distinct] = numbers[..] else { bail!("a row of {row:?}") };
    ensure!(least == 1 && most == count && distinct == count, "client {client} has a gap: {row}");
    Ok((usize::try_from(client)?, count))
}

/// A client that runs. Dropped: killed.
pub struct Session {
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
    statements: u64,
}

impl Session {
    /// Starts the client. It must end at the first error, and write nothing but what is selected.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).env(ENVIRONMENT, "1");
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let say = child.stdin.take().context("its input")?;
        let hear = BufReader::new(child.stdout.take().context("its output")?);
        Ok(Self { child, say, hear, statements: 0 })
    }

    /// Has statements carried out that select nothing; they are committed on return.
    pub fn carry_out(&mut self, statements: &str) -> Result<()> {
        // The client takes one statement after the other: this one's answer tells that those before it are done.
        self.statements += 1;
        let done = format!("done {}", self.statements);
        writeln!(self.say, "{statements}\nSELECT '{done}';")?;
        self.say.flush()?;
        let mut heard = String::new();
        self.hear.read_line(&mut heard)?;
        ensure!(heard.trim_end() == done, "the client said {heard:?} to: {statements}");
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
