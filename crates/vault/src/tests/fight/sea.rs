//! What lies between simulated collectors and their one store: requests that take their time, overtake each other, get lost on either
//! way, and go on after whoever sent them is gone. The store itself is right, and so is its clock.
//!
//! Time is the runtime's, which is paused: it passes only while everybody waits.

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, stream, stream::BoxStream};
use object_store::{memory::InMemory, path::Path, *};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    sync::{Arc, Mutex},
    time::{Duration, UNIX_EPOCH},
};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, sleep_until},
};

/// When the simulation begins, in milliseconds since 1970.
const BEGIN_MS: u64 = 1_700_000_000_000;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers from a seed, for one who draws them in an order of his own.
pub struct Dice(Mutex<u64>);
impl Dice {
    pub const fn new(seed: u64) -> Self {
        Self(Mutex::new(seed))
    }
    pub fn next(&self) -> u64 {
        let mut state = self.0.lock().unwrap();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&self, bound: u64) -> u64 {
        self.next() % bound
    }
    pub fn within(&self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }
    pub fn percent(&self, chance: u64) -> bool {
        self.below(100) < chance
    }
    pub fn seconds(&self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.within(range.start * 1000..range.end * 1000))
    }
}

/// A record.
pub struct Recorded {
    pub path: Path,
    pub sealed: bytes::Bytes,
    /// When it was sent …
    pub sent_ms: u64,
    /// … and when it was there.
    pub at_ms: u64,
}

/// The store that all share.
pub struct Shore {
    objects: InMemory,
    times: Mutex<HashMap<Path, u64>>,
    /// Records in the order in which they came to be.
    records: Mutex<Vec<Recorded>>,
    begin: Instant,
}

impl Shore {
    pub fn new() -> Arc<Self> {
        let (times, records) = Default::default();
        Arc::new(Self { objects: InMemory::new(), times, records, begin: Instant::now() })
    }
    /// As they are at this moment.
    pub const fn objects(&self) -> &InMemory {
        &self.objects
    }
    /// Whether there was such an object at any time.
    pub fn had(&self, path: &Path) -> bool {
        self.times.lock().unwrap().contains_key(path)
    }
    /// The right time.
    pub fn now_ms(&self) -> u64 {
        BEGIN_MS + self.begin.elapsed().as_millis() as u64
    }
    /// The records since this was last asked.
    pub fn take_records(&self) -> Vec<Recorded> {
        std::mem::take(&mut *self.records.lock().unwrap())
    }

    async fn put(
        &self,
        path: Path,
        payload: PutPayload,
        options: PutOptions,
        sent_ms: u64,
    ) -> Result<PutResult> {
        let sealed = bytes::Bytes::from(payload.clone());
        assert_eq!(options.mode, PutMode::Create, "{path}: nothing is ever changed");
        let done = self.objects.put_opts(&path, payload, options).await?;
        self.times.lock().unwrap().insert(path.clone(), self.now_ms());
        if path.as_ref().contains("/manifest/") {
            let at_ms = self.now_ms();
            self.records.lock().unwrap().push(Recorded { path, sealed, sent_ms, at_ms });
        }
        Ok(done)
    }
    fn dated(&self, meta: ObjectMeta) -> ObjectMeta {
        let at_ms = self.times.lock().unwrap()[&meta.location];
        ObjectMeta { last_modified: (UNIX_EPOCH + Duration::from_millis(at_ms)).into(), ..meta }
    }
    async fn get(&self, path: Path, options: GetOptions) -> Result<GetResult> {
        let mut got = self.objects.get_opts(&path, options).await?;
        got.meta = self.dated(got.meta);
        Ok(got)
    }
    async fn list(&self, prefix: Option<Path>, offset: Option<Path>) -> Result<Vec<ObjectMeta>> {
        let listed = match offset {
            Some(offset) => self.objects.list_with_offset(prefix.as_ref(), &offset),
            None => self.objects.list(prefix.as_ref()),
        };
        let mut listed: Vec<ObjectMeta> = listed.map_ok(|meta| self.dated(meta)).try_collect().await?;
        listed.sort_by(|a, b| a.location.cmp(&b.location));
        Ok(listed)
    }
    async fn delete(&self, path: Path) -> Result<Path> {
        self.objects.delete(&path).await?;
        Ok(path)
    }
}

/// How bad it is, each in percent of all calls (`stopped`: in thousandths).
#[derive(Clone, Copy, Default)]
pub struct Weather {
    /// It never reaches the store.
    pub lost_before: u64,
    /// Its answer is lost.
    pub lost_after: u64,
    /// Its answer comes when all who wait here have been stopped, for up to hours: a process that is frozen, a machine that is moved.
    pub stopped: u64,
    /// It is given up, and reaches the store up to an hour later.
    pub late: u64,
}

/// A collector's way to the store.
pub struct Passage {
    shore: Arc<Shore>,
    dice: Dice,
    weather: Mutex<Option<Weather>>,
    /// Nothing gets through before, in either direction.
    cut_until: Mutex<Instant>,
}

impl Passage {
    pub fn new(shore: &Arc<Shore>, seed: u64, weather: Weather) -> Arc<Self> {
        let cut_until = Mutex::new(Instant::now());
        Arc::new(Self {
            shore: shore.clone(),
            dice: Dice::new(seed),
            weather: Mutex::new(Some(weather)),
            cut_until,
        })
    }
    /// One on which nothing happens, at once.
    pub fn calm(shore: &Arc<Shore>) -> Arc<Self> {
        let passage = Self::new(shore, 0, Weather::default());
        passage.calm_down();
        passage
    }
    pub fn calm_down(&self) {
        *self.weather.lock().unwrap() = None;
        *self.cut_until.lock().unwrap() = Instant::now();
    }
    pub fn cut(&self, for_: Duration) {
        *self.cut_until.lock().unwrap() = Instant::now() + for_;
    }
    async fn open(&self) {
        loop {
            let until = *self.cut_until.lock().unwrap();
            if until <= Instant::now() {
                return;
            }
            // It may be lengthened meanwhile.
            sleep_until(until).await;
        }
    }

    /// A request. It is under way as soon as this is polled, whoever waits for it.
    async fn call<T: Send + 'static>(
        &self,
        request: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let Some(weather) = *self.weather.lock().unwrap() else { return request.await };
        let dice = &self.dice;
        let there = Duration::from_millis(dice.within(1..400));
        let (back, luck) = (Duration::from_millis(dice.within(1..400)), dice.below(100));
        let late = dice.seconds(1..3600);
        let stop = dice.below(1000) < weather.stopped;
        self.open().await;
        if luck < weather.lost_before {
            sleep(there).await;
            return Err(failure("lost"));
        }
        let luck = luck.saturating_sub(weather.lost_before);
        let is_late = luck < weather.late;
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            sleep(if is_late { late } else { there }).await;
            // Nobody may wait any more.
            let _ = tell.send(request.await);
        });
        if is_late {
            sleep(PATIENCE).await;
            return Err(failure("no answer"));
        }
        let done = told.await.map_err(|_| failure("gone"))?;
        if stop {
            self.cut(late * 3);
        }
        sleep(back).await;
        self.open().await;
        let is_lost = (weather.late..weather.late + weather.lost_after).contains(&luck);
        if is_lost { done.and(Err(failure("answer lost"))) } else { done }
    }
}

fn failure(what: &'static str) -> Error {
    Error::Generic { store: "sea", source: what.into() }
}
impl fmt::Display for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sea")
    }
}
impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passage")
    }
}

/// What the layers above hold: a passage, by reference.
#[derive(Clone, Debug)]
pub struct Line(pub Arc<Passage>);
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Line {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (shore, path, sent_ms) = (self.0.shore.clone(), path.clone(), self.0.shore.now_ms());
        self.0.call(async move { shore.put(path, payload, options, sent_ms).await }).await
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.call(async { Ok(()) }).await?;
        let parts = Arc::default();
        Ok(Box::new(Upload { line: self.clone(), path: path.clone(), parts, count: 0 }))
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let (shore, path) = (self.0.shore.clone(), path.clone());
        self.0.call(async move { shore.get(path, options).await }).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let line = self.clone();
        let delete = move |path: Result<Path>| {
            let line = line.clone();
            async move {
                let (shore, path) = (line.0.shore.clone(), path?);
                line.0.call(async move { shore.delete(path).await }).await
            }
        };
        paths.then(delete).boxed()
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        listed(self.clone(), prefix.cloned(), None)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        listed(self.clone(), prefix.cloned(), Some(offset.clone()))
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let (shore, prefix) = (self.0.shore.clone(), prefix.cloned());
        self.0.call(async move { shore.objects.list_with_delimiter(prefix.as_ref()).await }).await
    }
    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(failure("copy"))
    }
}

/// In two pages, between which time passes.
fn listed(line: Line, prefix: Option<Path>, offset: Option<Path>) -> BoxStream<'static, Result<ObjectMeta>> {
    let pages = async move {
        let (shore, at, from) = (line.0.shore.clone(), prefix.clone(), offset.clone());
        let mut page = line.0.call(async move { shore.list(at, from).await }).await?;
        page.truncate(page.len() / 2);
        let offset = page.last().map(|last| last.location.clone()).or(offset);
        let shore = line.0.shore.clone();
        page.extend(line.0.call(async move { shore.list(prefix, offset).await }).await?);
        Ok::<_, Error>(stream::iter(page.into_iter().map(Ok)))
    };
    stream::once(pages).try_flatten().boxed()
}

/// An upload in parts; its object is there when it is complete.
#[derive(Debug)]
struct Upload {
    line: Line,
    path: Path,
    parts: Arc<Mutex<BTreeMap<usize, PutPayload>>>,
    count: usize,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (line, parts, number) = (self.line.clone(), self.parts.clone(), self.count);
        self.count += 1;
        Box::pin(async move {
            let put = async move {
                parts.lock().unwrap().insert(number, data);
                Ok(())
            };
            line.0.call(put).await
        })
    }
    async fn complete(&mut self) -> Result<PutResult> {
        let (shore, path, parts, count) =
            (self.line.0.shore.clone(), self.path.clone(), self.parts.clone(), self.count);
        let complete = async move {
            let parts = std::mem::take(&mut *parts.lock().unwrap());
            assert_eq!(parts.len(), count, "{path}: completed without all of its parts");
            let whole = parts.into_values().flat_map(|part| part.into_iter()).collect();
            shore.put(path, whole, PutMode::Create.into(), 0).await
        };
        self.line.0.call(complete).await
    }
    async fn abort(&mut self) -> Result<()> {
        self.line.0.call(async { Ok(()) }).await
    }
}
