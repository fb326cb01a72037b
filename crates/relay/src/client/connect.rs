//! Connections: some are kept for the next request.

use super::Address;
use crate::RelayError;
use bytes::Bytes;
use highwater_wire::{RelayIdentity, WireError, certificate, tls};
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// At once; less than a server has for one relay, since a collector and a command may come together.
const CONNECTIONS_MAX: usize = 48;
/// A request waits for one so long.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// To connect, and to shake hands.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// One that was not used for so long is not used again: the other side closes it soon.
const IDLE_MAX: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Connections {
    address: Address,
    places: Arc<Semaphore>,
    kept: Arc<Mutex<Vec<(Instant, Sender)>>>,
}

type Sender = SendRequest<Full<Bytes>>;

/// One in use. Dropped, it is closed, unless it was given back.
pub(super) struct Connection {
    sender: Sender,
    kept: Arc<Mutex<Vec<(Instant, Sender)>>>,
    _place: OwnedSemaphorePermit,
}

impl Connections {
    pub(super) fn new(address: Address) -> Self {
        Self { address, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)), kept: Arc::default() }
    }

    /// One that is kept, if `reuse` says so and there is one; or a new one.
    pub(super) async fn take(&self, reuse: bool) -> Result<Connection, RelayError> {
        let place = timeout(WAIT_MAX, Arc::clone(&self.places).acquire_owned()).await;
        let place = place.ok().and_then(Result::ok).ok_or(RelayError::Busy("no connection to be had"))?;
        let kept = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|(since, sender)| reuse && since.elapsed() < IDLE_MAX && !sender.is_closed());
            kept.pop()
        };
        let mut sender = match kept {
            Some((_, sender)) => sender,
            None => self.connect().await?,
        };
        sender.ready().await.map_err(broken)?;
        Ok(Connection { sender, kept: self.kept.clone(), _place: place })
    }

    async fn connect(&self) -> Result<Sender, RelayError> {
        let Address { host, port, identity } = &self.address;
        let timed_out = |what| WireError::TimedOut { what, after: CONNECT_MAX };
        let identity = RelayIdentity::load(identity)?;
        let config = tls::relay_client(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key())?;
        let name = ServerName::try_from(host.clone())
            .map_err(|_| WireError::Address(host.clone(), "it is neither a host name nor an address"))?;
        let stream = timeout(CONNECT_MAX, TcpStream::connect((host.as_str(), *port)))
            .await
            .map_err(|_| timed_out("connecting"))?
            .map_err(WireError::Io)?;
        stream.set_nodelay(true).map_err(WireError::Io)?;
        let stream = timeout(CONNECT_MAX, TlsConnector::from(Arc::new(config)).connect(name, stream))
            .await
            .map_err(|_| timed_out("shaking hands"))?
            .map_err(tls::io_error)?;
        let session = stream.get_ref().1;
        if session.alpn_protocol() != Some(tls::ALPN_STORE) {
            return Err(WireError::Handshake("the server does not speak highwater-store/1".to_owned()).into());
        }
        if !session.peer_certificates().and_then(<[_]>::first).is_some_and(certificate::is_collector_cert) {
            return Err(WireError::Handshake("the server's certificate is no collector's".to_owned()).into());
        }
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Ends with its sender.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }
}

impl Connection {
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, RelayError> {
        self.sender.send_request(request).await.map_err(broken)
    }

    /// Its answer was read to the end.
    pub(super) fn give_back(self) {
        if !self.sender.is_closed() {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push((Instant::now(), self.sender));
        }
    }
}

pub(super) fn broken(error: hyper::Error) -> RelayError {
    RelayError::Wire(WireError::Io(std::io::Error::other(error)))
}
