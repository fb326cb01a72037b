//! What the sessions of a collector share.

use crate::{CollectorError, Config, config::WINDOW_BYTES_MIN, metrics::Metrics};
use highwater_delta::{DiskId, MachineId};
use highwater_vault::Vault;
use highwater_wire::identity::Authority;
use highwater_wire::tls::Revoked;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// How long a newer session waits for the older one to let go.
const SEAT_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes that one permit of the memory budget stands for.
const MEMORY_UNIT: u64 = 64 * 1024;

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
    /// Certificates no longer accepted.
    pub revoked: RwLock<Revoked>,
    /// Asks everybody to end.
    pub shutdown: CancellationToken,
    seats: Mutex<HashMap<MachineId, Seats>>,
    claims: Mutex<HashMap<DiskId, MachineId>>,
    memory: Arc<Semaphore>,
}

struct Seats {
    newest: CancellationToken,
    lock: Arc<tokio::sync::Mutex<()>>,
}

/// The right to write for a machine. Dropped only after the writer.
pub struct Seat {
    /// Cancelled when a newer session has come.
    pub replaced: CancellationToken,
    _guard: OwnedMutexGuard<()>,
}

/// A window, taken out of the budget of all.
pub struct Window {
    /// Its size.
    pub bytes: u64,
    _permit: OwnedSemaphorePermit,
}

impl Shared {
    /// For a collector that starts.
    #[must_use]
    pub fn new(config: Config, vault: Vault, authority: Authority, metrics: Metrics) -> Self {
        let permits = usize::try_from(config.memory / MEMORY_UNIT).unwrap_or(usize::MAX);
        Self {
            config,
            vault,
            authority,
            metrics,
            revoked: RwLock::default(),
            shutdown: CancellationToken::new(),
            seats: Mutex::default(),
            claims: Mutex::default(),
            memory: Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS))),
        }
    }

    /// Tells the older session of a machine to end, and waits until it has. The table holds an entry for each
    /// machine that ever came; only machines of the vault get here, so it is bounded by their number.
    pub async fn take_seat(&self, machine: MachineId) -> Result<Seat, CollectorError> {
        let replaced = CancellationToken::new();
        let lock = {
            let mut seats = locked(&self.seats);
            let entry = seats
                .entry(machine)
                .or_insert_with(|| Seats { newest: CancellationToken::new(), lock: Arc::default() });
            std::mem::replace(&mut entry.newest, replaced.clone()).cancel();
            Arc::clone(&entry.lock)
        };
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Err(CollectorError::ShuttingDown),
            () = replaced.cancelled() => Err(CollectorError::Replaced),
            guard = tokio::time::timeout(SEAT_WAIT_MAX, lock.lock_owned()) => {
                Ok(Seat { _guard: guard.map_err(|_| CollectorError::Busy)?, replaced })
            }
        }
    }

    /// A window of the configured size, or a smaller one when the budget runs short.
    pub fn take_window(&self) -> Result<Window, CollectorError> {
        let mut bytes = self.config.window;
        while bytes >= WINDOW_BYTES_MIN {
            let units = u32::try_from(bytes.div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX);
            if let Ok(permit) = Arc::clone(&self.memory).try_acquire_many_owned(units) {
                return Ok(Window { bytes, _permit: permit });
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
                if self.vault.control_create(&name, machine.as_bytes()).await? {
                    machine
                } else {
                    let text = self.vault.control_get(&name).await?;
                    let bytes = text.as_ref().and_then(|text| <[u8; 16]>::try_from(text.as_slice()).ok());
                    MachineId::from_bytes(bytes.ok_or(CollectorError::Document(name))?)
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

    /// Reads again who has been revoked: control documents `revoked/<machine>`. Their sessions end.
    pub async fn refresh_revoked(&self) -> Result<(), CollectorError> {
        let names = self.vault.control_list("revoked/").await?;
        let machines: HashSet<MachineId> =
            names.iter().filter_map(|name| name.rsplit('/').next()?.parse().ok()).collect();
        // A session that lasts would outlive its certificate's revocation by any time.
        for (_, seats) in locked(&self.seats).iter().filter(|(machine, _)| machines.contains(machine)) {
            seats.newest.cancel();
        }
        self.revoked.write().unwrap_or_else(PoisonError::into_inner).machines = machines;
        Ok(())
    }
}

/// Locks, also after a panic of another holder: all that is kept under these locks is whole between statements.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
