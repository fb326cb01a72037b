use super::*;
use crate::cache::{Cache, FILE_BYTES_MIN};
use crate::metrics::CacheMetrics;
use std::collections::VecDeque as Model;
use std::io::ErrorKind;

const MIB: u64 = 1 << 20;

/// A disk in memory that does badly what it is told to.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Orders>>);

#[derive(Default)]
struct Orders {
    calls: u64,
    /// The call, from 1, that fails.
    fails: Option<u64>,
    /// Most bytes of one read or write.
    short: Option<usize>,
    /// Once in so many reads a bit is another one.
    flips: Option<u64>,
    files: usize,
}

struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
    disk: Disk,
}

impl Disk {
    fn call(&self) -> io::Result<()> {
        let mut orders = locked(&self.0);
        orders.calls += 1;
        if orders.fails == Some(orders.calls) { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
    fn most(&self, bytes: usize) -> usize {
        locked(&self.0).short.map_or(bytes, |short| short.min(bytes))
    }
    fn cache(&self, bytes: u64) -> (Cache, CacheMetrics) {
        let metrics = CacheMetrics::default();
        (Cache::over(Arc::new(self.clone()), bytes, &metrics), metrics)
    }
}

impl Medium for Disk {
    fn create(&self) -> io::Result<Box<dyn Backing>> {
        self.call()?;
        locked(&self.0).files += 1;
        Ok(Box::new(MemoryFile { bytes: Mutex::default(), disk: self.clone() }))
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        locked(&self.disk.0).files -= 1;
    }
}

impl Backing for MemoryFile {
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<usize> {
        let most = self.disk.most(from.len());
        let failed = self.disk.call();
        // One that fails may have been done in part.
        let done = if failed.is_ok() { most } else { most / 2 };
        let mut bytes = locked(&self.bytes);
        let end = offset as usize + done;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(&from[..done]);
        failed.map(|()| done)
    }
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.call()?;
        let bytes = locked(&self.bytes);
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let done = self.disk.most(into.len()).min(from.len());
        into[..done].copy_from_slice(&from[..done]);
        let orders = locked(&self.disk.0);
        if orders.flips.is_some_and(|every| orders.calls.is_multiple_of(every)) && done > 0 {
            into[orders.calls as usize % done] ^= 1 << (orders.calls % 8);
        }
        Ok(done)
    }
    fn sync(&self) -> io::Result<()> {
        self.disk.call()
    }
}

fn chunk(n: u64) -> (DeltaId, Bytes) {
    let mut delta = [7; 16];
    delta[..8].copy_from_slice(&n.to_le_bytes());
    let bytes: Vec<u8> = (0..n * 7919 % 40_000).map(|at| (at * 31 + n * 17) as u8).collect();
    (DeltaId::from_bytes(delta), bytes.into())
}

/// Appends and takes in turns; what is taken is compared. Answers how many were taken, and the error that ended it.
fn work(spool: &Spool, records: u64) -> (u64, Option<CollectorError>) {
    let mut model = Model::new();
    let mut taken = 0;
    for n in 0..records {
        let (delta, bytes) = chunk(n);
        let appended = spool.append(delta, &bytes);
        match appended.and_then(|appended| spool.sync().map(|()| appended)) {
            Ok(Appended::Yes) => model.push_back(chunk(n)),
            Ok(Appended::Full) => {}
            Err(_) => assert!(spool.is_broken()),
        }
        // Some wait most of the time.
        while model.len() as u64 > n * 7 % 23 {
            match spool.take() {
                Ok(record) => assert_eq!(Some(record), model.pop_front(), "record {taken}"),
                Err(error) => return (taken, Some(error)),
            }
            taken += 1;
        }
    }
    while let Some(expected) = model.pop_front() {
        match spool.take() {
            Ok(record) => assert_eq!(record, expected, "record {taken}"),
            Err(error) => return (taken, Some(error)),
        }
        taken += 1;
    }
    (taken, None)
}

#[test]
fn chunks_come_back_in_order_and_the_space_with_them() {
    let disk = Disk::default();
    let (cache, metrics) = disk.cache(64 * MIB);
    let spool = cache.spool().unwrap();
    let (taken, error) = work(&spool, 1000);
    assert!(error.is_none() && taken == 1000, "{taken} {error:?}");
    assert_eq!(metrics.used_bytes(), 0, "all was taken");
    assert_eq!(locked(&disk.0).files, 0);
    // More than one file, which go one after the other.
    let (delta, bytes) = (DeltaId::new(), vec![5; 100_000]);
    for _ in 0..100 {
        assert_eq!(spool.append(delta, &bytes).unwrap(), Appended::Yes);
    }
    spool.sync().unwrap();
    assert_eq!(locked(&disk.0).files, 3);
    let before = metrics.used_bytes();
    for _ in 0..60 {
        assert_eq!(spool.take().unwrap(), (delta, bytes.clone().into()));
    }
    assert_eq!(locked(&disk.0).files, 2);
    assert!(before - metrics.used_bytes() >= FILE_BYTES_MIN);
    drop(spool);
    assert_eq!((metrics.used_bytes(), locked(&disk.0).files), (0, 0));
}

#[test]
fn short_reads_and_writes_change_nothing() {
    let disk = Disk::default();
    locked(&disk.0).short = Some(1000);
    let spool = disk.cache(64 * MIB).0.spool().unwrap();
    let (taken, error) = work(&spool, 200);
    assert!(error.is_none() && taken == 200, "{taken} {error:?}");
}

#[test]
fn whatever_call_fails_nothing_else_comes_back() {
    let (mut n, mut lost) = (0, 0);
    loop {
        n += 1;
        let disk = Disk::default();
        let (cache, metrics) = disk.cache(64 * MIB);
        let spool = cache.spool().unwrap();
        locked(&disk.0).fails = Some(n);
        // What was synced before comes back exactly: it is compared there.
        let (taken, error) = work(&spool, 40);
        if locked(&disk.0).calls < n {
            break;
        }
        match error {
            Some(error) => assert_eq!(error.code(), 1351, "call {n}: {error:?}"),
            None => assert!(spool.is_broken(), "call {n}"),
        }
        lost += u64::from(taken < 40);
        drop(spool);
        assert_eq!(metrics.used_bytes(), 0, "call {n}");
        assert_eq!(locked(&disk.0).files, 0, "call {n}");
    }
    assert!(n > 100 && lost + 1 == n, "{n} calls, {lost} losses");
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let mut found = 0;
    for every in 1..60 {
        let disk = Disk::default();
        locked(&disk.0).flips = Some(every);
        let spool = disk.cache(64 * MIB).0.spool().unwrap();
        if let (_, Some(error)) = work(&spool, 30) {
            assert_eq!(error.code(), 1352, "{error:?}");
            found += 1;
        }
    }
    assert!(found > 50, "{found}");
}

#[test]
fn a_full_cache_takes_no_more_and_harms_nobody() {
    let disk = Disk::default();
    let (cache, metrics) = disk.cache(3 * MIB);
    let (first, second) = (cache.spool().unwrap(), cache.spool().unwrap());
    let (delta, bytes) = (DeltaId::new(), vec![5; 60_000]);
    let fill = |spool: &Spool| {
        let mut records = 0;
        while spool.append(delta, &bytes).unwrap() == Appended::Yes {
            records += 1;
        }
        records
    };
    let records = fill(&first);
    assert!((30..36).contains(&records), "{records}");
    assert!(fill(&second) > 5);
    assert!(metrics.used_bytes() <= 3 * MIB);
    first.sync().unwrap();
    assert!(!first.is_broken());
    for _ in 0..records {
        assert_eq!(first.take().unwrap().1, bytes);
    }
    assert!(fill(&first) > 5, "there is room again");
}

/// Nothing of a disk's content may lie on another disk in the clear.
#[test]
fn what_lies_there_is_sealed() {
    #[derive(Default, Clone)]
    struct Seen(Arc<Mutex<Vec<u8>>>);
    impl Medium for Seen {
        fn create(&self) -> io::Result<Box<dyn Backing>> {
            Ok(Box::new(self.clone()))
        }
    }
    impl Backing for Seen {
        fn write_at(&self, bytes: &[u8], _: u64) -> io::Result<usize> {
            locked(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Ok(0)
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let seen = Seen::default();
    let cache = Cache::over(Arc::new(seen.clone()), MIB, &CacheMetrics::default());
    let spool = cache.spool().unwrap();
    let secret = b"the content of somebody's disk";
    spool.append(DeltaId::new(), secret).unwrap();
    spool.append(DeltaId::new(), secret).unwrap();
    let seen = locked(&seen.0);
    assert_eq!(seen.len(), 2 * (HEADER_BYTES + secret.len() + TAG_BYTES));
    assert!(!seen.windows(8).any(|part| secret.windows(8).any(|known| known == part)));
    let half = seen.len() / 2;
    assert_ne!(seen[HEADER_BYTES..half], seen[half + HEADER_BYTES..], "each has a nonce of its own");
}
