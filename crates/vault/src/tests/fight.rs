//! Several collectors fight over the machines of one vault: a simulation.
//!
//! Writers, maintainers and operators of each work at once, over a network that loses, delays and reorders their requests, is cut for
//! hours, and goes on delivering after they have died; by clocks that are off by seconds to weeks, and jump. One thread, and time that is
//! paused: a seed decides everything but the random parts of keys and names. What must hold whatever comes is in [`witness`].
//!
//! `HIGHWATER_SEED` brings one run back; `HIGHWATER_SEEDS` tries so many.

mod copy;
mod crew;
mod sea;
mod witness;

use super::support::*;
use crate::{
    Vault,
    policy::{Policy, Tier, set_policy},
    verify,
};
use crew::{Collector, Machines};
use highwater_delta::MachineId;
use sea::{Dice, Line, Passage, Shore, Weather};
use std::{sync::Arc, time::Duration};
use tokio::{task::JoinSet, time::sleep};
use witness::{Tally, Witness};

const COLLECTORS: u64 = 3;
const GRACE: Duration = Duration::from_secs(1800);
const LENGTH: Duration = Duration::from_secs(8 * 3600);
/// How often everything is looked at.
const LOOKS: u32 = 24;

fn policy(dice: &Dice) -> Policy {
    let minutes = |n: u64| Duration::from_secs(n * 60);
    let tiers = vec![Tier { every: minutes(30), keep_for: minutes(180) }];
    let immutable_for = if dice.percent(30) { minutes(90) } else { Duration::ZERO };
    Policy { keep_all: minutes(40), tiers, immutable_for }
}

/// One run; answers what it came to, and a sum over all that was recorded.
async fn run(seed: u64) -> (Tally, blake3::Hash) {
    let (shore, dice) = (Shore::new(), Dice::new(seed));
    let key = key();
    let calm = Vault::create(Arc::new(Line(Passage::calm(&shore))), &key).await.unwrap();
    let right = shore.clone();
    let calm = calm.with_clock(crate::Clock::new(move || right.now_ms()));
    let machines: Vec<MachineId> =
        (1..=1 + dice.below(2)).map(|n| MachineId::from_bytes([n as u8; 16])).collect();
    for machine in &machines {
        calm.register_machine(*machine, "web").await.unwrap();
    }
    let policy = policy(&dice);
    set_policy(&calm, None, Some(policy.clone()), shore.now_ms()).await.unwrap();
    let mut witness = Witness::new(shore.clone(), calm.clone(), &machines, policy).await;
    let weather = match dice.below(3) {
        0 => Weather { stopped: 4, ..Weather::default() },
        1 => Weather { lost_before: 1, lost_after: 1, late: 1, stopped: 2 },
        _ => Weather { lost_before: 4, lost_after: 4, late: 4, stopped: 1 },
    };
    let sending = Arc::new(Machines::default());
    let mut crew = JoinSet::new();
    let mut collectors = Vec::new();
    for _ in 0..COLLECTORS {
        let passage = Passage::new(&shore, dice.next(), weather);
        let made = Collector::new(&shore, passage, &key, &witness.ledger, &sending, dice.next()).await;
        let collector = Arc::new(made);
        collectors.push(collector.clone());
        for machine in machines.clone() {
            let collector = collector.clone();
            crew.spawn_local(async move { collector.write(machine).await });
        }
        let (one, all) = (collector.clone(), machines.clone());
        crew.spawn_local(async move { one.maintain(&all, GRACE).await });
        let (one, all) = (collector.clone(), machines.clone());
        crew.spawn_local(async move { one.operate(&all).await });
        crew.spawn_local(async move { collector.trouble().await });
    }
    // At any time, and with all of the time there is.
    let began = Duration::from_millis(dice.below(LENGTH.as_millis() as u64 / 2));
    let (of, pace) = (shore.clone(), dice.next());
    let copying = tokio::task::spawn_local(async move {
        sleep(began).await;
        copy::copy(&of, GRACE, pace).await
    });
    let mut read_back = 0;
    for look in 1..=LOOKS {
        sleep(LENGTH / LOOKS).await;
        // One of them failed: that is what there is to say.
        while let Some(ended) = crew.try_join_next() {
            ended.unwrap();
        }
        witness.look();
        if look % 6 == 0 {
            read_back += witness.read_back().await;
        }
    }
    read_back += witness.compare(&copying.await.unwrap(), &key).await;
    // All are killed. What is under way arrives, and what is left works as if nothing had been.
    crew.shutdown().await;
    sleep(Duration::from_secs(2 * 3600)).await;
    for collector in &collectors {
        collector.set_right();
        for machine in &machines {
            let mut writer = collector.vault.writer(*machine).await.unwrap();
            let (delta, nothing) = (highwater_delta::DeltaId::new(), vec![]);
            witness.ledger.begin(delta, &nothing);
            writer.set_disks(records(crew::BLOCKS)).unwrap();
            writer.begin(delta).await.unwrap();
            let commit = writer.commit(point(crew::BLOCKS)).await.unwrap();
            witness.ledger.end(delta, witness::Outcome::Stored(commit));
            collector.maintain_one(*machine, GRACE, None).await.unwrap();
        }
        read_back += witness.read_back().await;
    }
    let report = verify::verify_vault(&calm).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    let tally = Tally { read_back, ..witness.tally() };
    (tally, witness.trace.finalize())
}

fn simulate(seed: u64) -> (Tally, blake3::Hash) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, run(seed))
}

fn asked(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn whatever_was_told_as_stored_is_and_nothing_else() {
    let (first, count) = match (asked("HIGHWATER_SEED"), asked("HIGHWATER_SEEDS")) {
        (Some(seed), _) => (seed, 1),
        (None, Some(count)) => (u64::from(std::process::id()) << 32, count),
        (None, None) => (1, 24),
    };
    let mut all = Tally::default();
    for seed in first..first + count {
        let one = std::panic::catch_unwind(|| simulate(seed));
        match one {
            Ok((tally, _)) => all += tally,
            Err(cause) => {
                eprintln!("HIGHWATER_SEED={seed}");
                std::panic::resume_unwind(cause);
            }
        }
    }
    println!("{count} runs: {all:?}");
    if count > 20 {
        assert!(all.fights > 100 && all.fenced > 10 && all.expired > 100, "{all:?}");
    }
}

#[test]
fn a_seed_brings_a_run_back() {
    assert_eq!(simulate(7).1, simulate(7).1);
}
