//! A store whose calls fail by chance, early or late, are slow, overtake each other, are done twice, bring less than there is or
//! tell of a moment ago. Every operation succeeds exactly or is a typed error that fits, and the vault holds what was acknowledged.

use crate::conform::{self, BLOCK, DISK_BLOCKS};
use anyhow::{Context, Result, ensure};
use highwater_delta::{CommitId, DeltaId, DiskId, HashKey, MachineId};
use highwater_faults::{Faulty, Rates};
use highwater_tests::Random;
use highwater_vault::{DiskRecord, MachineWriter, Store, Vault, VaultError, VaultKey, verify};

const DELTAS: usize = 14;
/// Times that something is tried again before the misfortune is taken to be a defect.
const TRIES_MAX: usize = 40;

/// A delta that was sent, and what is known of it.
struct Sent {
    delta: DeltaId,
    first: u64,
    blocks: u64,
    seed: u64,
    known: Known,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Stored(CommitId),
    /// Its commit was asked for, and no answer came.
    Unclear,
    NotStored,
}

struct Client<'a> {
    vault: &'a Vault,
    hash: HashKey,
    machine: MachineId,
    disk: DiskId,
    sent: Vec<Sent>,
    errors: usize,
}

/// The whole life of a machine in a vault on such a store.
pub async fn survives(open: impl Fn() -> Result<Store>, seed: u64) -> Result<()> {
    let key = VaultKey::generate()?;
    let calm = Vault::create(open()?, &key).await?;
    let (machine, disk) = (MachineId::new(), DiskId::new());
    let mut layer = None;
    let store = open()?.layered(|objects| layer.insert(Faulty::new(objects)).clone());
    let layer = layer.context("it was laid")?;
    let vault = Vault::open(store, &key).await?;
    layer.at_random(Some((seed, Rates::HARSH)));
    retried(|| vault.register_machine(machine, "here")).await?;
    claims_are_exclusive(&vault, &calm).await?;
    let hash = calm.hash_key(machine).await?;
    let mut client = Client { vault: &vault, hash, machine, disk, sent: Vec::new(), errors: 0 };
    let mut random = Random::new(seed);
    let mut writer = None;
    for n in 0..DELTAS {
        // Now and then a writer is dropped with nothing wrong.
        if random.below(8) == 0 {
            writer = None;
        }
        let mut at_hand = match writer.take() {
            Some(writer) => writer,
            None => match client.writer().await? {
                Some(writer) => writer,
                None => continue,
            },
        };
        // Several parts of an upload into a bucket.
        let blocks = if random.below(4) == 0 { 3000 } else { 1 + random.below(60) };
        let first = random.below(DISK_BLOCKS - blocks);
        let seed = random.next_u64();
        let delta = Sent { delta: DeltaId::new(), first, blocks, seed, known: Known::NotStored };
        if client.deliver(&mut at_hand, delta).await? {
            writer = Some(at_hand);
        }
        if n % 3 == 2 {
            client.read_a_point(&mut random).await?;
        }
    }
    layer.at_random(None);
    println!("  {} errors, {} deltas", client.errors, client.sent.len());
    ensure!(client.errors > 0, "nothing failed");
    client.truth(&calm).await
}

/// Errors that a store's misfortune may become.
fn fits(error: &VaultError) -> bool {
    use VaultError::{Corrupt, Dead, Fenced, Missing, Store, UnknownDisk, UnknownPoint};
    matches!(
        error,
        Store(_) | Corrupt { .. } | Missing { .. } | Fenced(_) | Dead | UnknownPoint(_) | UnknownDisk(_)
    )
}

async fn retried<T, F: Future<Output = Result<T, VaultError>>>(mut work: impl FnMut() -> F) -> Result<T> {
    for _ in 0..TRIES_MAX {
        match work().await {
            Ok(done) => return Ok(done),
            Err(error) => ensure!(fits(&error), "{error:?}"),
        }
    }
    anyhow::bail!("it never succeeded")
}

/// Of all who create a document, one at most is told that it did; and what is told is so.
async fn claims_are_exclusive(vault: &Vault, calm: &Vault) -> Result<()> {
    for n in 0..6 {
        let name = format!("claim-{n}");
        let mut winners = 0;
        for who in 0..3_u8 {
            match vault.control_create(&name, &[who]).await {
                Ok(true) => {
                    winners += 1;
                    let there = calm.control_get(&name).await?.context("nothing there")?;
                    ensure!(there.as_slice() == [who], "{who} was told that it had created {there:?}");
                }
                Ok(false) => ensure!(calm.control_get(&name).await?.is_some(), "nothing there"),
                Err(error) => ensure!(fits(&error), "{error:?}"),
            }
        }
        ensure!(winners <= 1, "{winners} created {name}");
    }
    Ok(())
}

impl Client<'_> {
    fn failed(&mut self, error: &VaultError) -> Result<()> {
        self.errors += 1;
        ensure!(fits(error), "{error:?}");
        Ok(())
    }

    async fn writer(&mut self) -> Result<Option<MachineWriter>> {
        match self.vault.writer(self.machine).await {
            Ok(mut writer) => {
                let size_bytes = DISK_BLOCKS * BLOCK as u64;
                writer.set_disks(vec![DiskRecord { disk: self.disk, name: "sda".into(), size_bytes }])?;
                Ok(Some(writer))
            }
            Err(error) => self.failed(&error).map(|()| None),
        }
    }

    /// Whether the writer can go on.
    async fn deliver(&mut self, writer: &mut MachineWriter, mut sent: Sent) -> Result<bool> {
        let chunks = conform::chunks(&self.hash, self.disk, (sent.first, sent.blocks), sent.seed, None)?;
        let pushed = async {
            writer.begin(sent.delta).await?;
            for chunk in chunks {
                writer.push(chunk.into()).await?;
            }
            Ok(())
        };
        let outcome = match pushed.await {
            Ok(()) => {
                sent.known = Known::Unclear;
                let commit = writer.commit(conform::point(self.disk)).await;
                commit.map(|commit| sent.known = Known::Stored(commit))
            }
            Err(error) => Err(error),
        };
        self.sent.push(sent);
        let Err(error) = outcome else { return Ok(true) };
        self.failed(&error)?;
        // As a session does: it tidies up, and the next one begins anew.
        if let Err(error) = writer.abort().await {
            self.failed(&error)?;
        }
        Ok(false)
    }

    /// Reads one of the points that are known to be stored.
    async fn read_a_point(&mut self, random: &mut Random) -> Result<()> {
        let stored: Vec<CommitId> = self.sent.iter().filter_map(|sent| sent.commit()).collect();
        if stored.is_empty() {
            return Ok(());
        }
        let at = stored[random.below(stored.len() as u64) as usize];
        let unclear = self.sent.iter().any(|sent| sent.known == Known::Unclear);
        let read = async {
            let map = self.vault.block_map(self.machine, self.disk, at).await?;
            conform::content(&map).await
        };
        match read.await {
            Err(error) => self.failed(&error),
            // Which of those are beneath it is not known yet.
            Ok(_) if unclear => Ok(()),
            Ok(content) => {
                ensure!(content == self.model(at), "other content was read at {at:?}");
                Ok(())
            }
        }
    }

    /// What the disk holds at a commit.
    fn model(&self, at: CommitId) -> Vec<u8> {
        let mut model = vec![0; DISK_BLOCKS as usize * BLOCK];
        let mut stored: Vec<&Sent> = self.sent.iter().filter(|sent| sent.commit().is_some()).collect();
        stored.sort_by_key(|sent| sent.commit());
        for sent in stored.into_iter().filter(|sent| sent.commit() <= Some(at)) {
            let place = &mut model[sent.first as usize * BLOCK..][..sent.blocks as usize * BLOCK];
            Random::new(sent.seed).fill(place);
        }
        model
    }

    /// Without faults: the vault is whole, and holds what was acknowledged and nothing that was not sent.
    async fn truth(mut self, calm: &Vault) -> Result<()> {
        let report = verify::verify_vault(calm).await?;
        ensure!(report.is_clean(), "{:?}", report.problems);
        let state = calm.machine(self.machine).await?;
        for sent in &mut self.sent {
            let there = state.commit_of(sent.delta);
            match (sent.known, there) {
                (Known::Stored(told), there) => ensure!(there == Some(told), "{told:?} is {there:?}"),
                (Known::NotStored, there) => ensure!(there.is_none(), "{there:?} was never committed"),
                (Known::Unclear, Some(commit)) => sent.known = Known::Stored(commit),
                (Known::Unclear, None) => sent.known = Known::NotStored,
            }
        }
        let mut stored: Vec<CommitId> = self.sent.iter().filter_map(Sent::commit).collect();
        stored.sort_unstable();
        ensure!(state.points.iter().map(|point| point.id).eq(stored.iter().copied()), "other points");
        for at in stored {
            let map = calm.block_map(self.machine, self.disk, at).await?;
            ensure!(conform::content(&map).await? == self.model(at), "other content at {at:?}");
        }
        // The next writer goes on.
        let mut writer = calm.writer(self.machine).await?;
        writer.begin(DeltaId::new()).await?;
        writer.commit(conform::point(self.disk)).await?;
        ensure!(verify::verify_vault(calm).await?.is_clean());
        Ok(())
    }
}

impl Sent {
    const fn commit(&self) -> Option<CommitId> {
        match self.known {
            Known::Stored(commit) => Some(commit),
            _ => None,
        }
    }
}
