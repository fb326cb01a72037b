//! The three ports, and the start and end of a collector.
//!
//! Before a client has shown a certificate it costs a socket, one of `handshakes-max` places and at most
//! `handshake-timeout`. When all places are taken, the one that has had its place longest is cut off: a client that
//! means it has shaken hands long before, so those who only hold places cannot keep it out. Shutdown lets pushes and commits that have begun finish, tells every agent to come back, and takes
//! [`SHUTDOWN_MAX`] at most; what it then interrupts is as safe as after a kill.

use crate::shared::{Shared, now_ms};
use crate::{CollectorError, Config, authority, authority::OwnCert, management, metrics::Metrics, session};
use highwater_vault::{Vault, VaultKey, local_store};
use highwater_wire::{WireError, identity, tls};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// How long a shutdown waits for what has begun.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(15);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const REVOKED_EVERY: Duration = Duration::from_secs(30);
/// Connections at once to the metrics port.
const SCRAPES_MAX: usize = 8;

/// Starts collectors.
pub struct Collector;

/// A collector that runs.
pub struct Running {
    /// Where agents connect.
    pub ingest: SocketAddr,
    /// Where machines enrol.
    pub management: SocketAddr,
    /// Where metrics are read.
    pub metrics: SocketAddr,
    /// What its sessions share.
    pub shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

impl Collector {
    /// Opens the vault, listens, and answers when all ports are ready.
    pub async fn start(config: Config) -> Result<Running, CollectorError> {
        let key = VaultKey::load(&config.key_file)?;
        let vault = Vault::open(local_store(&config.vault)?, &key).await?;
        Self::start_with(config, vault).await
    }

    /// [`Collector::start`] with an open vault.
    pub async fn start_with(config: Config, vault: Vault) -> Result<Running, CollectorError> {
        let authority = authority::load(&vault).await?;
        let metrics = Metrics::default();
        for machine in vault.machines().await? {
            match vault.machine(machine).await {
                Ok(state) => {
                    if let Some(point) = state.points.last() {
                        metrics.last_point(machine, point.info.taken_at_ms);
                    }
                }
                // One damaged machine must not keep the others from being protected.
                Err(error) => {
                    tracing::error!(%machine, code = error.code(), %error, "cannot read a machine's state")
                }
            }
        }
        let cert = Arc::new(OwnCert::issue(&authority, &config.names)?);
        let shared = Arc::new(Shared::new(config, vault, authority, metrics));
        shared.refresh_revoked().await?;
        let ingest_tls = tls::ingest_server(shared.authority.cert(), cert.clone())?;
        let management_tls = tls::management_server(cert.clone())?;
        let (ingest_at, ingest) = listen(shared.config.listen).await?;
        let (management_at, management) = listen(shared.config.management_listen).await?;
        let (metrics_at, metrics) = listen(shared.config.metrics_listen).await?;
        let handshakes = shared.config.handshakes_max;
        let sessions = Arc::new(Semaphore::new(shared.config.sessions_max));
        let api = Arc::new(management::Api::new(shared.clone(), ingest_at.port()));
        let acceptor = TlsAcceptor::from(Arc::new(ingest_tls));
        let api_acceptor = TlsAcceptor::from(Arc::new(management_tls));
        let tasks = vec![
            tokio::spawn(accept(shared.clone(), ingest, handshakes, {
                let shared = shared.clone();
                move |stream, peer, place| {
                    connection(shared.clone(), acceptor.clone(), sessions.clone(), stream, peer, place)
                }
            })),
            tokio::spawn(accept(shared.clone(), management, handshakes, move |stream, _, place| {
                management::connection(api.clone(), api_acceptor.clone(), stream, place)
            })),
            tokio::spawn(accept(shared.clone(), metrics, SCRAPES_MAX, {
                let shared = shared.clone();
                move |stream, _, place| management::metrics_connection(shared.clone(), stream, place)
            })),
            tokio::spawn(upkeep(shared.clone(), cert)),
        ];
        tracing::info!(ingest = %ingest_at, management = %management_at, metrics = %metrics_at, "ready");
        Ok(Running { ingest: ingest_at, management: management_at, metrics: metrics_at, shared, tasks })
    }
}

impl Running {
    /// Ends everything in an orderly way.
    pub async fn shutdown(self) {
        self.shared.shutdown.cancel();
        for task in self.tasks {
            if let Err(error) = task.await
                && error.is_panic()
            {
                tracing::error!(%error, "a part of the collector had failed");
            }
        }
    }

    /// Whether one of its parts has ended, which only a defect can cause.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.tasks.iter().any(JoinHandle::is_finished)
    }
}

async fn listen(address: SocketAddr) -> Result<(SocketAddr, TcpListener), CollectorError> {
    let failed = |source| CollectorError::Listen { address: address.to_string(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    Ok((listener.local_addr().map_err(failed)?, listener))
}

/// Accepts until shutdown, with at most `places` connections that hold their place; a newcomer beyond that takes the place
/// of the oldest.
async fn accept<F, Fut>(shared: Arc<Shared>, listener: TcpListener, places: usize, handle: F)
where
    F: Fn(TcpStream, SocketAddr, Arc<Place>) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut held = Held { places: Arc::new(Semaphore::new(places)), holders: VecDeque::new() };
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            () = shared.shutdown.cancelled() => break,
            Some(ended) = running.join_next(), if !running.is_empty() => report(ended),
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Small messages wait for answers.
                    let _ = stream.set_nodelay(true);
                    let place = held.take().await;
                    running.spawn(handle(stream, peer, place));
                }
                Err(error) => {
                    // Out of descriptors, mostly: wait for some to be closed.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    let ended = timeout(SHUTDOWN_MAX, async {
        while let Some(ended) = running.join_next().await {
            report(ended);
        }
    });
    if ended.await.is_err() {
        tracing::warn!(connections = running.len(), "connections do not end; they are cut");
        running.shutdown().await;
    }
}

/// A place among those who have not shown who they are. Given back when dropped.
pub struct Place {
    /// Cancelled when a newcomer is to have it.
    pub evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

/// The places of a port, and who holds them, oldest first.
struct Held {
    places: Arc<Semaphore>,
    holders: VecDeque<Weak<Place>>,
}

impl Held {
    async fn take(&mut self) -> Arc<Place> {
        self.holders.retain(|place| place.strong_count() > 0);
        if self.places.available_permits() == 0
            && let Some(oldest) = self.holders.pop_front().and_then(|place| place.upgrade())
        {
            oldest.evicted.cancel();
        }
        let permit = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let place = Arc::new(Place { evicted: CancellationToken::new(), _permit: permit });
        self.holders.push_back(Arc::downgrade(&place));
        place
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection failed by a defect of the collector");
    }
}

async fn connection(
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
    sessions: Arc<Semaphore>,
    stream: TcpStream,
    peer: SocketAddr,
    place: Arc<Place>,
) {
    let limit = shared.config.handshake_timeout;
    let handshake = async {
        let stream = timeout(limit, acceptor.accept(stream))
            .await
            .map_err(|_| WireError::TimedOut { what: "shaking hands", after: limit })?
            .map_err(tls::io_error)?;
        let revoked = shared.revoked.read().unwrap_or_else(PoisonError::into_inner).clone();
        let machine = tls::authenticate(stream.get_ref().1, &revoked)?;
        Ok::<_, WireError>((machine, stream))
    };
    let (machine, stream) = tokio::select! {
        () = shared.shutdown.cancelled() => return,
        () = place.evicted.cancelled() => {
            let error = CollectorError::Full("too many clients shake hands at once");
            shared.metrics.refused(error.code());
            return;
        }
        done = handshake => match done {
            Ok(done) => done,
            Err(error) => {
                shared.metrics.refused(error.code());
                tracing::info!(%peer, code = error.code(), %error, "a client was turned away");
                return;
            }
        }
    };
    drop(place);
    let Ok(_session) = sessions.try_acquire_owned() else {
        session::refuse(&shared, stream, &CollectorError::Full("no more sessions")).await;
        return;
    };
    match session::run(&shared, machine, stream).await {
        Ok(()) => tracing::info!(%machine, %peer, "session ended"),
        // Machines come and go: the RPO's age tells whether one stays away for too long.
        Err(error) if matches!(error.code(), 1101..=1104) => {
            tracing::info!(%machine, %peer, code = error.code(), %error, "session broken off");
        }
        Err(error) => {
            tracing::warn!(%machine, %peer, code = error.code(), action = error.action(), %error, "session ended");
        }
    }
}

/// What happens now and then: revocations are read again, the own certificate is renewed.
async fn upkeep(shared: Arc<Shared>, cert: Arc<OwnCert>) {
    let third = identity::SERVER_VALIDITY / 3;
    let mut issued_ms = now_ms();
    loop {
        tokio::select! {
            () = shared.shutdown.cancelled() => return,
            () = tokio::time::sleep(REVOKED_EVERY) => {}
        }
        if let Err(error) = shared.refresh_revoked().await {
            tracing::error!(code = error.code(), %error, "cannot read revocations; the last known ones hold");
        }
        if now_ms().saturating_sub(issued_ms) >= u64::try_from(third.as_millis()).unwrap_or(u64::MAX) {
            match cert.renew(&shared.authority, &shared.config.names) {
                Ok(()) => issued_ms = now_ms(),
                Err(error) => {
                    tracing::error!(code = error.code(), %error, "cannot renew the own certificate")
                }
            }
        }
    }
}
