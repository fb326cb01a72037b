//! What the sessions of a collector share.

use crate::bucket::Bucket;
use crate::cache::Cache;
use crate::clock::now_ms;
use crate::groups::{Desk, failures::Failures, rosters::Signed};
use crate::lock::locked;
use crate::log_limit::LogLimit;
use crate::memory::{Memory, Share};
use crate::per_peer::{PerPeer, Source};
use crate::state_dir::StateDir;
use crate::visits::Visits;
use crate::{CollectorError, Config, certificates, config::WINDOW_BYTES_MIN, metrics::Metrics};
use highwater_delta::{Code, DiskId, MachineId, RelayId};
use highwater_vault::Vault;
use highwater_wire::identity::Authority;
use highwater_wire::tls::Revoked;
use highwater_wire::{Credential, RelayCredential, WireError};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::Level;

/// How long a newer session waits for the older one to let go.
const SEAT_WAIT_MAX: Duration = Duration::from_secs(30);
/// When it has not been possible for so long to read who is revoked, nobody is served: whoever was revoked meanwhile would be.
pub const REVOCATIONS_UNKNOWN_MAX: Duration = Duration::from_secs(30);
/// Disks that a machine may claim at once, and again within a day. They are claimed for ever.
pub const CLAIMS_A_DAY: u32 = 512;
/// From this part of what a machine's state may take, somebody has to know.
const STATE_WARNING: f64 = 0.75;
/// Minutes' worth of commits that may come at once.
const COMMITS_BURST_MINUTES: f64 = 5.0;
/// Words of a machine on groups, at once and each minute afterwards: a member has two to say on each marker and its coordinator three, and there is one
/// a second at most.
const WORDS_BURST: f64 = 300.0;
const WORDS_A_MINUTE: f64 = 240.0;
/// Of them, markers that came to nothing: after one, members wait for a minute.
const WITHDRAWALS_BURST: f64 = 60.0;
const WITHDRAWALS_A_MINUTE: f64 = 6.0;
/// Times that it may be reached elsewhere: each is a document, and a new roster for all members.
const ADDRESSES_BURST: f64 = 10.0;
const ADDRESSES_A_MINUTE: f64 = 2.0;

/// Everything shared. Locks here are held for moments only, never across an await.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// The vault.
    pub vault: Vault,
    /// The vault's authority.
    pub authority: Authority,
    /// The metrics.
    pub metrics: Metrics,
    /// What is kept for the next process.
    pub state: StateDir,
    /// Certificates no longer accepted.
    pub revoked: RwLock<Revoked>,
    /// When they were read last.
    revoked_read: Mutex<Instant>,
    /// The sessions, as far as they are to hear of groups.
    pub desk: Arc<Desk>,
    /// Rosters that were signed.
    pub signed: Signed,
    /// What came of groups' markers.
    pub failures: Failures,
    /// Asks everybody to end.
    pub shutdown: CancellationToken,
    /// Connections of machines that have no seat.
    pub visits: Visits,
    /// `sessions-max`: only who has a seat has one of them.
    sessions: Arc<Semaphore>,
    seats: Mutex<HashMap<MachineId, Seats>>,
    claims: Mutex<HashMap<DiskId, MachineId>>,
    /// The memory of all sessions.
    pub memory: Memory,
    /// Where chunks wait while the vault lags, if anywhere.
    pub cache: Option<Cache>,
    /// Warnings have a limit of their own, or a machine could hide one behind what it may always do.
    lines_of_machines: Mutex<LogLimit<(MachineId, Level)>>,
    lines_of_strangers: Mutex<LogLimit<Source>>,
    lines_of_relays: Mutex<LogLimit<(RelayId, Level)>>,
    relay_renewals: Mutex<PerPeer<RelayId, Bucket>>,
    /// Machines whose state is larger than [`STATE_WARNING`] of what it may be.
    nearly_full: Mutex<HashSet<MachineId>>,
}

struct Seats {
    newest: Ended,
    /// Of the newest session.
    credential: Credential,
    lock: Arc<tokio::sync::Mutex<()>>,
    allowance: Allowance,
}

/// What a machine may do, over all its sessions.
struct Allowance {
    renewals: Bucket,
    commits: Bucket,
    claims: Bucket,
    /// Words on groups.
    words: Bucket,
    withdrawals: Bucket,
    addresses: Bucket,
}

/// The right to write for a machine. Dropped only after the writer.
pub struct Seat {
    /// When it is to be given back.
    pub ended: Ended,
    _guard: OwnedMutexGuard<()>,
}

/// Tells a session to end, and why.
#[derive(Clone, Default)]
pub struct Ended {
    token: CancellationToken,
    why: Arc<OnceLock<Why>>,
}

#[derive(Clone, Copy)]
enum Why {
    Replaced,
    Revoked(MachineId),
    Expired,
    Unknown,
}

impl Ended {
    fn end(&self, why: Why) {
        // The first reason counts.
        let _ = self.why.set(why);
        self.token.cancel();
    }

    /// Waits for it; answers why. Cancellation-safe.
    pub async fn wait(&self) -> CollectorError {
        self.token.cancelled().await;
        match self.why.get() {
            Some(Why::Revoked(machine)) => WireError::Revoked(*machine).into(),
            Some(Why::Expired) => CollectorError::CertificateExpired,
            Some(Why::Unknown) => CollectorError::RevocationsUnknown,
            Some(Why::Replaced) | None => CollectorError::Replaced,
        }
    }
}

impl Shared {
    /// For a collector that starts.
    #[must_use]
    pub fn new(config: Config, vault: Vault, authority: Authority, metrics: Metrics) -> Self {
        let memory =
            Memory::new(config.memory, vault.delta_bytes_max(), config.idle_timeout, &metrics.memory);
        let sessions = Arc::new(Semaphore::new(config.sessions_max));
        let state = StateDir::open(&config);
        Self {
            config,
            vault,
            authority,
            metrics,
            state,
            revoked: RwLock::default(),
            revoked_read: Mutex::new(Instant::now()),
            desk: Arc::default(),
            signed: Signed::default(),
            failures: Failures::default(),
            shutdown: CancellationToken::new(),
            visits: Visits::default(),
            sessions,
            seats: Mutex::default(),
            claims: Mutex::default(),
            memory,
            cache: None,
            lines_of_machines: Mutex::new(LogLimit::new(Instant::now())),
            lines_of_strangers: Mutex::new(LogLimit::new(Instant::now())),
            lines_of_relays: Mutex::new(LogLimit::new(Instant::now())),
            relay_renewals: Mutex::new(PerPeer::new()),
            nearly_full: Mutex::default(),
        }
    }

    /// What is recorded of a machine takes so much memory: warns once when that comes near to what it may.
    pub fn note_state(&self, machine: MachineId, bytes: u64) {
        let bytes_max = self.memory.machine_bytes_max();
        let ratio = bytes as f64 / bytes_max as f64;
        self.metrics.state(machine, ratio);
        if ratio < STATE_WARNING {
            locked(&self.nearly_full).remove(&machine);
        } else if locked(&self.nearly_full).insert(machine) {
            let error = CollectorError::NearlyFull { machine, bytes, bytes_max };
            tracing::warn!(%machine, code = %Code(error.code()), action = error.action(), %error, "a machine's history is large");
        }
    }

    /// Whether to say a line that a machine causes by coming and going: with how many were left out before.
    pub fn say_of_machine(&self, machine: MachineId, level: Level) -> Option<u64> {
        self.metrics.line(locked(&self.lines_of_machines).say((machine, level), Instant::now()))
    }

    /// The same of a relay.
    pub fn say_of_relay(&self, relay: RelayId, level: Level) -> Option<u64> {
        self.metrics.line(locked(&self.lines_of_relays).say((relay, level), Instant::now()))
    }

    /// The same for one who has shown no certificate that is valid.
    pub fn say_of_stranger(&self, peer: SocketAddr) -> Option<u64> {
        self.metrics.line(locked(&self.lines_of_strangers).say(Source::from(peer.ip()), Instant::now()))
    }

    /// Tells the older session of a machine to end, and waits until it has. The table holds an entry for each
    /// machine that ever came; only machines of the vault get here, so it is bounded by their number.
    pub async fn take_seat(&self, credential: &Credential) -> Result<Seat, CollectorError> {
        let ended = Ended::default();
        let lock = {
            let mut seats = locked(&self.seats);
            let entry = seats.entry(credential.machine).or_insert_with(|| Seats {
                newest: Ended::default(),
                credential: credential.clone(),
                lock: Arc::default(),
                allowance: Allowance::new(&self.config, Instant::now()),
            });
            entry.credential = credential.clone();
            std::mem::replace(&mut entry.newest, ended.clone()).end(Why::Replaced);
            Arc::clone(&entry.lock)
        };
        // Whoever was revoked between its handshake and here has not been told to end.
        if self.is_revoked(credential) {
            ended.end(Why::Revoked(credential.machine));
        }
        if !self.revocations_are_known() {
            ended.end(Why::Unknown);
        }
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Err(CollectorError::ShuttingDown),
            why = ended.wait() => Err(why),
            guard = tokio::time::timeout(SEAT_WAIT_MAX, lock.lock_owned()) => {
                Ok(Seat { _guard: guard.map_err(|_| CollectorError::Busy)?, ended })
            }
        }
    }

    /// One of the sessions that there may be, for whoever has a seat.
    pub fn take_session(&self) -> Result<OwnedSemaphorePermit, CollectorError> {
        let session = Arc::clone(&self.sessions).try_acquire_owned();
        session.map_err(|_| CollectorError::Full("no more sessions"))
    }

    /// Whether a certificate is among those that are known to be revoked.
    #[must_use]
    pub fn is_revoked(&self, credential: &Credential) -> bool {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner).covers(credential)
    }

    /// It was just read that a machine's certificates are revoked up to this generation: holds at once, not only when
    /// all are read again.
    pub fn note_revoked(&self, machine: MachineId, upto: u32) {
        let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
        let known = revoked.machines.entry(machine).or_insert(upto);
        *known = upto.max(*known);
    }

    /// The same of a relay's certificate.
    #[must_use]
    pub fn is_relay_revoked(&self, credential: &RelayCredential) -> bool {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner).covers_relay(credential)
    }

    /// The same of a relay.
    pub fn note_relay_revoked(&self, relay: RelayId, upto: u32) {
        let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
        let known = revoked.relays.entry(relay).or_insert(upto);
        *known = upto.max(*known);
    }

    /// Whether it was read lately who is revoked.
    #[must_use]
    pub fn revocations_are_known(&self) -> bool {
        locked(&self.revoked_read).elapsed() < REVOCATIONS_UNKNOWN_MAX
    }

    /// Takes one renewal out of a machine's allowance.
    pub fn allow_renewal(&self, machine: MachineId) -> Result<(), CollectorError> {
        self.allow(machine, |allowance| &mut allowance.renewals)
            .map_err(|_| CollectorError::Quota("it asks for too many certificates"))
    }

    /// The same of a relay's.
    pub fn allow_relay_renewal(&self, relay: RelayId) -> Result<(), CollectorError> {
        let now = Instant::now();
        locked(&self.relay_renewals)
            .of(relay, now, || renewals(&self.config, now))
            .take(now)
            .map_err(|_| CollectorError::Quota("it asks for too many certificates"))
    }

    /// Takes one commit out of a machine's allowance, or tells how long until there is one.
    pub fn allow_commit(&self, machine: MachineId) -> Result<(), Duration> {
        self.allow(machine, |allowance| &mut allowance.commits)
    }

    /// Takes one word on groups out of a machine's allowance.
    pub fn allow_word(&self, machine: MachineId) -> Result<(), CollectorError> {
        self.allow(machine, |allowance| &mut allowance.words)
            .map_err(|_| CollectorError::Quota("it says too much of groups"))
    }

    /// The same of a marker that came to nothing, which is remembered for hours.
    pub fn allow_withdrawal(&self, machine: MachineId) -> Result<(), CollectorError> {
        self.allow(machine, |allowance| &mut allowance.withdrawals)
            .map_err(|_| CollectorError::Quota("it withdraws too many markers"))
    }

    /// Whether another address of a machine may be kept now.
    pub fn allow_address(&self, machine: MachineId) -> bool {
        self.allow(machine, |allowance| &mut allowance.addresses).is_ok()
    }

    /// Certificates of a machine of an earlier generation than this are known to be revoked.
    #[must_use]
    pub fn generation_min(&self, machine: MachineId) -> u32 {
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner);
        revoked.machines.get(&machine).map_or(0, |upto| upto.saturating_add(1))
    }

    /// Takes one out of a machine's bucket, or tells how long until there is one.
    fn allow(
        &self,
        machine: MachineId,
        bucket: impl FnOnce(&mut Allowance) -> &mut Bucket,
    ) -> Result<(), Duration> {
        match locked(&self.seats).get_mut(&machine) {
            Some(seats) => bucket(&mut seats.allowance).take(Instant::now()),
            // Only sessions ask, and they have a seat.
            None => Ok(()),
        }
    }

    /// A window of the configured size, or a smaller one when the budget runs short.
    pub fn take_window(&self) -> Result<Share, CollectorError> {
        let mut bytes = self.config.window;
        while bytes >= WINDOW_BYTES_MIN {
            if let Some(share) = self.memory.windows.try_take(bytes) {
                return Ok(share);
            }
            bytes /= 2;
        }
        Err(CollectorError::Full("no memory for another window"))
    }

    /// Claims a disk for a machine, for ever and in the vault: whoever comes first owns it.
    pub async fn claim_disk(&self, disk: DiskId, machine: MachineId) -> Result<(), CollectorError> {
        let known = locked(&self.claims).get(&disk).copied();
        let owner = match known {
            Some(owner) => owner,
            None => {
                let name = format!("disks/{disk}");
                let mut text = self.vault.control_get(&name).await?;
                if text.is_none() {
                    self.allow(machine, |allowance| &mut allowance.claims)
                        .map_err(|_| CollectorError::Quota("it names too many new disks"))?;
                    if !self.vault.control_create(&name, machine.as_bytes()).await? {
                        text = self.vault.control_get(&name).await?;
                    }
                }
                match text {
                    None => machine,
                    Some(text) => {
                        let bytes = <[u8; 16]>::try_from(text.as_slice()).ok();
                        MachineId::from_bytes(bytes.ok_or(CollectorError::Document(name))?)
                    }
                }
            }
        };
        if owner != machine {
            return Err(CollectorError::OtherMachinesDisk(disk));
        }
        // Only own claims are remembered: asking for foreign disks must not make the table grow.
        locked(&self.claims).insert(disk, machine);
        Ok(())
    }

    /// Reads again who has been revoked. Their sessions end, and those whose certificate has expired: a session that lasts would
    /// outlive both by any time. When it cannot be read for [`REVOCATIONS_UNKNOWN_MAX`], all sessions end, and new ones are
    /// refused until it can be.
    pub async fn refresh_revoked(&self) -> Result<(), CollectorError> {
        let begun = Instant::now();
        let read = async {
            let machines = certificates::all_revoked(&self.vault).await?;
            Ok((machines, certificates::all_revoked(&self.vault).await?))
        };
        let read = tokio::time::timeout(REVOCATIONS_UNKNOWN_MAX, read).await;
        let (machines, relays) = match read.unwrap_or(Err(CollectorError::RevocationsUnknown)) {
            Ok(revoked) => revoked,
            Err(error) => {
                if !self.revocations_are_known() {
                    locked(&self.seats).values().for_each(|seats| seats.newest.end(Why::Unknown));
                }
                return Err(error);
            }
        };
        *locked(&self.revoked_read) = begun;
        // In this order: a session takes its seat first, and looks here afterwards.
        // Revocations are for ever; one that was noted since the reading began is not among them.
        machines.into_iter().for_each(|(machine, upto)| self.note_revoked(machine, upto));
        relays.into_iter().for_each(|(relay, upto)| self.note_relay_revoked(relay, upto));
        let now_ms = now_ms();
        for (machine, seats) in locked(&self.seats).iter() {
            if self.is_revoked(&seats.credential) {
                seats.newest.end(Why::Revoked(*machine));
            } else if seats.credential.expires_ms <= now_ms {
                seats.newest.end(Why::Expired);
            }
        }
        Ok(())
    }
}

fn renewals(config: &Config, now: Instant) -> Bucket {
    // An agent, or a relay, tries thirty times in a certificate's validity at most.
    Bucket::new(4.0, 60.0 / config.certificate_validity.as_secs_f64().max(1.0), now)
}

impl Allowance {
    fn new(config: &Config, now: Instant) -> Self {
        let commits = f64::from(config.commits_per_minute);
        let claims = f64::from(CLAIMS_A_DAY);
        Self {
            renewals: renewals(config, now),
            commits: Bucket::new(commits * COMMITS_BURST_MINUTES, commits / 60.0, now),
            claims: Bucket::new(claims, claims / 86_400.0, now),
            words: Bucket::new(WORDS_BURST, WORDS_A_MINUTE / 60.0, now),
            withdrawals: Bucket::new(WITHDRAWALS_BURST, WITHDRAWALS_A_MINUTE / 60.0, now),
            addresses: Bucket::new(ADDRESSES_BURST, ADDRESSES_A_MINUTE / 60.0, now),
        }
    }
}
