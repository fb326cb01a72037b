//! An object store that misbehaves on demand: a layer over any other, for tests.
//!
//! Calls are counted. One can be made to fail by its number ([`Faulty::fail_call`]); puts can be slow, the whole store can stall,
//! and creating what exists can be allowed, as a store does that knows no conditions. Or every call draws its misfortune from a seed
//! ([`Faulty::at_random`], module [`chance`]).
//!
//! A call that fails *late* has had its effect: its answer was lost. The layer itself invents nothing: what it shows is, or was a
//! moment ago, in the store beneath.

mod answers;
pub mod chance;
mod upload;

pub use chance::Rates;

use answers::Changes;
use async_trait::async_trait;
use chance::{Chance, Luck};
use futures::{StreamExt, stream::BoxStream};
use object_store::{path::Path, *};
use std::fmt;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How long a slow put takes.
pub const SLOW: Duration = Duration::from_millis(200);
/// So long at most an answer is held back for another one to overtake it.
const HOLD_MAX: Duration = Duration::from_millis(30);

/// See the module.
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    shared: Arc<Shared>,
}

/// What its uploads need too.
struct Shared {
    calls: AtomicU64,
    fail: Mutex<Option<(u64, When)>>,
    slow_puts: AtomicBool,
    create_overwrites: AtomicBool,
    keeps: Mutex<Option<Keeps>>,
    stalled: watch::Sender<bool>,
    chance: Mutex<Option<Chance>>,
    /// Of completed calls, for answers that are held back.
    completed: Notify,
    changes: Mutex<Changes>,
}

/// How a store answers who would delete what it protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// It is not allowed.
    Denied,
    /// As a store that is asked in batches: in words only.
    InWords,
    /// As if it failed.
    Failing,
}

/// When a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before it had any effect.
    Before,
    /// After all of it: only its answer is lost.
    After,
}

impl Faulty {
    /// Over another store; without faults at first.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        let shared = Shared {
            calls: AtomicU64::new(0),
            fail: Mutex::new(None),
            slow_puts: AtomicBool::new(false),
            create_overwrites: AtomicBool::new(false),
            keeps: Mutex::new(None),
            stalled: watch::Sender::new(false),
            chance: Mutex::new(None),
            completed: Notify::new(),
            changes: Mutex::default(),
        };
        Arc::new(Self { inner, shared: Arc::new(shared) })
    }

    /// Counts anew, and lets one call fail: the n-th from now, from 1.
    pub fn fail_call(&self, fail: Option<(u64, When)>) {
        self.shared.calls.store(0, Ordering::SeqCst);
        *locked(&self.shared.fail) = fail;
    }
    /// Calls since the last [`Faulty::fail_call`].
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.shared.calls.load(Ordering::SeqCst)
    }
    /// Puts take [`SLOW`], and are not stopped by whoever no longer waits for them, as with a directory.
    pub fn slow_puts(&self, slow: bool) {
        self.shared.slow_puts.store(slow, Ordering::SeqCst);
    }
    /// A put that is to create overwrites instead.
    pub fn create_overwrites(&self, overwrites: bool) {
        self.shared.create_overwrites.store(overwrites, Ordering::SeqCst);
    }
    /// Nothing can be deleted, until this is taken back.
    pub fn keeps(&self, keeps: Option<Keeps>) {
        *locked(&self.shared.keeps) = keeps;
    }
    /// Calls wait, without effect, until this is taken back.
    pub fn stall(&self, stalled: bool) {
        self.shared.stalled.send_replace(stalled);
    }
    /// From now on each call draws its luck; `None` ends it.
    pub fn at_random(&self, chance: Option<(u64, Rates)>) {
        *locked(&self.shared.chance) = chance.map(|(seed, rates)| Chance::new(seed, rates));
    }
}

impl Shared {
    /// A call begins: what is to happen to it. Waits where it has to.
    async fn begin(&self) -> Luck {
        let luck = self.draw();
        // The sender lives as long as this.
        let _ = self.stalled.subscribe().wait_for(|stalled| !stalled).await;
        if let Some(delay) = luck.delay {
            tokio::time::sleep(delay).await;
        }
        luck
    }

    /// The same for one that cannot wait.
    fn draw(&self) -> Luck {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let mut luck = locked(&self.chance).as_mut().map(Chance::draw).unwrap_or_default();
        luck.fails = luck.fails.or(locked(&self.fail).filter(|(n, _)| *n == call).map(|(_, when)| when));
        luck
    }

    /// A call has had its effect: its answer, or that it was lost.
    async fn answer<T>(&self, luck: &Luck, done: Result<T>) -> Result<T> {
        self.completed.notify_waiters();
        if luck.held {
            let _ = tokio::time::timeout(HOLD_MAX, self.completed.notified()).await;
        }
        match luck.fails {
            Some(When::After) => done.and(Err(failure())),
            _ => done,
        }
    }
}

fn failure() -> Error {
    // Whoever reads errors' words for what they might say of ranges takes an outage for damage.
    Error::Generic { store: "faulty", source: "injected, at http://orange.example/range".into() }
}

fn kept(keeps: Keeps, path: &Path) -> Error {
    let denied = || format!("Bulk delete request failed for key {path}: protected (code: 409)").into();
    match keeps {
        Keeps::Denied => Error::PermissionDenied { path: path.to_string(), source: denied() },
        Keeps::InWords => Error::Generic { store: "faulty", source: denied() },
        Keeps::Failing => failure(),
    }
}

/// All that is kept under these locks is whole between statements.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}
impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        let luck = self.shared.begin().await;
        if luck.fails == Some(When::Before) {
            return Err(failure());
        }
        if self.shared.create_overwrites.load(Ordering::SeqCst) {
            options.mode = PutMode::Overwrite;
        }
        if luck.twice {
            // As a client does that lost the first answer; the second one is told.
            let first = self.inner.put_opts(path, payload.clone(), options.clone()).await;
            first.inspect(|_| locked(&self.shared.changes).put(path))?;
        }
        let slow = self.shared.slow_puts.load(Ordering::SeqCst).then_some(SLOW);
        let (inner, at) = (self.inner.clone(), path.clone());
        let put = async move {
            if let Some(slow) = slow {
                tokio::time::sleep(slow).await;
            }
            inner.put_opts(&at, payload, options).await
        };
        let done = if slow.is_some() { tokio::spawn(put).await? } else { put.await };
        let done = done.inspect(|_| locked(&self.shared.changes).put(path));
        self.shared.answer(&luck, done).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let luck = self.shared.begin().await;
        // One that was begun and whose answer is lost would only be left over in the store.
        if luck.fails.is_some() {
            return Err(failure());
        }
        let begun = self.inner.put_multipart_opts(path, options).await;
        let begun = self.shared.answer(&luck, begun).await?;
        Ok(upload::wrap(begun, path.clone(), self.shared.clone()))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let luck = self.shared.begin().await;
        if luck.fails.is_some() {
            return Err(failure());
        }
        let got = self.inner.get_opts(path, options).await;
        let got = self.shared.answer(&luck, got).await?;
        match luck.cut {
            Some(part) => answers::cut(got, part).await,
            None => Ok(got),
        }
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let luck = self.shared.draw();
        if luck.fails == Some(When::Before) {
            return Box::pin(futures::stream::iter([Err(failure())]));
        }
        if let Some(keeps) = *locked(&self.shared.keeps) {
            return Box::pin(paths.map(move |path| Err(kept(keeps, &path?))));
        }
        let (inner, shared) = (self.inner.clone(), self.shared.clone());
        // What goes is remembered, or no list could show it any more.
        let paths = paths.then(move |path| {
            let (inner, shared) = (inner.clone(), shared.clone());
            async move {
                if let Ok(path) = &path
                    && let Ok(meta) = inner.head(path).await
                {
                    locked(&shared.changes).deleted(meta);
                }
                path
            }
        });
        let deleted = self.inner.delete_stream(Box::pin(paths));
        if luck.fails == Some(When::After) {
            return Box::pin(deleted.map(|done| done.and(Err(failure()))));
        }
        deleted
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let luck = self.shared.draw();
        if luck.fails.is_some() {
            return Box::pin(futures::stream::iter([Err(failure())]));
        }
        match luck.stale {
            None => self.inner.list(prefix),
            Some(by) => locked(&self.shared.changes).stale(by, prefix, self.inner.list(prefix)),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let luck = self.shared.begin().await;
        if luck.fails.is_some() {
            return Err(failure());
        }
        let listed = self.inner.list_with_delimiter(prefix).await;
        self.shared.answer(&luck, listed).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(failure())
    }
}
