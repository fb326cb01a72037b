//! How old a write gets before it is stored, at given rates, with a point every second and a vault on this machine's disk.

use anyhow::Result;
use highwater_tests::Arena;

use super::seconds;
use super::site::Ordered;
use crate::Choice;
use crate::results::Results;

const RATES_MB_PER_S: [u64; 4] = [10, 50, 100, 200];
const SECONDS: u32 = 15;
const SECONDS_QUICK: u32 = 5;
const BLOCKS: [(&str, u32); 2] = [("64 KiB", 64 << 10), ("4 KiB", 4 << 10)];

/// Whose processor time an [`Outcome`] tells.
///
/// [`Outcome`]: super::site::Outcome
const WHOSE: [&str; 3] = ["the agent", "its reader of the stream", "the collector"];

/// See the module.
pub fn rpo(arena: &Arena, choice: &Choice, results: &mut Results) -> Result<()> {
    for (name, block) in BLOCKS {
        for rate in RATES_MB_PER_S {
            let site = Ordered::start(arena, vec!["point-interval = \"1s\"".into()])?;
            let done = site.load(arena, block, rate, seconds(choice, SECONDS, SECONDS_QUICK))?;
            site.dismiss()?;
            let what = format!("{rate} MB/s of {name}");
            let target = if rate == 100 { "p99 <= 2 s" } else { "" };
            results.row(&format!("{what}: written"), &done.mb_per_s.into(), "MB/s", "");
            results.row("  age of the oldest write not stored, by the points", &done.ages, "s", "");
            results.row("  its p99", &done.ages.quantile(0.99).into(), "s", target);
            results.row("  points taken under the load", &(done.points as f64).into(), "", "");
            results.row("  points older than they say, by", &done.younger, "s", "<= 0.01");
            let target = if rate == 200 { "0 (a core)" } else { "" };
            results.row("  write-ordered mode left", &(done.left as f64).into(), "times", target);
            results.row("  held in memory at the end of the load", &done.held_mib.into(), "MiB", "");
            results.row("  all stored after the end of the load", &done.catch_up_s.into(), "s", "");
            for (of, (a_gb, part)) in WHOSE.iter().zip(done.cpu_s_per_gb.iter().zip(done.cpu_part)) {
                results.row(&format!("  processor time of {of}, a GB"), &(*a_gb).into(), "s", "");
                results.row("    part of one processor", &part.into(), "", "");
            }
            if let Some(reason) = done.reason {
                results.note(format!("{what}: write-ordered mode was left: {reason}."));
            }
        }
    }
    results.note(
        "The age is told whenever a point is stored: from the marker of the point before to then, so it is the greatest that any write of\n\
         that point reached. With so few points p99 is the greatest. Writes are half noise, half what compresses, all over 512 MiB.\n\
         By how much points are older than they say is read in some recovered ones: in a block that is given the time every 10 ms.",
    );
    Ok(())
}
