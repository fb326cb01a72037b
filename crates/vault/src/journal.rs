//! Putting records: each takes the next number, and only one can.
//!
//! Writers and maintainers of one machine work on one chain of records, from any number of processes. Whoever finds a number
//! taken reads what was put there ([`Journal::catch_up`]) and sees from that whether it may go on.
//!
//! **Who is far behind.** Records that a checkpoint makes needless are deleted ([`crate::maintain`]), so that a number may be free that
//! was taken once. Before they are, a mark is created for their numbers: whoever has put a record looks for it then, and finds that
//! it was fenced long ago ([`VaultError::Fenced`]). What it has put is beneath every checkpoint, so that nobody reads it.
//!
//! **Unknown outcome.** Whether a record that failed to be put has been stored after all cannot be known for certain: such a
//! journal is dead, and the next one reads what is true.

use crate::{
    MachineState, Result, Vault, VaultError,
    key::{MachineKeys, random},
    record::{Envelope, is_maintainers},
    seal, state, store,
    vault::{Begin, STATE_BYTES_MAX, open_record},
};
use highwater_delta::MachineId;

/// Times that a record's number may be taken by others.
const TRIES: usize = 64;
/// Records read by one [`Journal::catch_up`]; who is behind by more than that reads everything anew.
const CATCH_UP_MAX: usize = 4096;

/// The records of a machine, and their fold.
pub(crate) struct Journal {
    pub(crate) vault: Vault,
    pub(crate) machine: MachineId,
    pub(crate) keys: MachineKeys,
    pub(crate) state: MachineState,
    host_name: String,
    /// Tells its records from those of others.
    identity: [u8; 16],
    dead: bool,
    last_checkpoint: u64,
    state_bytes_max: u64,
}

impl Journal {
    /// Reads a machine's history, if its state takes no more than so many bytes of memory.
    pub(crate) async fn open(vault: Vault, machine: MachineId, state_bytes_max: u64) -> Result<Self> {
        vault.refuse_erased(machine).await?;
        let (keys, host_name) = vault.machine_keys(machine).await?;
        let mut identity = [0; 16];
        random(&mut identity)?;
        let last_checkpoint = vault.checkpoint_numbers(machine).await?.pop().unwrap_or(0);
        let state = vault
            .load_state_within(machine, &keys, host_name.clone(), Begin::Checkpoint, state_bytes_max)
            .await?;
        Ok(Self {
            vault,
            machine,
            keys,
            state,
            host_name,
            identity,
            dead: false,
            last_checkpoint,
            state_bytes_max,
        })
    }

    pub(crate) fn identity(&self) -> [u8; 16] {
        self.identity
    }
    pub(crate) fn is_dead(&self) -> bool {
        self.dead
    }
    pub(crate) fn state_bytes_max(&self) -> u64 {
        self.state_bytes_max
    }

    /// Reads everything anew.
    pub(crate) async fn reload(&mut self) -> Result<()> {
        let (keys, host_name) = (&self.keys, self.host_name.clone());
        let load = self.vault.load_state_within(
            self.machine,
            keys,
            host_name,
            Begin::Checkpoint,
            self.state_bytes_max,
        );
        self.state = load.await?;
        Ok(())
    }

    /// Puts the next record; false if its number is somebody else's. Fenced long ago, it stays dead. It is dead from the begin of the put
    /// until that is known to have succeeded, so that a dropped future cannot leave it believing anything.
    pub(crate) async fn put(&mut self, kind: u16, epoch: u64, body: Vec<u8>) -> Result<bool> {
        if self.dead {
            return Err(VaultError::Dead);
        }
        let number = self.state.last_record + 1;
        let stored_at_ms = self.vault.stamp_ms().await?;
        let envelope = Envelope {
            number,
            previous: self.state.chain,
            writer: self.identity,
            epoch,
            stored_at_ms,
            kind,
            body,
        };
        let path = store::manifest_path(self.machine, number);
        let plain = postcard::to_stdvec(&envelope).map_err(|_| VaultError::Limit("bytes of a record"))?;
        if plain.len() as u64 > STATE_BYTES_MAX {
            return Err(VaultError::Limit("bytes of a record"));
        }
        let sealed = seal::seal(&self.keys.manifest, &path, &plain)?;
        let hash = *blake3::hash(&sealed).as_bytes();
        // What could not be read again must not be recorded.
        let mut next = self.state.clone_for_maintenance(kind);
        if let Some(next) = &mut next {
            next.apply(&envelope, hash, path.as_ref())?;
        }
        self.dead = true;
        let store = self.vault.store();
        if !store::create_own(&**store, &path, sealed).await? {
            self.dead = false;
            return Ok(false);
        }
        if store::exists(&**store, &store::pruned_path(self.machine, number)).await? {
            return Err(VaultError::Fenced(self.machine));
        }
        match next {
            Some(next) => self.state = next,
            None => self.state.apply(&envelope, hash, path.as_ref())?,
        }
        self.dead = false;
        Ok(true)
    }

    /// Puts a record that is right whatever writers put meanwhile, as long as the state `fits`; false if it does not, or the record could
    /// not be put, or, for a maintainer's, another one has begun.
    pub(crate) async fn put_after_others(
        &mut self,
        kind: u16,
        body: &[u8],
        fits: impl Fn(&MachineState) -> bool,
    ) -> Result<bool> {
        let maintainer = self.state.maintainer;
        for _ in 0..TRIES {
            if !fits(&self.state) {
                break;
            }
            if self.put(kind, self.state.epoch, body.to_vec()).await? {
                self.checkpoint().await;
                return Ok(true);
            }
            let others = self.catch_up().await?;
            let is_fenced = is_maintainers(kind) && self.state.maintainer != maintainer;
            if others.is_empty() || is_fenced {
                break;
            }
        }
        Ok(false)
    }

    /// Takes in what others have put; answers the kinds of their records. After an error it is dead: what it had taken in
    /// would be forgotten.
    pub(crate) async fn catch_up(&mut self) -> Result<Vec<u16>> {
        let was_dead = std::mem::replace(&mut self.dead, true);
        let kinds = self.read_on().await?;
        self.dead = was_dead;
        Ok(kinds)
    }

    async fn read_on(&mut self) -> Result<Vec<u16>> {
        let mut kinds = Vec::new();
        for _ in 0..CATCH_UP_MAX {
            let path = store::manifest_path(self.machine, self.state.last_record + 1);
            let store = self.vault.store();
            let sealed = match store::read_object(&**store, &path, seal::DOCUMENT_BYTES_MAX).await {
                Err(VaultError::Missing { .. }) => break,
                other => other?,
            };
            let envelope = open_record(&self.keys, &path, &sealed)?;
            let applied = self.state.apply(&envelope, *blake3::hash(&sealed).as_bytes(), path.as_ref());
            if let Err(error) = applied {
                // Of others who were held up for as long, and found numbers free again: the last that was taken in may be such a one, too.
                let marks = [self.state.last_record, envelope.number];
                let mut is_late = false;
                for number in marks.into_iter().filter(|number| *number > 0) {
                    is_late |= store::exists(&**store, &store::pruned_path(self.machine, number)).await?;
                }
                return Err(if is_late { VaultError::Fenced(self.machine) } else { error });
            }
            kinds.push(envelope.kind);
        }
        Ok(kinds)
    }

    /// Stores a checkpoint if one is due. Its failure harms nothing: the next record tries again.
    pub(crate) async fn checkpoint(&mut self) {
        let number = self.state.last_record;
        if number < self.last_checkpoint + self.state.checkpoint_interval() {
            return;
        }
        let path = store::checkpoint_path(self.machine, number);
        let Ok(plain) = state::encode(&self.state) else { return };
        // Nobody could read it. A state within its limit never gets here.
        if plain.len() as u64 > STATE_BYTES_MAX {
            return;
        }
        let Ok(sealed) = seal::seal(&self.keys.manifest, &path, &plain) else { return };
        if store::create_object(&**self.vault.store(), &path, sealed).await.is_ok() {
            self.last_checkpoint = number;
        }
    }
}
