//! `group` and `point`: machines whose points are taken at one instant, and points that are made now.

use super::values::{Every, parse_every, parse_time};
use clap::{Args, Subcommand};
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum GroupVerb {
    /// Make a group of machines whose points are taken at one instant
    Create {
        /// What people call it: 1 to 64 characters
        name: String,
        /// A member: id, unambiguous begin of an id, or host name; give it for each. A machine belongs to one group at most
        #[arg(long = "machine", value_name = "MACHINE", required = true)]
        machines: Vec<String>,
        /// Between points of which filesystems are frozen, like 5min; "never": none by themselves
        #[arg(long, value_name = "TIME", default_value = "5min", value_parser = parse_every)]
        crash_every: Every,
        /// Between points of which applications are prepared by their hooks, like 1h; "never": none by themselves
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_every)]
        application_every: Every,
        /// How long a member may be frozen for a point, at most
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
        hold: Duration,
        /// How long a member's hooks may take, at most
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
        prepare: Duration,
    },
    /// Add machines to a group
    Add(Members),
    /// Take machines out of a group; the points that it has stay as they are
    Remove(Members),
    /// Say how often a group's points are made, and how long its members may be held
    Set {
        /// Name, id, or unambiguous begin of an id
        group: String,
        /// Another name
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// See `group create`
        #[arg(long, value_name = "TIME", value_parser = parse_every)]
        crash_every: Option<Every>,
        /// See `group create`
        #[arg(long, value_name = "TIME", value_parser = parse_every)]
        application_every: Option<Every>,
        /// See `group create`
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        hold: Option<Duration>,
        /// See `group create`
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        prepare: Option<Duration>,
    },
    /// Delete a group; its machines go on by themselves, and the points that it has stay
    Delete {
        /// Name, id, or unambiguous begin of an id
        group: String,
        /// Don't ask
        #[arg(long, short)]
        yes: bool,
    },
    /// List the groups
    List,
    /// Show a group: its members, its newest point, and who is waited for
    Show {
        /// Name, id, or unambiguous begin of an id; of one that was deleted, of its id
        group: String,
    },
    /// List a group's points: those of which every member's own point is there
    Points {
        /// Name, id, or unambiguous begin of an id; of one that was deleted, of its id
        group: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Members {
    /// Name, id, or unambiguous begin of an id
    pub(crate) group: String,
    /// Ids, unambiguous begins of ids, or host names
    #[arg(required = true, value_name = "MACHINE")]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PointVerb {
    /// Make a point now, and wait until it is stored; a collector that has a session with the machine passes it on
    Create(CreatePoint),
}

#[derive(Debug, Args)]
pub(crate) struct CreatePoint {
    #[command(flatten)]
    pub(crate) of: PointOf,
    #[command(flatten)]
    pub(crate) kind: PointKind,
    /// How long to wait for it, at most
    #[arg(long, value_name = "TIME", default_value = "10min", value_parser = parse_time)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PointOf {
    /// Of all members of this group, at one instant: name, id, or unambiguous begin of an id
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,
    /// Of this machine: id, unambiguous begin of an id, or host name
    #[arg(long, value_name = "MACHINE")]
    pub(crate) machine: Option<String>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PointKind {
    /// Applications are prepared by their hooks, then filesystems are frozen
    #[arg(long)]
    pub(crate) application: bool,
    /// Filesystems are frozen
    #[arg(long)]
    pub(crate) crash: bool,
}
