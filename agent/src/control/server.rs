//! The answering side.

use super::{ControlError, Desk, REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, Response, SOCKET_NAME, refused};
use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

/// Conversations at once: many operators may wait for a recovery point, and others still ask how things stand.
const CONNECTIONS_MAX: usize = 64;
/// A client that says nothing for so long is hung up on.
const IDLE: Duration = Duration::from_secs(30);

/// Whether an agent listens there.
#[must_use]
pub fn is_served(run_dir: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(run_dir.join(SOCKET_NAME)).is_ok()
}

/// Takes the socket in the run directory (made if it is not there, 0700). A socket left by a killed agent is replaced.
///
/// # Errors
/// Another agent answers there, or the socket cannot be made.
pub fn bind(run_dir: &Path) -> Result<UnixListener, ControlError> {
    let path = run_dir.join(SOCKET_NAME);
    if is_served(run_dir) {
        return Err(ControlError::AlreadyRunning { path });
    }
    listen(run_dir).map_err(|source| ControlError::Listen { path, source })
}

fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    if !run_dir.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir)?;
    }
    // Made under another name, so that nobody ever meets it with wider permissions.
    let (new, path) = (run_dir.join("control.sock.new"), run_dir.join(SOCKET_NAME));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, &path)?;
    Ok(listener)
}

/// Serves until the engine is gone. Cancelling it ends all conversations.
pub async fn serve(listener: UnixListener, desk: Desk) {
    let desk = Arc::new(desk);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut conversations = tokio::task::JoinSet::new();
    loop {
        while conversations.try_join_next().is_some() {}
        let place = tokio::select! {
            () = desk.closed() => return,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { return };
        let stream = tokio::select! {
            () = desk.closed() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors, or the client left: try again, but not in a spin.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let desk = Arc::clone(&desk);
        conversations.spawn(async move {
            // Its errors are the client's: it hung up, or said nothing.
            let _ = converse(stream, &desk).await;
            drop(place);
        });
    }
}

async fn converse(mut stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let user = stream.peer_cred()?.uid();
    if user != 0 && user != nix::unistd::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (reading, mut writing) = stream.split();
    let mut reading = BufReader::new(reading);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut reading).take(REQUEST_BYTES_MAX as u64 + 1);
        if timeout(IDLE, bounded.read_until(b'\n', &mut line)).await?? == 0 {
            return Ok(());
        }
        let complete = line.last() == Some(&b'\n');
        let response =
            if complete { answer(&line, desk).await } else { refused("the request is too long or cut off") };
        let mut text = serde_json::to_vec(&response)?;
        if text.len() >= RESPONSE_BYTES_MAX {
            text = serde_json::to_vec(&refused("the response is too long"))?;
        }
        text.push(b'\n');
        timeout(IDLE, writing.write_all(&text)).await??;
        if !complete {
            return Ok(());
        }
    }
}

async fn answer(line: &[u8], desk: &Desk) -> Response {
    match serde_json::from_slice(line) {
        Ok(request) => desk.answer(request).await,
        Err(error) => refused(&format!("the request is not understood: {error}")),
    }
}
