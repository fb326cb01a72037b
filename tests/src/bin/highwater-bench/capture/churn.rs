//! The highest churn that default settings bear: write-ordered mode is not left, and points are taken.

use anyhow::Result;
use highwater_tests::Arena;

use super::seconds;
use super::site::Ordered;
use crate::Choice;
use crate::results::Results;

const STEPS_MB_PER_S: [u64; 6] = [50, 100, 200, 400, 800, 1600];
const SECONDS: u32 = 20;
/// Default settings take a point every 5 s.
const SECONDS_QUICK: u32 = 8;
const BLOCK_BYTES: u32 = 64 << 10;
/// A load that reaches less than this part of its rate is as much as this machine writes.
const REACHED: f64 = 0.9;

/// See the module.
pub fn churn(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    let mut borne = 0.0_f64;
    for rate in STEPS_MB_PER_S {
        let site = Ordered::start(arena, vec![])?;
        let done = site.load(arena, BLOCK_BYTES, rate, seconds(choice, SECONDS, SECONDS_QUICK))?;
        site.dismiss()?;
        results.row(&format!("churn of {rate} MB/s: written"), &done.mb_per_s.into(), "MB/s", "");
        results.row("  held in memory at its end", &done.held_mib.into(), "MiB", "");
        results.row("  all stored after its end", &done.catch_up_s.into(), "s", "");
        results.row("  points taken under it", &(done.points as f64).into(), "", "one in 5 s");
        results.row("  age of the oldest write not stored", &done.ages, "s", "");
        results.row("  points older than they say, by", &done.younger, "s", "<= 0.01");
        let left = done.left as f64;
        results.row("  write-ordered mode left", &left.into(), "times", if rate <= 200 { "0" } else { "" });
        if let Some(reason) = done.reason {
            results.note(format!("Churn of {rate} MB/s: write-ordered mode was left: {reason}."));
            break;
        }
        if done.points == 0 {
            results.note(format!(
                "Churn of {rate} MB/s: no point was taken under it, so it does not count as borne."
            ));
        } else {
            borne = borne.max(done.mb_per_s);
        }
        if done.mb_per_s < REACHED * rate as f64 {
            results.note(format!("{rate} MB/s are more than this machine writes beside the daemons."));
            break;
        }
    }
    results.row(
        "highest churn borne, default settings",
        &borne.into(),
        "MB/s",
        ">= 200 a core; ASR: 54 to 100",
    );
    results.note(
        "A churn counts as borne if write-ordered mode was not left while it lasted, and points were taken. What is held in memory at its end, and how long it\n\
         took to store all, say whether it could have gone on.",
    );
    Ok(())
}
