//! The three ports, and the start and end of a collector.
//!
//! Before a client has shown a certificate it costs a socket, one of `handshakes-max` places and at most
//! `handshake-timeout`. When all places are taken, the one that has had its place longest is cut off: a client that
//! means it has shaken hands long before, so those who only hold places cannot keep it out. One that has shown a certificate is
//! one of its machine's few visits ([`crate::visits`]) until it has the machine's seat, and only then one of `sessions-max`: so a
//! machine cannot keep others out either.
//!
//! Shutdown lets pushes and commits that have begun finish, tells every agent to come back, and takes
//! [`SHUTDOWN_MAX`] at most; what it then interrupts is as safe as after a kill.

use crate::cache::Cache;
use crate::clock::now_ms;
use crate::relays::{self, Told};
use crate::shared::{REVOCATIONS_UNKNOWN_MAX, Shared};
use crate::{
    CollectorError, Config, authority, authority::OwnCert, groups, maintenance, management, memory,
    metrics::Metrics, session, verification,
};
use highwater_delta::Code;
use highwater_relay::server::Relays;
use highwater_serve::{Limits, Place, accept, serve_metrics};
use highwater_vault::{Location, Vault, remove_left_over};
use highwater_wire::{Credential, RelayCredential, WireError, identity, tls};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::Level;

/// How long a shutdown waits for what has begun.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(15);
/// How often revocations are read: a revoked machine is cut off within this time.
const REVOKED_EVERY: Duration = Duration::from_secs(2);
/// Failures of that in a row between two lines in the log.
const FAILURES_A_LINE: u32 = 5;
/// Before the authority expires, this is said once a day.
const AUTHORITY_WARNING: Duration = Duration::from_secs(730 * 86_400);
const DAY_MS: u64 = 86_400_000;
/// What is taken from a machine's connection at once: some records of TLS.
const READ_AHEAD_BYTES: usize = 64 << 10;

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
    /// May be off, so that its end says nothing.
    maintenance: JoinHandle<()>,
    verification: JoinHandle<()>,
}

impl Collector {
    /// Opens the vault, listens, and answers when all ports are ready.
    pub async fn start(config: Config) -> Result<Running, CollectorError> {
        let vault = config.open_vault().await?;
        vault.probe().await?;
        let pages = usize::try_from(memory::page_cache_bytes(config.memory)).unwrap_or(usize::MAX);
        // It reads no content: agents are told hashes.
        let vault = vault.with_page_cache(pages).with_chunk_cache(0);
        Self::start_with(config, vault).await
    }

    /// [`Collector::start`] with an open vault.
    pub async fn start_with(config: Config, vault: Vault) -> Result<Running, CollectorError> {
        let authority = authority::load(&vault).await?;
        let metrics = Metrics::default();
        let mut states = Vec::new();
        for machine in vault.machines().await? {
            match vault.machine_within(machine, memory::Memory::machine_bytes_max_of(config.memory)).await {
                Ok(state) => {
                    states.push((machine, state.memory_bytes()));
                    if let Some(point) = state.points.last() {
                        metrics.last_point(machine, point.info.taken_at_ms);
                    }
                }
                // One at a time, and none larger than a session's. One damaged machine must not keep the others from being protected.
                Err(error) => {
                    tracing::error!(%machine, code = %Code(error.code()), %error, "cannot read a machine's state")
                }
            }
        }
        let cert = Arc::new(OwnCert::issue(&authority, &config.names)?);
        let cache = config.cache.as_deref();
        let cache = cache.map(|dir| Cache::open(dir, config.cache_bytes, &metrics.cache)).transpose()?;
        let mut shared = Shared::new(config, vault, authority, metrics);
        shared.cache = cache;
        let shared = Arc::new(shared);
        for (machine, bytes) in states {
            shared.note_state(machine, bytes);
        }
        shared.refresh_revoked().await?;
        // Members hear nothing of groups until these can be read.
        if let Err(error) = groups::rosters::refresh(&shared).await {
            tracing::warn!(code = %Code(error.code()), %error, action = error.action(), "groups cannot be read; it is tried again");
        }
        let ingest_tls = tls::ingest_server(shared.authority.cert(), cert.clone())?;
        let management_tls = tls::management_server(cert.clone())?;
        let (ingest_at, ingest) = listen(shared.config.listen).await?;
        let (management_at, management) = listen(shared.config.management_listen).await?;
        let (metrics_at, metrics) = listen(shared.config.metrics_listen).await?;
        let handshakes = shared.config.handshakes_max;
        let shutdown = shared.shutdown.clone();
        let told = {
            let shared = shared.clone();
            highwater_serve::Metrics {
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                render: Arc::new(move || {
                    let pages = i64::try_from(shared.vault.page_cache_bytes()).unwrap_or(i64::MAX);
                    shared.metrics.memory.used("pages").set(pages);
                    shared.metrics.render()
                }),
            }
        };
        let relays = Arc::new(Relays::new(
            shared.vault.objects().clone(),
            shared.config.relay_memory,
            Arc::new(Told(shared.clone())),
        ));
        let api = Arc::new(management::Api::new(shared.clone(), ingest_at.port()));
        let acceptor = TlsAcceptor::from(Arc::new(ingest_tls));
        let api_acceptor = TlsAcceptor::from(Arc::new(management_tls));
        let tasks = vec![
            tokio::spawn(accept(ingest, handshakes, shutdown.clone(), SHUTDOWN_MAX, {
                let (shared, relays) = (shared.clone(), relays.clone());
                move |stream, peer, place| {
                    connection(shared.clone(), relays.clone(), acceptor.clone(), stream, peer, place)
                }
            })),
            tokio::spawn(accept(
                management,
                handshakes,
                shutdown.clone(),
                SHUTDOWN_MAX,
                move |stream, peer, place| {
                    management::connection(api.clone(), api_acceptor.clone(), stream, peer, place)
                },
            )),
            tokio::spawn(serve_metrics(metrics, told, Limits::default(), shutdown)),
            tokio::spawn(upkeep(shared.clone(), cert, relays)),
            tokio::spawn(groups::run(shared.clone())),
        ];
        let maintenance = tokio::spawn(maintenance::run(shared.clone()));
        let verification = tokio::spawn(verification::run(shared.clone()));
        tracing::info!(ingest = %ingest_at, management = %management_at, metrics = %metrics_at, "ready");
        Ok(Running {
            ingest: ingest_at,
            management: management_at,
            metrics: metrics_at,
            shared,
            tasks,
            maintenance,
            verification,
        })
    }
}

impl Running {
    /// Ends everything in an orderly way.
    pub async fn shutdown(self) {
        self.shared.shutdown.cancel();
        for task in self.tasks.into_iter().chain([self.maintenance, self.verification]) {
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

/// Who has shown a certificate.
enum Peer {
    Machine(Credential),
    Relay(RelayCredential),
}

async fn connection(
    shared: Arc<Shared>,
    relays: Arc<Relays>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    place: Arc<Place>,
) {
    let limit = shared.config.handshake_timeout;
    let handshake = async {
        // TLS reads 4 KiB at a time.
        let stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
        let stream = timeout(limit, acceptor.accept(stream))
            .await
            .map_err(|_| WireError::TimedOut { what: "shaking hands", after: limit })?
            .map_err(tls::io_error)?;
        let connection = stream.get_ref().1;
        let peer = if tls::is_relay(connection) {
            // One that is revoked is told so when it asks for something.
            tls::authenticate_relay(connection, &tls::Revoked::default()).map(Peer::Relay)
        } else {
            let revoked = shared.revoked.read().unwrap_or_else(PoisonError::into_inner);
            tls::authenticate(connection, &revoked).map(Peer::Machine)
        };
        Ok::<_, WireError>((peer, stream))
    };
    let admitted = async {
        let error = match handshake.await {
            Ok((Ok(peer), stream)) => return Some((peer, stream)),
            Ok((Err(error @ WireError::Revoked(_)), stream)) => {
                if let Some(left_out) = shared.say_of_stranger(peer) {
                    tracing::info!(%peer, code = %Code(error.code()), %error, left_out, "a revoked machine was turned away");
                }
                // It is the machine that it says, and is told why; its place is still that of a stranger.
                session::refuse(&shared, stream, &error.into()).await;
                return None;
            }
            Ok((Err(error), _)) | Err(error) => error,
        };
        shared.metrics.refused(error.code());
        if let Some(left_out) = shared.say_of_stranger(peer) {
            tracing::info!(%peer, code = %Code(error.code()), %error, left_out, "a client was turned away");
        }
        None
    };
    let (credential, stream) = tokio::select! {
        () = shared.shutdown.cancelled() => return,
        () = place.evicted.cancelled() => {
            let error = CollectorError::Full("too many clients shake hands at once");
            shared.metrics.refused(error.code());
            return;
        }
        admitted = admitted => match admitted {
            Some(admitted) => admitted,
            None => return,
        }
    };
    let credential = match credential {
        Peer::Machine(credential) => credential,
        Peer::Relay(credential) => {
            drop(place);
            relays::connection(&shared, &relays, credential, stream, peer).await;
            return;
        }
    };
    let machine = credential.machine;
    let Some(visit) = shared.visits.begin(machine) else {
        // Without a word, which would have to be waited for.
        let error = CollectorError::Full("too many connections of one machine");
        shared.metrics.refused(error.code());
        if let Some(left_out) = shared.say_of_machine(machine, Level::WARN) {
            tracing::warn!(%machine, %peer, code = %Code(error.code()), %error, left_out, "a connection was closed");
        }
        return;
    };
    drop(place);
    let ended = session::run(&shared, &credential, visit, peer.ip(), stream).await;
    // Machines come and go: the RPO's age tells whether one stays away for too long.
    let broken_off = matches!(&ended, Err(error) if matches!(error.code(), 1101..=1104));
    // Comes back with a newer certificate, or is turned away then.
    let expired = matches!(ended, Err(CollectorError::CertificateExpired));
    let level = if ended.is_ok() || broken_off || expired { Level::INFO } else { Level::WARN };
    let Some(left_out) = shared.say_of_machine(machine, level) else { return };
    match ended {
        Ok(()) => tracing::info!(%machine, %peer, left_out, "session ended"),
        Err(error) if broken_off => {
            tracing::info!(%machine, %peer, code = %Code(error.code()), %error, left_out, "session broken off");
        }
        Err(error) if expired => {
            tracing::info!(%machine, %peer, code = %Code(error.code()), %error, left_out, "session ended");
        }
        Err(error) => {
            tracing::warn!(%machine, %peer, code = %Code(error.code()), action = error.action(), %error, left_out, "session ended");
        }
    }
}

/// What happens now and then: revocations are read again, the own certificate is renewed, what nobody goes on with is thrown away.
async fn upkeep(shared: Arc<Shared>, cert: Arc<OwnCert>, relays: Arc<Relays>) {
    let third = identity::SERVER_VALIDITY / 3;
    let mut issued_ms = now_ms();
    let mut warned_ms = 0;
    let mut failures = 0;
    loop {
        if now_ms().saturating_sub(warned_ms) >= DAY_MS {
            warned_ms = now_ms();
            warn_of_authority(&shared);
            remove_interrupted(&shared);
        }
        tokio::select! {
            () = shared.shutdown.cancelled() => return,
            () = tokio::time::sleep(REVOKED_EVERY) => {}
        }
        relays.tidy();
        match shared.refresh_revoked().await {
            Ok(()) => failures = 0,
            Err(error) => {
                shared.metrics.revocations_unread();
                if failures % FAILURES_A_LINE == 0 {
                    tracing::error!(
                        code = %Code(error.code()), %error, action = error.action(),
                        "cannot read revocations; without them, all sessions are refused after {} s",
                        REVOCATIONS_UNKNOWN_MAX.as_secs()
                    );
                }
                failures += 1;
            }
        }
        if now_ms().saturating_sub(issued_ms) >= u64::try_from(third.as_millis()).unwrap_or(u64::MAX) {
            match cert.renew(&shared.authority, &shared.config.names) {
                Ok(()) => issued_ms = now_ms(),
                Err(error) => {
                    tracing::error!(code = %Code(error.code()), %error, "cannot renew the own certificate")
                }
            }
        }
    }
}

/// What interrupted uploads left in the vault's directory.
fn remove_interrupted(shared: &Shared) {
    let Location::Directory(dir) = shared.config.vault.clone() else { return };
    // Nobody waits for it, and it is done again tomorrow.
    tokio::task::spawn_blocking(move || match remove_left_over(&dir) {
        Ok(0) => {}
        Ok(files) => tracing::info!(files, "removed what interrupted uploads had left"),
        Err(error) => tracing::warn!(%error, "cannot remove what interrupted uploads have left"),
    });
}

/// Certificates that machines get now are shortened by the authority's end: somebody has to know long before.
fn warn_of_authority(shared: &Shared) {
    let left = Duration::from_millis(shared.authority.expires_ms().saturating_sub(now_ms()));
    if left < AUTHORITY_WARNING {
        let error = CollectorError::AuthorityExpires;
        tracing::warn!(
            code = %Code(error.code()),
            days_left = left.as_secs() / 86_400,
            action = error.action(),
            "the vault's certificate authority expires"
        );
    }
}
