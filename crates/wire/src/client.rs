//! The agent's end of a session.

use crate::message::{AgentMessage, CollectorMessage, Hello, Welcome};
use crate::papers::Papers;
use crate::session::{Frame, FrameReader, FrameWriter, Timeouts};
use crate::{Credential, Version, WireError, certificate, codec, identity, tls};
use highwater_delta::{DeltaId, MachineId};
use rustls_pki_types::ServerName;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

pub use crate::papers::IDENTITY_FILE;

const CONNECT_MAX: Duration = Duration::from_secs(15);
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);
const WELCOME_MAX: Duration = Duration::from_secs(30);

/// Who an agent is.
pub struct Identity {
    /// The machine that the certificate names.
    pub machine: MachineId,
    pub(crate) papers: Papers,
}

impl std::ops::Deref for Identity {
    type Target = Papers;
    fn deref(&self) -> &Papers {
        &self.papers
    }
}

impl Identity {
    /// From its parts.
    pub fn from_pems(key_pem: &str, cert_pem: &str, ca_pem: &str) -> Result<Self, WireError> {
        Self::of(Papers::from_pems(key_pem, cert_pem, ca_pem)?)
    }

    fn of(papers: Papers) -> Result<Self, WireError> {
        Ok(Self { machine: identity::machine_from_cert(papers.cert()?)?, papers })
    }

    /// Reads it from its directory.
    pub fn load(dir: &Path) -> Result<Self, WireError> {
        Self::of(Papers::load(dir)?)
    }

    /// What the certificate says.
    pub fn credential(&self) -> Result<Credential, WireError> {
        Credential::of(self.cert()?)
    }

    /// This machine with a renewed certificate, which must be valid now, of the same authority and machine, and belong to
    /// this key.
    pub fn renewed(&self, key_pem: &str, cert_pem: &str) -> Result<Self, WireError> {
        let new = Self::of(self.papers.renewed(key_pem, cert_pem)?)?;
        if new.machine != self.machine {
            return Err(WireError::identity("the renewed certificate", "it names another machine"));
        }
        Ok(new)
    }

    /// Writes it in place of `old`: see `Papers::replace`.
    pub fn replace(&self, dir: &Path, old: &Self) -> Result<bool, WireError> {
        self.papers.replace(dir, &old.papers)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("machine", &self.machine).finish_non_exhaustive()
    }
}

type Output = Box<dyn AsyncWrite + Send + Unpin>;
type Input = Box<dyn AsyncRead + Send + Unpin>;

/// Sends an agent's messages. Not cancellation-safe: see [`FrameWriter`].
pub struct SessionSender {
    frames: FrameWriter<Output>,
}

impl SessionSender {
    /// Over any stream; for tests with a peer of their own.
    pub fn over(output: impl AsyncWrite + Send + Unpin + 'static, timeouts: Timeouts) -> Self {
        Self { frames: FrameWriter::new(Box::new(output), timeouts) }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &AgentMessage) -> Result<(), WireError> {
        self.frames.control(&codec::encode(message)?).await
    }

    /// Sends an encoded chunk of the open delta. Keep within the window: [`crate::SendWindow`].
    pub async fn send_chunk(&mut self, delta: DeltaId, chunk: &[u8]) -> Result<(), WireError> {
        self.frames.chunk(delta, chunk).await
    }

    /// Waits until the network has everything. Call before waiting for an answer.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        self.frames.flush().await
    }

    /// Says goodbye and closes this direction.
    pub async fn close(mut self) -> Result<(), WireError> {
        self.send(&AgentMessage::Goodbye).await?;
        self.frames.shutdown().await
    }
}

/// Receives a collector's messages. Cancellation-safe.
///
/// Must be polled while chunks are being sent: a collector whose acknowledgements are not taken stops reading.
pub struct SessionReceiver {
    frames: FrameReader<Input>,
}

impl SessionReceiver {
    /// Over any stream; for tests with a peer of their own.
    pub fn over(input: impl AsyncRead + Send + Unpin + 'static, timeouts: Timeouts) -> Self {
        Self { frames: FrameReader::new(Box::new(input), timeouts) }
    }

    /// Other limits from the next message on.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.frames.set_timeouts(timeouts);
    }

    /// The next message; [`WireError::Closed`] at the end. A fatal refusal is answered as a message, the end follows.
    pub async fn recv(&mut self) -> Result<CollectorMessage, WireError> {
        let frame = match self.frames.next().await {
            // Without TLS's own goodbye: the collector was killed, or something between the two hung up.
            Err(WireError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => None,
            other => other?,
        };
        match frame {
            None => Err(WireError::Closed),
            Some(Frame::Control(body)) => codec::decode(&body),
            Some(Frame::Chunk { .. }) => Err(WireError::Unexpected("a collector sends no chunks")),
        }
    }
}

/// Connects to `addr` (`host:port`), whose certificate must be of the identity's authority and name `server_name`, and
/// greets.
pub async fn connect(
    addr: &str,
    server_name: &str,
    identity: &Identity,
    hello: Hello,
) -> Result<(Welcome, SessionSender, SessionReceiver), WireError> {
    connect_with(addr, server_name, identity, hello, Timeouts::default()).await
}

/// [`connect`] with limits of one's own.
pub async fn connect_with(
    addr: &str,
    server_name: &str,
    identity: &Identity,
    hello: Hello,
    timeouts: Timeouts,
) -> Result<(Welcome, SessionSender, SessionReceiver), WireError> {
    let name = ServerName::try_from(server_name.to_owned()).map_err(|_| {
        WireError::Address(server_name.to_owned(), "it is neither a host name nor an address")
    })?;
    let config = tls::agent_client(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key())?;
    let stream = timeout(CONNECT_MAX, TcpStream::connect(addr))
        .await
        .map_err(|_| WireError::TimedOut { what: "connecting", after: CONNECT_MAX })??;
    stream.set_nodelay(true)?;
    let stream = timeout(HANDSHAKE_MAX, TlsConnector::from(Arc::new(config)).connect(name, stream))
        .await
        .map_err(|_| WireError::TimedOut { what: "shaking hands", after: HANDSHAKE_MAX })?
        .map_err(tls::io_error)?;
    let connection = stream.get_ref().1;
    if connection.alpn_protocol() != Some(tls::ALPN) {
        return Err(WireError::Handshake("the server does not speak highwater/1".to_owned()));
    }
    if !connection.peer_certificates().and_then(<[_]>::first).is_some_and(certificate::is_collector_cert) {
        return Err(WireError::Handshake("the server's certificate is no collector's".to_owned()));
    }
    let (input, output) = tokio::io::split(stream);
    greet(SessionSender::over(output, timeouts), SessionReceiver::over(input, timeouts), hello).await
}

/// Sends the hello and waits for the welcome.
pub async fn greet(
    mut sender: SessionSender,
    mut receiver: SessionReceiver,
    hello: Hello,
) -> Result<(Welcome, SessionSender, SessionReceiver), WireError> {
    let (min, max) = (hello.version_min, hello.version_max);
    let greeting = async {
        let sent = match sender.send(&AgentMessage::Hello(hello)).await {
            Ok(()) => sender.flush().await,
            failed => failed,
        };
        // A server that turns a client away says so in an alert, which the failed write does not show.
        match (receiver.recv().await, sent) {
            (Ok(message), _) => Ok(message),
            (Err(WireError::Io(error)), Ok(())) => Err(tls::io_error(error)),
            (Err(WireError::Io(received)), Err(sent)) => match tls::io_error(received) {
                told @ WireError::Handshake(_) => Err(told),
                _ => Err(sent),
            },
            (Err(error), _) => Err(error),
        }
    };
    let answer = timeout(WELCOME_MAX, greeting)
        .await
        .map_err(|_| WireError::TimedOut { what: "waiting for the welcome", after: WELCOME_MAX })??;
    match answer {
        CollectorMessage::Welcome(welcome) => {
            if Version::from_number(welcome.version).is_none() || !(min..=max).contains(&welcome.version) {
                return Err(WireError::Unexpected("a welcome in a version that was not offered"));
            }
            Ok((welcome, sender, receiver))
        }
        CollectorMessage::Refused(refusal) => Err(WireError::Refused(refusal)),
        _ => Err(WireError::Unexpected("the first answer is no welcome")),
    }
}
