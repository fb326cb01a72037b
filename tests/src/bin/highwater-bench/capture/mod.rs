//! What write-ordered capture costs, and what it gives: the writer's rate, the programs' time, the age of what is not stored yet, the
//! churn that it bears, and its freezes beside those of bitmap mode.
//!
//! Rates are 10^6 bytes a second, times seconds or milliseconds as the rows say. What is compared is measured in turn in one run.
//! Everything lies in the arena and goes with it; the kernel's statistics are switched back.

mod churn;
mod freezes;
mod probe;
mod programs;
mod rpo;
mod site;
mod stored;
mod stream;
mod writer;

use anyhow::Result;
use highwater_tests::Arena;

use crate::Choice;
use crate::agent::RunDir;
use crate::results::Results;

const MIB: u64 = 1 << 20;
/// 10^6 bytes.
const MB: f64 = 1e6;

type Part = fn(&Arena, &Choice, &mut Results) -> Result<()>;
/// What there is to measure, by name.
pub const PARTS: [(&str, Part); 5] = [
    ("writer", writer::writer),
    ("programs", programs::programs),
    ("rpo", rpo::rpo),
    ("churn", churn::churn),
    ("freezes", freezes::freezes),
];

/// All of it, or the part chosen.
pub fn measure(choice: &Choice) -> Result<Results> {
    let arena = Arena::enter("bench-capture")?;
    let _run = RunDir;
    let mut results = Results::default();
    for (name, part) in PARTS {
        if choice.part.as_ref().is_none_or(|chosen| chosen == name) {
            eprintln!("{name}");
            part(&arena, choice, &mut results)?;
        }
    }
    results.note(
        "Azure Site Recovery, for comparison, states: churn of at most 54 MB/s a machine (100 in its high-churn variant), a\n\
         crash-consistent point every 5 minutes, and freezes of up to 60 s for application-consistent ones.",
    );
    if choice.quick {
        results.note(
            "Short loads and few rounds (--quick): this shows that everything runs, and measures little.",
        );
    }
    Ok(results)
}

/// The length of a load: `whole` seconds, or `tiny` ones if it is only to be seen that it runs.
fn seconds(choice: &Choice, whole: u32, tiny: u32) -> u32 {
    if choice.quick { tiny } else { whole }
}
