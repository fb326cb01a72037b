//! The asking side.

use super::{ControlError, RESPONSE_BYTES_MAX, Request, Response, SOCKET_NAME};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Asks the agent whose run directory this is. Blocks for `patience` at most in each step.
///
/// # Errors
/// It is not running, or does not answer. What it refuses is [`Response::Error`].
pub fn call(run_dir: &Path, request: &Request, patience: Duration) -> Result<Response, ControlError> {
    let path = run_dir.join(SOCKET_NAME);
    let stream = UnixStream::connect(&path).map_err(|source| ControlError::NotRunning { path, source })?;
    let line = exchange(stream, request, patience).map_err(ControlError::Broken)?;
    serde_json::from_slice(&line).map_err(|error| ControlError::Garbled(error.to_string()))
}

fn exchange(mut stream: UnixStream, request: &Request, patience: Duration) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(RESPONSE_BYTES_MAX as u64)).read_until(b'\n', &mut answer)?;
    if answer.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}
