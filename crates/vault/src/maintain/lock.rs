//! Locks of the store on what immutable points need, where it has them and they are wanted ([`crate::location::LockMode`]): what Highwater
//! promises of these points then holds against whoever has the store's credentials too.
//!
//! # Contract
//!
//! - An object is locked for a generation: until a while after the end of every point's immutability that is known, and for all of them a moment
//!   of few. So it is locked anew once in a generation, of a quarter of the time that is promised, an hour to a week; and what is
//!   new in between, when maintenance next comes by. Until then it is not locked.
//! - Locked is all that these points are recovered with: the vault's file and newest keys, policies, what is said of the machine's groups and their points, the
//!   machine's key, records, checkpoints and marks, and what its runs and shortcuts name, old content too.
//! - What was locked is remembered by this process alone: another one locks everything once more, which changes nothing.
//! - Reads: the segment tables of maps that are new, and lists of records when there are new ones.
//! - Memory: some 24 bytes an object.

use super::Maintainer;
use crate::{
    Result, VaultError,
    maps::rows,
    policy::Rules,
    runs::{Content, Kind},
    segment::SegmentReader,
    store::{self, ObjectLock, object_path},
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::MachineId;
use object_store::path::Path;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Locks asked for at once.
const DEPTH: usize = 8;
/// They are gone on with for so long after the first that failed.
const FAILING_MAX: Duration = Duration::from_secs(60);
const GENERATION_MIN_MS: u64 = 3_600_000;
const GENERATION_MAX_MS: u64 = 7 * 86_400_000;
/// Objects that are remembered; beyond that all of a machine are locked anew each time.
const REMEMBERED_MAX: usize = 4 << 20;

/// What was locked, by machine.
#[derive(Debug, Default)]
pub struct Locks(Mutex<HashMap<MachineId, Locked>>);

#[derive(Debug, Default)]
struct Locked {
    /// Until then.
    until_ms: u64,
    /// The last record of which all is.
    last_record: u64,
    /// By the hash of its path; of maps whose tables were read, also with [`READ`] behind it.
    objects: HashSet<u128>,
}

/// Behind a map's path: what it names is locked.
const READ: &str = "#";

impl Locks {
    fn all(&self) -> MutexGuard<'_, HashMap<MachineId, Locked>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What is to be remembered of a machine for a lock until then.
    fn begin(&self, machine: MachineId, until_ms: u64) -> u64 {
        let mut all = self.all();
        let own = all.entry(machine).or_default();
        if own.until_ms != until_ms {
            *own = Locked { until_ms, ..Locked::default() };
        }
        own.last_record
    }
    fn has(&self, machine: MachineId, name: &str) -> bool {
        self.all().get(&machine).is_some_and(|own| own.objects.contains(&hash(name)))
    }
    fn note(&self, machine: MachineId, name: &str) {
        let mut all = self.all();
        if all.values().map(|own| own.objects.len()).sum::<usize>() < REMEMBERED_MAX {
            all.entry(machine).or_default().objects.insert(hash(name));
        }
    }
    fn through(&self, machine: MachineId, last_record: u64) {
        self.all().entry(machine).or_default().last_record = last_record;
    }
    fn forget(&self, machine: MachineId) {
        self.all().remove(&machine);
    }
}

fn hash(name: &str) -> u128 {
    let mut first = [0; 16];
    first.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    u128::from_le_bytes(first)
}

/// Until when all is locked of which the longest is promised for `promised_ms`, and ends at a moment: the end of the generation after that.
fn generation(promised_ms: u64, immutable_until_ms: u64) -> u64 {
    let ms = (promised_ms / 4).clamp(GENERATION_MIN_MS, GENERATION_MAX_MS);
    (immutable_until_ms / ms).saturating_add(2).saturating_mul(ms)
}

impl Maintainer {
    /// Locks what immutable points need and is not locked yet, if the store is to. Answers how many objects.
    ///
    /// # Errors
    /// The first, after all else was locked.
    pub(super) async fn lock(&self, rules: &Rules, now_ms: u64) -> Result<u64> {
        let (state, vault) = (&self.journal.state, &self.journal.vault);
        let Some(lock) = vault.object_lock() else { return Ok(0) };
        let machine = state.machine;
        let until = state.points.iter().map(|point| rules.immutable_until_ms(point.stored_at_ms)).max();
        let Some(until_ms) = until.filter(|until_ms| *until_ms > now_ms) else {
            self.settings.locks.forget(machine);
            return Ok(0);
        };
        let until_ms = generation(rules.immutable_for_ms_max(), until_ms);
        let before = self.settings.locks.begin(machine, until_ms);
        let named = self.named().await?;
        let documents = match before == state.last_record {
            true => Vec::new(),
            false => self.documents().await?,
        };
        let wanted = documents.into_iter().chain(named.paths);
        let wanted = wanted.filter(|path| !self.settings.locks.has(machine, path.as_ref())).collect();
        let locked = self.retain(lock, wanted, until_ms).await?;
        for map in named.maps {
            self.settings.locks.note(machine, &format!("{map}{READ}"));
        }
        self.settings.locks.through(machine, state.last_record);
        named.damage.map_or(Ok(locked), Err)
    }

    async fn retain(&self, lock: &Arc<dyn ObjectLock>, paths: Vec<Path>, until_ms: u64) -> Result<u64> {
        let machine = self.journal.machine;
        let mut asked = stream::iter(paths)
            .map(|path| async move { (lock.retain(&path, until_ms).await, path) })
            .buffer_unordered(DEPTH);
        let (mut locked, mut failed, mut since) = (0, Ok(()), None);
        while let Some((done, path)) = asked.next().await {
            match done {
                Ok(()) => {
                    locked += 1;
                    self.settings.locks.note(machine, path.as_ref());
                }
                // Merged away, or replaced by a later one, since it was listed.
                Err(VaultError::Missing { .. }) => {}
                Err(error) => {
                    failed = failed.and(Err(error));
                    if since.get_or_insert_with(Instant::now).elapsed() > FAILING_MAX {
                        break;
                    }
                }
            }
        }
        failed.map(|()| locked)
    }

    /// What the machine's runs name, and the maps that were read for that.
    async fn named(&self) -> Result<Named> {
        let (state, vault) = (&self.journal.state, &self.journal.vault);
        let mut named = Named::default();
        // Readers begin with them.
        let shortcuts = state.shortcuts.iter().flat_map(|shortcut| &shortcut.maps);
        named.paths.extend(shortcuts.map(|map| object_path(state.machine, Kind::Map, map.id)));
        for run in &state.runs {
            let kind = if run.is_merged() { Kind::Map } else { Kind::Segment };
            named
                .paths
                .extend(run.objects().iter().map(|object| object_path(state.machine, kind, object.id)));
            let Content::Maps { maps, .. } = &run.content else { continue };
            for map in maps {
                let path = object_path(state.machine, Kind::Map, map.id);
                if self.settings.locks.has(state.machine, &format!("{path}{READ}")) {
                    continue;
                }
                let store = vault.store().clone();
                let reader = SegmentReader::new(store, state.machine, &self.journal.keys, Kind::Map, map)?;
                let rows = match rows(&reader).await {
                    // What it names is not known; all else is locked.
                    Err(error) if error.is_damage() => {
                        named.damage.get_or_insert(error);
                        continue;
                    }
                    rows => rows?,
                };
                named.paths.extend(rows.iter().map(|row| object_path(state.machine, row.kind, row.id)));
                named.maps.push(path);
            }
        }
        Ok(named)
    }

    /// What a reader begins with.
    async fn documents(&self) -> Result<Vec<Path>> {
        let (machine, store) = (self.journal.machine, self.journal.vault.store());
        let mut paths = vec![store::vault_path(), store::key_path(machine)];
        let listed = async |dir: Path| -> Result<Vec<Path>> {
            Ok(store.list(Some(&dir)).map_ok(|meta| meta.location).try_collect().await?)
        };
        // Of keys only the newest: older ones were to be gone.
        paths.extend(listed(store::keys_dir()).await?.into_iter().max());
        for dir in [store::manifest_dir(machine), store::checkpoint_dir(machine), store::pruned_dir(machine)]
        {
            paths.extend(listed(dir).await?);
        }
        for whose in [machine.to_string(), "default".to_owned()] {
            paths.extend(listed(store::control_dir(&format!("policies/{whose}"))).await?);
        }
        let groups = self.journal.vault.groups_known().await.ever_of(machine);
        if !groups.is_empty() {
            paths.extend(listed(store::control_dir("groups")).await?);
        }
        for group in groups {
            paths.extend(listed(store::control_dir(&format!("group-points/{group}"))).await?);
        }
        Ok(paths)
    }
}

#[derive(Default)]
struct Named {
    paths: Vec<Path>,
    maps: Vec<Path>,
    /// Why some could not be read.
    damage: Option<VaultError>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_outlasts_what_is_promised_and_is_seldom_another() {
        let hour = GENERATION_MIN_MS;
        for promised in [1, 5, 24, 100, 24 * 30, 24 * 3650] {
            let mut seen = HashSet::new();
            // Points each minute of a day, each promised as long.
            for minute in 0..24 * 60 {
                let until = 1_800_000_000_000 + minute * 60_000 + promised * hour;
                let locked = generation(promised * hour, until);
                assert!(locked > until + hour && locked <= until + 2 * GENERATION_MAX_MS, "{promised}");
                seen.insert(locked);
            }
            assert!(
                seen.len() as u64 <= 24 / (promised / 4).clamp(1, 24 * 7) + 1,
                "{promised}: {}",
                seen.len()
            );
        }
        assert_eq!(generation(1, u64::MAX), u64::MAX);
    }
}
