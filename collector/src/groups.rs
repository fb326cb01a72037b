//! Replication groups, as far as a collector has to do with them: it tells members who belongs to their group, takes their words on markers into
//! the vault, and passes on that a point is wanted.
//!
//! What groups there are, what is a point of one, and where members are reached stands in the vault ([`highwater_vault::groups`]): so a group's members may
//! have their sessions with any collectors of it.
//!
//! - [`desk`]: the sessions, and what each is to hear.
//! - [`failures`]: markers that came to nothing one after the other.
//! - [`rosters`]: every two seconds, what groups there are.
//! - [`markers`]: what members say of markers; once a minute, what nobody decided.
//! - [`wanted`]: every two seconds, points that are asked for.
//!
//! **Limits.** A machine's words on markers come out of an allowance, and where it is reached out of another; what is
//! said beyond that is passed over, and counted. What waits for a decision is bounded by the vault.
//!
//! **Failure.** While the groups cannot be read, members go by the rosters that they have.

pub mod address;
pub mod desk;
pub mod failures;
pub mod markers;
pub mod rosters;
pub mod wanted;

pub use desk::{Desk, Line, Order};

use crate::rounds::{self, Rounds};
use crate::shared::Shared;
use highwater_delta::Code;
use highwater_vault::VaultError;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked what groups there are, and what is wanted.
const EVERY: Duration = Duration::from_secs(2);
/// How often it is looked for markers on which nobody decided.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// Sweeps between two tidyings.
const SWEEPS_A_TIDYING: u32 = 60;
/// Failures in a row between two lines in the log.
const FAILURES_A_LINE: u32 = 30;

/// Runs until the collector ends.
pub async fn run(shared: Arc<Shared>) {
    let mut watch =
        Watch { shared: shared.clone(), wanted: wanted::Wanted::new(shared.clone()), failures: 0 };
    let mut sweep = Sweep { shared: shared.clone(), n: 0, failures: 0, damaged: HashSet::new() };
    tokio::join!(
        rounds::run(&shared.shutdown, EVERY, &mut watch),
        rounds::run(&shared.shutdown, Duration::from_secs(1), &mut sweep)
    );
}

struct Watch {
    shared: Arc<Shared>,
    wanted: wanted::Wanted,
    failures: u32,
}

impl Rounds for Watch {
    async fn round(&mut self) -> Duration {
        let done = async {
            rosters::refresh(&self.shared).await?;
            self.wanted.look().await
        };
        told(done.await, &mut self.failures);
        EVERY
    }
}

struct Sweep {
    shared: Arc<Shared>,
    n: u32,
    failures: u32,
    /// What was told of documents that cannot be read.
    damaged: HashSet<String>,
}

impl Rounds for Sweep {
    async fn round(&mut self) -> Duration {
        let tidy = self.n.is_multiple_of(SWEEPS_A_TIDYING);
        self.n = self.n.wrapping_add(1);
        told(markers::sweep(&self.shared, tidy, &mut self.damaged).await, &mut self.failures);
        SWEEP_EVERY
    }
}

/// Says now and then that something fails.
fn told(done: Result<(), VaultError>, failures: &mut u32) {
    match done {
        Ok(()) => *failures = 0,
        Err(error) => {
            if failures.is_multiple_of(FAILURES_A_LINE) {
                tracing::warn!(code = %Code(error.code()), %error, action = error.action(), "groups cannot be looked after; it is tried again");
            }
            *failures = failures.wrapping_add(1);
        }
    }
}
