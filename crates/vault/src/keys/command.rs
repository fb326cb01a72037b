//! An external command that wraps and unwraps a key: how a key management service, or a hardware module, is used.
//!
//! The command is a program with arguments, run without a shell; one more argument says what it is to do:
//!
//! - `wrap`: it reads a key (64 hexadecimal digits) and writes what it makes of it: any bytes, which are kept as they are;
//! - `unwrap`: it reads such bytes and writes the key (64 hexadecimal digits; white space around them does not matter).
//!
//! It must end with status 0 within [`TIME_MAX`], having written at most [`BLOB_BYTES_MAX`]; else it is killed, with everything it
//! started. It has a process group of its own and no terminal. What it says on standard error becomes part of the error.

use super::file::{parse_hex, to_hex};
use crate::{Result, VaultError, key::Secret};
use serde::{Deserialize, Serialize};
use std::{os::unix::fs::PermissionsExt, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};
use zeroize::Zeroizing;

/// A command that takes longer hangs.
const TIME_MAX: Duration = Duration::from_secs(60);
/// Most bytes that it may make of a key: services answer with some hundred.
pub(crate) const BLOB_BYTES_MAX: usize = 8192;
const COMPLAINT_BYTES_MAX: usize = 500;

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct KeyCommand(Vec<String>);

impl TryFrom<Vec<String>> for KeyCommand {
    type Error = String;

    fn try_from(argv: Vec<String>) -> Result<Self, String> {
        match argv.first() {
            None => Err("it names no program".to_owned()),
            // Whoever could change the search path, or the working directory, would be handed the key.
            Some(program) if !program.starts_with('/') => {
                Err(format!("{program:?} is no absolute path of a program"))
            }
            Some(_) if argv.iter().any(|arg| arg.contains('\0')) => Err("it contains a zero byte".to_owned()),
            Some(_) => Ok(Self(argv)),
        }
    }
}

impl From<KeyCommand> for Vec<String> {
    fn from(command: KeyCommand) -> Self {
        command.0
    }
}

/// Split at white space; an argument with white space in it needs a script.
impl std::str::FromStr for KeyCommand {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::try_from(text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }
}

impl KeyCommand {
    /// The program.
    #[must_use]
    pub fn program(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    /// Whether there is such a program.
    pub(super) fn check(&self) -> Result<()> {
        let failed = |cause: String| VaultError::KeyCommand { command: self.program().to_owned(), cause };
        let meta = std::fs::metadata(self.program()).map_err(|e| failed(e.to_string()))?;
        match meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
            true => Ok(()),
            false => Err(failed("it is no program".to_owned())),
        }
    }

    /// What it makes of a key.
    pub(super) async fn wrap(&self, key: &Secret) -> Result<Vec<u8>> {
        let blob = self.run("wrap", to_hex(&key.0).as_bytes()).await?;
        if blob.is_empty() {
            return Err(self.failed("wrap", "it wrote nothing"));
        }
        Ok(blob.to_vec())
    }

    /// The key that it made this of.
    pub(super) async fn unwrap(&self, blob: &[u8]) -> Result<Secret> {
        let text = self.run("unwrap", blob).await?;
        let digits = std::str::from_utf8(&text).ok().map(str::trim);
        let key = digits.and_then(parse_hex);
        key.map(Secret).ok_or_else(|| self.failed("unwrap", "it did not answer with 64 hexadecimal digits"))
    }

    fn failed(&self, what: &str, cause: impl std::fmt::Display) -> VaultError {
        VaultError::KeyCommand { command: format!("{} … {what}", self.program()), cause: cause.to_string() }
    }

    async fn run(&self, what: &str, input: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let failed = |cause: &dyn std::fmt::Display| self.failed(what, cause);
        let mut group = Group::start(&self.0, what).map_err(|e| failed(&e))?;
        let pipes = (group.0.stdin.take(), group.0.stdout.take(), group.0.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(failed(&"it has no pipes"));
        };
        let conversation = async {
            let told = async {
                // One that does not read all of it may still know the answer.
                let _ = stdin.write_all(input).await;
                drop(stdin);
                Ok(())
            };
            let answered = async { limited(stdout).await.map_err(|e| failed(&e)) };
            let complained = async { Ok(beginning(stderr).await) };
            // One that writes without end is not waited for.
            let ((), answer, complaint) = tokio::try_join!(told, answered, complained)?;
            let status = group.0.wait().await.map_err(|e| failed(&e))?;
            if !status.success() {
                return Err(failed(&format!("{status}{}", plain(&complaint))));
            }
            Ok(answer)
        };
        let outcome = tokio::time::timeout(TIME_MAX, conversation).await;
        outcome.unwrap_or_else(|_| Err(failed(&format!("it did not end within {} s", TIME_MAX.as_secs()))))
    }
}

/// Reads an answer to its end, unless it is too long.
async fn limited(pipe: impl AsyncRead + Unpin) -> std::io::Result<Zeroizing<Vec<u8>>> {
    // As large as it may become: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(BLOB_BYTES_MAX + 1));
    pipe.take(BLOB_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).await?;
    if bytes.len() > BLOB_BYTES_MAX {
        return Err(std::io::Error::other(format!("it wrote more than {BLOB_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// Reads to the end, and keeps the beginning.
async fn beginning(mut pipe: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut part = [0; COMPLAINT_BYTES_MAX];
    while let Ok(read @ 1..) = pipe.read(&mut part).await {
        kept.extend_from_slice(&part[..read.min(COMPLAINT_BYTES_MAX - kept.len())]);
    }
    kept
}

/// What a program said, on one line, behind what it ended with.
fn plain(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let words: Vec<&str> = text.split_whitespace().collect();
    let line: String = words.join(" ").chars().filter(|c| !c.is_control()).collect();
    if line.is_empty() { line } else { format!(": {line}") }
}

/// A program in a process group of its own, all of which ends with this.
struct Group(Child);

impl Group {
    fn start(argv: &[String], what: &str) -> std::io::Result<Self> {
        let [program, args @ ..] = argv else { return Err(std::io::ErrorKind::InvalidInput.into()) };
        let mut command = Command::new(program);
        command.args(args).arg(what).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map(Self)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // None once it was waited for: its number may be another's by now.
        if let Some(id) = self.0.id().and_then(|id| libc::pid_t::try_from(id).ok()) {
            // SAFETY: a signal to the group of a child that was not waited for, so the number is still its own.
            unsafe { libc::kill(-id, libc::SIGKILL) };
        }
    }
}
