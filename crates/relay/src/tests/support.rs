use crate::{
    Client, RelayError,
    client::Address,
    server::{Gate, Meter, Relays},
};
use async_trait::async_trait;
use highwater_delta::RelayId;
use highwater_wire::{
    RelayCredential, RelayIdentity,
    identity::{Authority, Csr, RelayGrant, load_chain},
    tls,
};
use object_store::{ObjectStore, memory::InMemory};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
};

pub(super) const MEMORY: u64 = 4 << 20;

/// What a test may do to a site while it runs.
#[derive(Default)]
pub(super) struct Faults {
    /// Bytes of answers that still go out before the connection is cut, once; negative: all.
    pub(super) cut_after: AtomicI64,
    pub(super) revoked: AtomicBool,
    pub(super) requests: AtomicU64,
    pub(super) refused: Mutex<Vec<u16>>,
}

pub(super) struct Site {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) relays: Arc<Relays>,
    pub(super) authority: Arc<Authority>,
    pub(super) address: SocketAddr,
    pub(super) faults: Arc<Faults>,
    pub(super) dir: tempfile::TempDir,
}

impl Meter for Faults {
    fn request(&self, _kind: &'static str) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
    fn received(&self, _bytes: u64) {}
    fn sent(&self, _bytes: u64) {}
    fn refused(&self, _relay: RelayId, error: &RelayError) {
        self.refused.lock().unwrap().push(error.code());
    }
}

struct Door {
    authority: Arc<Authority>,
    faults: Arc<Faults>,
    relay: RelayId,
}

#[async_trait]
impl Gate for Door {
    fn admits(&self) -> Result<(), RelayError> {
        match self.faults.revoked.load(Ordering::Relaxed) {
            true => Err(highwater_wire::WireError::RelayRevoked(self.relay).into()),
            false => Ok(()),
        }
    }
    async fn renew(&self, csr_pem: &str) -> Result<String, RelayError> {
        Ok(self.authority.certify_relay(csr_pem, grant(self.relay, Duration::from_secs(7200)))?)
    }
}

pub(super) fn grant(relay: RelayId, validity: Duration) -> RelayGrant {
    RelayGrant { relay, generation: 0, validity }
}

pub(super) fn door(site_faults: &Arc<Faults>, authority: &Arc<Authority>, relay: RelayId) -> Arc<dyn Gate> {
    Arc::new(Door { authority: authority.clone(), faults: site_faults.clone(), relay })
}

impl Site {
    pub(super) async fn new() -> Self {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let faults = Arc::new(Faults { cut_after: AtomicI64::new(-1), ..Faults::default() });
        let relays = Arc::new(Relays::new(store.clone(), MEMORY, faults.clone()));
        let authority = Arc::new(Authority::create("a").unwrap());
        let issued = authority.issue_server(&["127.0.0.1".to_owned()]).unwrap();
        let (chain, key) = load_chain(&issued.chain_pem, &issued.key_pem).unwrap();
        let cert = tls::fixed_cert(chain, key).unwrap();
        let resolver = rustls::sign::SingleCertAndKey::from(Arc::unwrap_or_clone(cert));
        let config = tls::ingest_server(authority.cert(), Arc::new(resolver)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let (served, served_by, of_gate) = (relays.clone(), faults.clone(), authority.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, relays, faults) = (acceptor.clone(), served.clone(), served_by.clone());
                let authority = of_gate.clone();
                tokio::spawn(async move {
                    let stream = Cut { stream, faults: faults.clone(), dead: false };
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let Ok(credential) = tls::authenticate_relay(stream.get_ref().1, &Default::default())
                    else {
                        return;
                    };
                    let RelayCredential { relay, .. } = credential;
                    let gate = door(&faults, &authority, relay);
                    let _ = relays.serve(relay, stream, gate, std::future::pending()).await;
                });
            }
        });
        Self { store, relays, authority, address, faults, dir: tempfile::tempdir().unwrap() }
    }

    /// A relay that is enrolled, and its client.
    pub(super) fn relay(&self, validity: Duration) -> (RelayId, Client) {
        let relay = RelayId::new();
        let csr = Csr::create().unwrap();
        let cert = self.authority.certify_relay(&csr.csr_pem, grant(relay, validity)).unwrap();
        let identity = RelayIdentity::from_pems(&csr.key_pem, &cert, self.authority.cert_pem()).unwrap();
        let dir = self.dir.path().join(relay.to_string());
        identity.save(&dir).unwrap();
        (relay, Client::open(self.location(relay)).unwrap())
    }

    pub(super) fn location(&self, relay: RelayId) -> Address {
        let identity = self.dir.path().join(relay.to_string());
        Address { host: "127.0.0.1".to_owned(), port: self.address.port(), identity }
    }

    /// The next answer is cut after so many bytes, with its connection.
    pub(super) fn cut_after(&self, bytes: i64) {
        self.faults.cut_after.store(bytes, Ordering::Relaxed);
    }
}

/// A server's end of a connection that can be cut.
struct Cut<S> {
    stream: S,
    faults: Arc<Faults>,
    dead: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Cut<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cut<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let left = self.faults.cut_after.load(Ordering::Relaxed);
        if self.dead || left == 0 {
            if !self.dead {
                self.faults.cut_after.store(-1, Ordering::Relaxed);
                self.dead = true;
            }
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let written = Pin::new(&mut self.stream).poll_write(cx, &buf[..most]);
        if let Poll::Ready(Ok(bytes)) = written
            && left > 0
        {
            self.faults.cut_after.fetch_sub(bytes as i64, Ordering::Relaxed);
        }
        written
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
