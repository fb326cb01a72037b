//! Who works on the vault: writers, maintainers and an operator at each of several collectors, with clocks of their own.

use super::{
    sea::{Dice, Line, Passage, Shore},
    witness::{Ledger, Outcome, Written},
};
use crate::{Clock, Hold, Result, Vault, VaultError, VaultKey, maintain, tests::support::*};
use highwater_delta::*;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::time::{sleep, timeout};

pub const BLOCKS: u64 = 24;

/// What the machines would send next.
#[derive(Default)]
pub struct Machines {
    version: AtomicU32,
    /// A delta whose outcome is not known may be sent again.
    again: Mutex<BTreeMap<MachineId, (DeltaId, Written)>>,
}

pub struct Collector {
    pub passage: Arc<Passage>,
    pub vault: Vault,
    skew_ms: Arc<AtomicI64>,
    pub dice: Dice,
    owner: maintain::Owner,
    ledger: Arc<Ledger>,
    machines: Arc<Machines>,
}

impl Collector {
    pub async fn new(
        shore: &Arc<Shore>,
        passage: Arc<Passage>,
        key: &VaultKey,
        ledger: &Arc<Ledger>,
        machines: &Arc<Machines>,
        seed: u64,
    ) -> Self {
        let skew_ms = Arc::new(AtomicI64::new(0));
        let (of, right) = (skew_ms.clone(), shore.clone());
        let clock = Clock::doubtful(move || right.now_ms().saturating_add_signed(of.load(SeqCst)));
        let vault = loop {
            if let Ok(vault) = Vault::open(Arc::new(Line(passage.clone())), key).await {
                break vault.with_clock(clock);
            }
        };
        let (dice, ledger, machines) = (Dice::new(seed), ledger.clone(), machines.clone());
        let collector =
            Self { passage, vault, skew_ms, dice, owner: maintain::Owner::new(), ledger, machines };
        collector.turn_clock();
        collector
    }

    /// By seconds, minutes, hours or days, forward or back.
    pub fn turn_clock(&self) {
        let dice = &self.dice;
        let most_s = [5, 5, 540, 540, 3 * 3600, 40 * 86400][dice.below(6) as usize];
        let skew = dice.below(2 * most_s * 1000) as i64 - (most_s * 1000) as i64;
        self.skew_ms.store(skew, SeqCst);
    }
    pub fn set_right(&self) {
        self.skew_ms.store(0, SeqCst);
        self.passage.calm_down();
    }

    /// Clocks that jump, and a network that is cut for anything between a second and hours.
    pub async fn trouble(&self) {
        loop {
            sleep(self.dice.seconds(60..5400)).await;
            if self.dice.percent(50) {
                self.turn_clock();
            }
            let most_s = [20, 300, 14_000][self.dice.below(3) as usize];
            self.passage.cut(self.dice.seconds(1..most_s));
        }
    }

    /// Sessions of a machine, each of which may end at any moment.
    pub async fn write(&self, machine: MachineId) {
        loop {
            sleep(self.dice.seconds(10..1800)).await;
            let session = self.session(machine);
            let done = match self.dice.percent(30) {
                true => timeout(self.dice.seconds(1..600), session).await.unwrap_or(Ok(())),
                false => session.await,
            };
            sound(done);
        }
    }

    async fn session(&self, machine: MachineId) -> Result<()> {
        let dice = &self.dice;
        let mut writer = self.vault.writer(machine).await?;
        let hash = writer.hash_key();
        for _ in 0..dice.within(1..12) {
            let again = self.machines.again.lock().unwrap().remove(&machine);
            let (delta, written) = match again {
                Some(again) if dice.percent(50) => again,
                _ => (DeltaId::new(), self.some_blocks()),
            };
            self.ledger.begin(delta, &written);
            self.machines.again.lock().unwrap().insert(machine, (delta, written.clone()));
            writer.set_disks(records(BLOCKS))?;
            writer.begin(delta).await?;
            for (disk, start, versions) in &written {
                writer.push(chunk(*disk, *start, versions, &hash)).await?;
                if dice.percent(20) {
                    sleep(dice.seconds(1..200)).await;
                }
            }
            if dice.percent(5) {
                writer.abort().await?;
                continue;
            }
            let kind = if dice.percent(85) { point(BLOCKS) } else { CommitKind::Partial };
            let done = writer.commit(kind).await;
            match &done {
                Ok(commit) => self.ledger.end(delta, Outcome::Stored(*commit)),
                Err(VaultError::Fenced(_)) => self.ledger.end(delta, Outcome::Never),
                Err(_) => {}
            }
            // One that was fenced is built anew by its agent.
            if !matches!(done, Err(ref e) if !matches!(e, VaultError::Fenced(_))) {
                self.machines.again.lock().unwrap().remove(&machine);
            }
            done?;
            sleep(dice.seconds(1..400)).await;
        }
        Ok(())
    }

    fn some_blocks(&self) -> Written {
        let dice = &self.dice;
        let one = |_| {
            let start = dice.below(BLOCKS);
            let count = dice.within(1..7).min(BLOCKS - start);
            let first = self.machines.version.fetch_add(count as u32, SeqCst) + 1;
            (disk(10 + dice.below(2) as u8), start, (first..first + count as u32).collect())
        };
        (0..dice.below(4)).map(one).collect()
    }

    /// Maintains all machines now and then, and may be killed at it.
    pub async fn maintain(&self, machines: &[MachineId], grace: Duration) {
        loop {
            sleep(self.dice.seconds(60..1800)).await;
            for machine in machines {
                let patience = self.dice.percent(50).then_some(Duration::from_secs(900));
                let round = self.maintain_one(*machine, grace, patience);
                let done = match self.dice.percent(20) {
                    true => timeout(self.dice.seconds(1..120), round).await.unwrap_or(Ok(())),
                    false => round.await,
                };
                sound(done);
            }
        }
    }

    pub async fn maintain_one(
        &self,
        machine: MachineId,
        grace: Duration,
        patience: Option<Duration>,
    ) -> Result<()> {
        let settings = maintain::Settings {
            grace,
            records_for: grace,
            owner: self.owner,
            patience,
            ..maintain::Settings::default()
        };
        maintain::machine(&self.vault, machine, &settings, &()).await.map(drop)
    }

    /// Holds points and lets them go.
    pub async fn operate(&self, machines: &[MachineId]) {
        loop {
            sleep(self.dice.seconds(600..7200)).await;
            let machine = machines[self.dice.below(machines.len() as u64) as usize];
            let held = async {
                let points = self.vault.machine(machine).await?.points;
                let Some(last) = points.len().checked_sub(1) else { return Ok(()) };
                let point = points[last - self.dice.below(points.len() as u64) as usize].id;
                let hold = [None, Some(Hold::Pin), Some(Hold::Legal)][self.dice.below(3) as usize];
                maintain::set_hold(&self.vault, machine, point, hold, String::new()).await
            };
            sound(held.await);
        }
    }
}

/// Whatever happens, nobody finds anything damaged.
fn sound(done: Result<()>) {
    match done {
        Ok(()) => {}
        Err(
            VaultError::Store(_)
            | VaultError::Dead
            | VaultError::Fenced(_)
            | VaultError::Maintained(_)
            | VaultError::Clock(_)
            // What is held may have expired meanwhile, or be under hold.
            | VaultError::UnknownPoint(_)
            | VaultError::UnderHold(_)
            // By one who was cut off for longer than the grace.
            | VaultError::Missing { .. },
        ) => {}
        Err(error) => panic!("{error}"),
    }
}
