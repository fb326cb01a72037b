//! What is known of a machine: read from its records, with whatever shortens that.

use super::Vault;
use crate::{
    MachineState, Result, VaultError,
    key::MachineKeys,
    record::Envelope,
    seal::{self, DOCUMENT_BYTES_MAX},
    state, store,
    vault::STATE_BYTES_MAX,
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::MachineId;
use object_store::path::Path;

/// Records fetched at once while a history is replayed, and their bytes, unless one alone has more.
const REPLAY_DEPTH: u64 = 64;
const REPLAY_BYTES: u64 = 4 << 20;
/// Records replayed between two looks at how much memory the state takes.
const RECORDS_A_LOOK: u64 = 1024;
/// How much more memory a state takes than its documents have bytes, at most: a point without disks and its run take some 230
/// bytes, and 17 in a checkpoint.
const STATE_TO_DOCUMENT: u64 = 16;
/// What an empty state takes.
const STATE_BYTES_LEAST: u64 = 16 * 1024;
/// The local index is written anew after so many records.
const REINDEXED_AFTER: usize = 16;

/// Records behind a checkpoint, of which there are some hundreds: 64 MiB of memory.
const RECORDS_MAX: usize = 4 << 20;
/// Times that a history is begun to be read.
const TRIES: usize = 4;

/// Numbers and bytes, sorted.
type Checkpoints = Vec<(u64, u64)>;
/// The same.
pub(crate) type Records = Vec<(u64, u64)>;

/// Where a replay begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// At the first record.
    #[cfg_attr(not(feature = "fuzz"), allow(dead_code, reason = "fuzzing makes its own checkpoints"))]
    First,
    /// At the newest good checkpoint.
    Checkpoint,
    /// With what the local index says, if there is one.
    Index,
}

impl Vault {
    /// What a machine's keys are, and what its records say. Nobody's keys are kept for longer than this vault's value lives, and only
    /// those of the machine that was read last.
    pub(crate) async fn load_machine(
        &self,
        machine: MachineId,
        bytes_max: u64,
    ) -> Result<(MachineKeys, MachineState)> {
        let is_indexed = self.index.as_deref().is_some_and(|index| index.has(self.id(), machine));
        // A far store is waited for once less.
        let list = async {
            match is_indexed {
                true => Ok(None),
                false => self.checkpoints(machine).await.map(Some),
            }
        };
        let (found, listed) = futures::future::join(self.machine_keys(machine), list).await;
        let ((keys, host_name), listed) = (found?, listed?);
        let state = self.load_listed(machine, &keys, host_name, Begin::Index, bytes_max, listed).await?;
        self.keep_keys(machine, &keys);
        Ok((keys, state))
    }

    /// Replays a machine's records.
    pub(crate) async fn load_state(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        host_name: String,
        begin: Begin,
    ) -> Result<MachineState> {
        self.load_state_within(machine, keys, host_name, begin, u64::MAX).await
    }

    /// The same, within so many bytes of memory.
    pub(crate) async fn load_state_within(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        host_name: String,
        begin: Begin,
        bytes_max: u64,
    ) -> Result<MachineState> {
        self.load_listed(machine, keys, host_name, begin, bytes_max, None).await
    }

    /// The same, with a list of the checkpoints, if it is at hand.
    async fn load_listed(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        host_name: String,
        begin: Begin,
        bytes_max: u64,
        mut listed: Option<Checkpoints>,
    ) -> Result<MachineState> {
        let index = self.index.as_deref().filter(|_| begin == Begin::Index);
        if let Some(index) = index
            && let Some(state) = index.read(self.id(), machine, keys, bytes_max)
            && self.is_of_record(&state).await?
        {
            let records = self.records_after(machine, state.last_record).await?;
            let is_worth_it = records.len() >= REINDEXED_AFTER;
            match self.replay(state, keys, records, bytes_max).await {
                Ok(state) => {
                    if is_worth_it {
                        index.write(self.id(), keys, &state);
                    }
                    return Ok(state);
                }
                // Records were deleted, or are damaged: a checkpoint behind them may be of use.
                Err(VaultError::Missing { .. } | VaultError::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut tries = 0;
        let state = loop {
            let checkpoints = match (begin, listed.take()) {
                (Begin::First, _) => Vec::new(),
                (_, Some(listed)) => listed,
                (_, None) => self.checkpoints(machine).await?,
            };
            let (state, records) = match self.newest_checkpoint(machine, keys, bytes_max, checkpoints).await?
            {
                Some(found) => found,
                None => {
                    let state = MachineState::empty(machine, host_name.clone());
                    (state, self.records_after(machine, 0).await?)
                }
            };
            tries += 1;
            let base = state.last_record;
            match self.replay(state, keys, records, bytes_max).await {
                // Whoever was held up between two requests until the records were deleted begins anew: there is a newer checkpoint.
                Err(error) if tries < TRIES && self.were_deleted(&error, machine, base).await? => {}
                other => break other?,
            }
        };
        if let Some(index) = index {
            index.write(self.id(), keys, &state);
        }
        Ok(state)
    }

    /// What is known of a machine up to a record that cannot be read, and why that cannot be. What was merged behind it may have been deleted.
    ///
    /// # Errors
    /// The store fails; the machine's key, or all its checkpoints, cannot be read. [`VaultError::Order`]: no record is damaged.
    pub async fn machine_before_damage(&self, machine: MachineId) -> Result<(MachineState, VaultError)> {
        let (keys, host_name) = self.machine_keys(machine).await?;
        let checkpoints = self.checkpoints(machine).await?;
        let found = self.newest_checkpoint(machine, &keys, STATE_BYTES_MAX, checkpoints).await?;
        let (mut state, records) = match found {
            Some(found) => found,
            None => (MachineState::empty(machine, host_name), self.records_after(machine, 0).await?),
        };
        for (number, bytes) in records {
            // A record that does not apply may have changed something before that was seen.
            match self.replay(state.clone(), &keys, vec![(number, bytes)], STATE_BYTES_MAX).await {
                Ok(next) => state = next,
                Err(error) if error.is_damage() => return Ok((state, error)),
                Err(error) => return Err(error),
            }
        }
        Err(VaultError::Order("no record of it is damaged"))
    }

    /// Whether records behind that one could not be read because they were deleted meanwhile: others who were held up may have found
    /// their numbers free.
    pub(crate) async fn were_deleted(
        &self,
        error: &VaultError,
        machine: MachineId,
        after: u64,
    ) -> Result<bool> {
        match error {
            VaultError::Missing { .. } | VaultError::Corrupt { .. } => {
                store::exists(&**self.store(), &store::pruned_path(machine, after + 1)).await
            }
            _ => Ok(false),
        }
    }

    /// Whether the vault's record of that number is the one that a state says it has taken in last: a vault that was put back to
    /// what it was earlier, and went on otherwise, has others.
    async fn is_of_record(&self, state: &MachineState) -> Result<bool> {
        let path = store::manifest_path(state.machine, state.last_record);
        match store::read_object(&**self.store(), &path, DOCUMENT_BYTES_MAX).await {
            Ok(sealed) => Ok(*blake3::hash(&sealed).as_bytes() == state.chain),
            Err(error @ VaultError::Store(_)) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Takes records in, given by number and size, all that follow the state up to the last of them.
    pub(crate) async fn replay(
        &self,
        mut state: MachineState,
        keys: &MachineKeys,
        records: Records,
        bytes_max: u64,
    ) -> Result<MachineState> {
        let machine = state.machine;
        let within = |state: &MachineState| match state.memory_bytes() {
            bytes if bytes > bytes_max => Err(VaultError::StateFull { machine, bytes, bytes_max }),
            _ => Ok(()),
        };
        let depth = replay_depth(&records);
        for (expected, (number, _)) in (state.last_record + 1..).zip(&records) {
            // A hole would cut off everything after it, silently.
            if expected != *number && expected == 1 {
                return Err(VaultError::no_checkpoint(machine));
            }
            if expected != *number {
                let object = store::manifest_path(machine, expected).to_string();
                return Err(VaultError::Missing { object });
            }
        }
        let mut fetched = stream::iter(records)
            .map(|(number, bytes)| {
                let path = store::manifest_path(machine, number);
                async move {
                    // No more than it was listed with, by which the memory was reckoned.
                    let bytes_max = bytes.min(DOCUMENT_BYTES_MAX);
                    let sealed = store::read_object(&**self.store(), &path, bytes_max).await?;
                    Ok::<_, VaultError>((path, sealed))
                }
            })
            .buffered(depth as usize);
        while let Some((path, sealed)) = fetched.try_next().await? {
            let envelope = open_record(keys, &path, &sealed)?;
            state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref())?;
            if state.last_record.is_multiple_of(RECORDS_A_LOOK) {
                within(&state)?;
            }
        }
        within(&state)?;
        Ok(state)
    }

    /// Bytes of memory that [`Vault::machine_within`] or [`Vault::writer_within`] take at most, in passing too. Told from the
    /// sizes of the machine's documents: none is read.
    pub async fn load_bytes(&self, machine: MachineId, state_bytes_max: u64) -> Result<u64> {
        let checkpoints = self.checkpoints(machine).await?;
        let newest = checkpoints.iter().rev().find(|(_, bytes)| *bytes <= DOCUMENT_BYTES_MAX);
        let (number, checkpoint) = newest.copied().unwrap_or((0, 0));
        self.check_checkpoint(machine, checkpoint, state_bytes_max)?;
        let records = self.records_after(machine, number).await?;
        let largest = largest(&records);
        let all = records.iter().fold(checkpoint, |all, (_, bytes)| all.saturating_add(*bytes));
        // Each document is there sealed and open while it is read.
        let passing = checkpoint.max(largest.saturating_mul(replay_depth(&records))).saturating_mul(2);
        let state = all.saturating_mul(STATE_TO_DOCUMENT).saturating_add(STATE_BYTES_LEAST);
        Ok(state.min(state_bytes_max).saturating_add(passing))
    }

    /// What stands in a checkpoint takes more as a state.
    fn check_checkpoint(&self, machine: MachineId, bytes: u64, bytes_max: u64) -> Result<()> {
        if bytes.saturating_sub(seal::OVERHEAD_BYTES) > bytes_max {
            return Err(VaultError::StateFull { machine, bytes, bytes_max });
        }
        Ok(())
    }

    /// Numbers and sizes of the records after one, sorted.
    pub(crate) async fn records_after(&self, machine: MachineId, after: u64) -> Result<Records> {
        let dir = store::manifest_dir(machine);
        let offset = store::manifest_path(machine, after);
        let mut listed = self.store().list_with_offset(Some(&dir), &offset);
        let mut records = Records::new();
        while let Some(meta) = listed.try_next().await? {
            let number = store::number_of(&meta.location).filter(|number| *number > after);
            records.extend(number.map(|number| (number, meta.size)));
            // A store that lists without end.
            if records.len() > RECORDS_MAX {
                return Err(VaultError::Limit("records of a machine"));
            }
        }
        records.sort_unstable();
        Ok(records)
    }

    /// The newest good one of these, and what follows it.
    async fn newest_checkpoint(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        bytes_max: u64,
        mut checkpoints: Checkpoints,
    ) -> Result<Option<(MachineState, Records)>> {
        // Earlier releases wrote checkpoints that were too large to be read.
        checkpoints.retain(|(_, bytes)| *bytes <= DOCUMENT_BYTES_MAX);
        while let Some((number, bytes)) = checkpoints.pop() {
            self.check_checkpoint(machine, bytes, bytes_max)?;
            // A checkpoint only shortens the replay: one that is damaged is passed over here, and named by verify.
            let read = self.read_checkpoint_within(machine, keys, number, bytes);
            let (state, records) = futures::future::join(read, self.records_after(machine, number)).await;
            match state {
                Ok(state) => return Ok(Some((state, records?))),
                Err(VaultError::Store(e)) => return Err(VaultError::Store(e)),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    pub(crate) async fn checkpoint_numbers(&self, machine: MachineId) -> Result<Vec<u64>> {
        Ok(self.checkpoints(machine).await?.into_iter().map(|(number, _)| number).collect())
    }

    /// Numbers and sizes of the checkpoints, sorted.
    async fn checkpoints(&self, machine: MachineId) -> Result<Checkpoints> {
        let mut found: Checkpoints = self
            .store()
            .list(Some(&store::checkpoint_dir(machine)))
            .try_filter_map(async |meta| {
                Ok(store::number_of(&meta.location).map(|number| (number, meta.size)))
            })
            .try_collect()
            .await?;
        found.sort_unstable();
        Ok(found)
    }

    pub(crate) async fn read_checkpoint(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        number: u64,
    ) -> Result<MachineState> {
        self.read_checkpoint_within(machine, keys, number, DOCUMENT_BYTES_MAX).await
    }

    /// The same, of no more than so many bytes.
    async fn read_checkpoint_within(
        &self,
        machine: MachineId,
        keys: &MachineKeys,
        number: u64,
        bytes_max: u64,
    ) -> Result<MachineState> {
        let path = store::checkpoint_path(machine, number);
        let sealed = store::read_object(&**self.store(), &path, bytes_max).await?;
        let plain = seal::open(&keys.manifest, &path, &sealed)?;
        let state = state::decode(&plain).map_err(|e| VaultError::corrupt(&path, e.to_string()))?;
        if state.machine != machine || state.last_record != number {
            return Err(VaultError::corrupt(&path, "it does not fit its name"));
        }
        Ok(state)
    }
}

fn largest(records: &[(u64, u64)]) -> u64 {
    records.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0)
}

/// How many records are fetched at once.
fn replay_depth(records: &[(u64, u64)]) -> u64 {
    (REPLAY_BYTES / largest(records).max(1)).clamp(1, REPLAY_DEPTH)
}

/// Opens one manifest record.
pub(crate) fn open_record(keys: &MachineKeys, path: &Path, sealed: &[u8]) -> Result<Envelope> {
    let plain = seal::open(&keys.manifest, path, sealed)?;
    postcard::from_bytes(&plain).map_err(|e| VaultError::corrupt(path, e.to_string()))
}
