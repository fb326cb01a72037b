//! `vault plan`, `maintain`, `policy`, `pin`, `hold`, `release`: how long points are kept.

use super::values::{parse_bytes, parse_tier, parse_time};
use clap::{Args, Subcommand};
use highwater_delta::CommitId;
use highwater_vault::policy::Tier;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum KeepVerb {
    /// Show which points expire now, and what would be merged and deleted
    Plan {
        /// One machine only: id, unambiguous begin of an id, or host name
        machine: Option<String>,
        /// How long objects stay that nothing refers to any more
        #[arg(long, default_value = "6h", value_name = "TIME", value_parser = parse_time)]
        grace: Duration,
    },
    /// Let points expire as policies say, and merge what lay between them; beside a collector that runs
    Maintain {
        /// One machine only: id, unambiguous begin of an id, or host name
        machine: Option<String>,
        /// How long objects stay that nothing refers to any more, for readers that began before
        #[arg(long, default_value = "6h", value_name = "TIME", value_parser = parse_time)]
        grace: Duration,
        /// Bytes read and written a second, like 64MiB [default: as many as it can]
        #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
        rate: Option<u64>,
        /// Don't ask before points expire
        #[arg(long, short)]
        yes: bool,
    },
    /// How long recovery points are kept
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
    /// Keep a recovery point, whatever the policy says
    Pin(HoldPoint),
    /// Put a recovery point under legal hold
    Hold(HoldPoint),
    /// Let a pinned or held recovery point expire again
    Release {
        /// Id, unambiguous begin of an id, or host name
        machine: String,
        /// The recovery point's number
        point: CommitId,
        /// Do not ask, if it is under legal hold
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct HoldPoint {
    /// Id, unambiguous begin of an id, or host name
    pub(crate) machine: String,
    /// The recovery point's number
    pub(crate) point: CommitId,
    /// Why, for people
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyVerb {
    /// Show what holds
    Show {
        /// A machine [default: what holds for machines without a policy of their own]
        machine: Option<String>,
    },
    /// Set it
    Set(SetPolicy),
    /// Let the default policy hold for a machine again
    Reset {
        /// Id, unambiguous begin of an id, or host name
        machine: String,
        /// Don't ask, though points would no longer be kept
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SetPolicy {
    /// A machine [default: all machines without a policy of their own]
    pub(crate) machine: Option<String>,
    /// Every point is kept for so long
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) keep_all: Duration,
    /// Then one point of each EVERY, for TIME, like 1h:1day; may be given several times, each coarser and for longer
    #[arg(long, value_name = "EVERY:TIME", value_parser = parse_tier)]
    pub(crate) tier: Vec<Tier>,
    /// No point that there is, or that is stored from now on, goes before; can't be taken back
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = parse_time)]
    pub(crate) immutable_for: Duration,
    /// Don't ask, though points would no longer be kept, or could not go for --immutable-for
    #[arg(long, short)]
    pub(crate) yes: bool,
}
