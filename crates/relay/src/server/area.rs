//! Where each relay's objects lie, and what it may take.

use super::{Gate, Meter, guard::Guarded, serve, uploads::Uploads};
use crate::RelayError;
use highwater_delta::RelayId;
use hyper_util::rt::{TokioIo, TokioTimer};
use object_store::{ObjectStore, path::Path, prefix::PrefixStore};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Connections of one relay.
pub const CONNECTIONS_MAX: usize = 128;
/// From the connection, or the last answer, to the end of a request's header.
const HEADER_MAX: Duration = Duration::from_secs(90);
/// Of each connection's buffers.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// How often a connection's certificate is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Bytes that one permit stands for.
const UNIT: u64 = 4096;
/// How long a request waits for memory: less than its client waits for it.
const MEMORY_WAIT_MAX: Duration = Duration::from_secs(30);

/// All relays of a collector.
pub struct Relays {
    store: Arc<dyn ObjectStore>,
    pub(super) meter: Arc<dyn Meter>,
    /// For bodies and pages, of all together.
    memory: Arc<Semaphore>,
    memory_bytes: u64,
    /// One each of those that ever came, which are as many as there are certificates at most.
    areas: Mutex<HashMap<RelayId, Arc<Area>>>,
}

/// One relay's.
pub(super) struct Area {
    pub(super) relay: RelayId,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) uploads: Uploads,
    connections: Arc<Semaphore>,
    /// Half of the whole, so that there is something left for others; one that wants more at once takes all of this.
    memory: Arc<Semaphore>,
}

/// Memory that was taken; given back when dropped.
pub(super) struct Taken {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Relays {
    /// Over the store beneath whose `relays/` the objects lie. Bodies that are being read take `memory_bytes` together at most; larger
    /// objects cannot be put at once, and a relay has half of it, but for one such object.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, memory_bytes: u64, meter: Arc<dyn Meter>) -> Self {
        let memory = Arc::new(Semaphore::new(units(memory_bytes) as usize));
        Self { store, meter, memory, memory_bytes, areas: Mutex::default() }
    }

    /// Most bytes of one body.
    pub(super) const fn body_bytes_max(&self) -> u64 {
        self.memory_bytes
    }

    fn area(&self, relay: RelayId) -> Arc<Area> {
        let mut areas = self.areas.lock().unwrap_or_else(PoisonError::into_inner);
        let area = areas.entry(relay).or_insert_with(|| {
            let prefix = Path::from(format!("relays/{relay}"));
            Arc::new(Area {
                relay,
                store: Arc::new(PrefixStore::new(self.store.clone(), prefix)),
                uploads: Uploads::default(),
                connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
                memory: Arc::new(Semaphore::new(units(self.memory_bytes / 2) as usize)),
            })
        });
        Arc::clone(area)
    }

    /// Takes memory, or waits for it.
    pub(super) async fn take(&self, area: &Area, bytes: u64) -> Result<Taken, RelayError> {
        if bytes > self.memory_bytes {
            return Err(RelayError::TooLarge { bytes, bytes_max: self.memory_bytes });
        }
        let (own, all) = (units(bytes).min(units(self.memory_bytes / 2)), units(bytes));
        let taking = async {
            let own = Arc::clone(&area.memory).acquire_many_owned(own).await;
            let all = Arc::clone(&self.memory).acquire_many_owned(all).await;
            Some(Taken { _own: own.ok()?, _all: all.ok()? })
        };
        let taken = timeout(MEMORY_WAIT_MAX, taking).await;
        taken.ok().flatten().ok_or(RelayError::Busy("no memory for another body"))
    }

    /// Gives up uploads that nobody goes on with. To be called now and then.
    pub fn tidy(&self) {
        let areas: Vec<_> =
            self.areas.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for area in areas {
            area.uploads.give_up_idle();
        }
    }

    /// Answers an authenticated connection until it ends, its certificate does not hold any more, or `shutdown` does.
    ///
    /// # Errors
    /// Why it was ended by this side: the relay has too many connections, or the gate does not admit it.
    pub async fn serve<S>(
        self: &Arc<Self>,
        relay: RelayId,
        stream: S,
        gate: Arc<dyn Gate>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), RelayError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let area = self.area(relay);
        let place = Arc::clone(&area.connections).try_acquire_owned();
        let _place = place.map_err(|_| RelayError::Busy("too many connections of one relay"))?;
        let service = hyper::service::service_fn({
            let (relays, area, gate) = (self.clone(), area, gate.clone());
            move |request| serve::answer(relays.clone(), area.clone(), gate.clone(), request)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .serve_connection(TokioIo::new(Guarded::new(stream)), service);
        tokio::pin!(connection, shutdown);
        let mut stopping = false;
        loop {
            tokio::select! {
                // Broken and slow clients are their own problem.
                _ = &mut connection => return Ok(()),
                () = &mut shutdown, if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                // Not at once: a new connection is first to hear why it is refused.
                () = tokio::time::sleep(LOOK_EVERY) => gate.admits()?,
            }
        }
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}
