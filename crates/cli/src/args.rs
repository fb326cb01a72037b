//! The command line. Help, man page and completions come from here.

mod group;
mod keep;
mod values;

pub(crate) use group::{CreatePoint, GroupVerb, Members, PointVerb};
pub(crate) use keep::{KeepVerb, PolicyVerb, SetPolicy};
pub(crate) use values::Every;
use values::{parse_bytes, parse_percent, parse_time};

use clap::{Args, Parser, Subcommand};
use highwater_delta::CommitId;
use highwater_group::Marker;
use highwater_vault::keys::{KeyCommand, WrappingId};
use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

/// Recovers machines from a Highwater vault.
///
/// Works straight from the vault and its key; no collector has to run.
#[derive(Debug, Parser)]
#[command(name = "highwater", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The vault: a directory, a bucket like s3://BUCKET/PREFIX?region=REGION, or another collector like
    /// highwater://HOST:9443?identity=DIR [default: the collector's]
    #[arg(long, global = true, env = "HIGHWATER_VAULT", value_name = "DIR|URL")]
    pub(crate) vault: Option<String>,
    /// Open the vault with this key file [default: with what the collector opens it with]
    #[arg(
        long = "key-file",
        visible_alias = "key",
        global = true,
        env = "HIGHWATER_KEY",
        value_name = "FILE"
    )]
    pub(crate) key: Option<PathBuf>,
    /// Open the vault with a passphrase, which is asked for on the terminal
    #[arg(long, global = true)]
    pub(crate) passphrase: bool,
    /// Open the vault with the passphrase in this file, which only its owner may read
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// Open the vault with an external command, as for a key management service; split at spaces
    #[arg(long, global = true, value_name = "COMMAND")]
    pub(crate) key_command: Option<KeyCommand>,
    /// Where the collector's configuration is
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help = "Where the collector's configuration is [default: /etc/highwater/collector.toml]"
    )]
    pub(crate) config: Option<PathBuf>,
    /// Keep what was read of machines in this directory, encrypted, so that lists are fast; "none": keep nothing. It may be deleted
    /// at any time [default: highwater in $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, global = true, env = "HIGHWATER_INDEX", value_name = "DIR")]
    pub(crate) index: Option<PathBuf>,
    /// Write one JSON document, a stable contract, instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List the machines of the vault
    Machines,
    /// List a machine's recovery points
    Points {
        /// Id, unambiguous begin of an id, or host name
        machine: String,
    },
    /// Groups: machines whose points are taken at one instant
    Group {
        #[command(subcommand)]
        verb: GroupVerb,
    },
    /// Points that are made now
    Point {
        #[command(subcommand)]
        verb: PointVerb,
    },
    /// Recover a machine's disks at a point into raw files, or one disk onto a block device
    Recover(Recover),
    /// Read everything back and check it; the same as `vault verify`
    Verify(Verify),
    /// The vault itself: what opens it, how long points are kept, and erasing machines
    Vault {
        #[command(subcommand)]
        verb: VaultVerb,
    },
    /// Write a completion script
    Completions {
        /// For which shell
        shell: highwater_manual::Shell,
    },
    /// Write the man page
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VaultVerb {
    /// What opens the vault: key files, passphrases, external commands
    Key {
        #[command(subcommand)]
        verb: KeyVerb,
    },
    #[command(flatten)]
    Keep(KeepVerb),
    /// Read everything back, or a part of it, and check it
    Verify(Verify),
    /// Verify everything, make anew what can be, delete what nobody names, and say what is lost
    Repair(Repair),
    /// Erase a machine: its key is deleted, and nobody can read anything of it again but in copies that still hold that key
    EraseMachine(EraseMachine),
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// One machine only: id, unambiguous begin of an id, or host name
    pub(crate) machine: Option<String>,
    /// Read only so many percent of the segments and maps, chosen at random; of the others it is seen that they are there [default: all]
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    pub(crate) sample: Option<f64>,
    /// Choose as an earlier run did, which said its seed
    #[arg(long, value_name = "N", requires = "sample")]
    pub(crate) seed: Option<u64>,
    /// Bytes read a second, like 64MiB [default: as many as it can]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) rate: Option<u64>,
    /// Keep how far it is in this file, and go on from there if it is there already; it is removed at the end
    #[arg(long, value_name = "FILE")]
    pub(crate) resume: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Repair {
    /// One machine only: id, unambiguous begin of an id, or host name
    pub(crate) machine: Option<String>,
    /// How old objects that no record names must be to be deleted
    #[arg(long, default_value = "1day", value_name = "TIME", value_parser = parse_time)]
    pub(crate) grace: Duration,
    /// Bytes read and written a second, like 64MiB [default: as many as it can]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) rate: Option<u64>,
    /// Keep how far the verification is in this file, and go on from there if it is there already
    #[arg(long, value_name = "FILE")]
    pub(crate) resume: Option<PathBuf>,
    /// Show what would be done, and what is lost as it is now
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Don't ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EraseMachine {
    /// Id, unambiguous begin of an id, or host name
    pub(crate) machine: String,
    /// Don't ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyVerb {
    /// List what opens the vault
    List,
    /// Add a key
    Add {
        #[command(flatten)]
        new: NewKey,
        /// A note for people
        #[arg(long, default_value = "")]
        label: String,
    },
    /// Remove a key; the last one stays
    Remove {
        /// As `list` shows it
        id: WrappingId,
        /// Don't ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Replace a key by a new one; the data is not rewritten
    Rotate {
        /// As `list` shows it
        id: WrappingId,
        #[command(flatten)]
        new: NewKey,
        /// Don't ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct NewKey {
    /// A key file, which is made if it is not there
    #[arg(long, value_name = "FILE")]
    pub(crate) new_key_file: Option<PathBuf>,
    /// A passphrase of at least 12 characters, which is asked for on the terminal
    #[arg(long)]
    pub(crate) new_passphrase: bool,
    /// The passphrase in this file, which only its owner may read
    #[arg(long, value_name = "FILE")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
    /// An external command, called with `wrap` or `unwrap` behind its arguments; split at spaces
    #[arg(long, value_name = "COMMAND")]
    pub(crate) new_key_command: Option<KeyCommand>,
}

#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// Id, unambiguous begin of an id, or host name
    #[arg(required_unless_present = "group", conflicts_with = "group")]
    pub(crate) machine: Option<String>,
    /// All members of this group, as they were at one instant, each into a directory of its own: name, id, or unambiguous begin of an id
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,
    /// Of the group these members only
    #[arg(long = "machine", id = "members", value_name = "MACHINE", requires = "group")]
    pub(crate) members: Vec<String>,
    /// The recovery point's number, of a group its marker; or `latest`, or `latest-application`
    #[arg(long, value_name = "N|MARKER|latest|latest-application", value_parser = parse_point)]
    pub(crate) point: PointChoice,
    /// One disk only: name, id, or unambiguous begin of an id
    #[arg(long, conflicts_with = "group")]
    pub(crate) disk: Option<String>,
    /// A directory for raw files (made if absent), or a block device, which is OVERWRITTEN
    #[arg(long, value_name = "DIR|DEVICE")]
    pub(crate) to: PathBuf,
    /// Parts under way at once [default: the number of processors]
    #[arg(long)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// On a device, write all blocks instead of those that differ
    #[arg(long)]
    pub(crate) all_blocks: bool,
    /// Recover what can be read, though something of it is damaged or missing in the vault: that becomes zeros and is listed, and a file is
    /// named ….img.damaged
    #[arg(long)]
    pub(crate) skip_damaged: bool,
    /// Don't ask before a device is overwritten
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PointChoice {
    Latest,
    LatestApplication,
    Number(CommitId),
    Marker(Marker),
}

fn parse_point(text: &str) -> Result<PointChoice, String> {
    match text {
        "latest" => Ok(PointChoice::Latest),
        "latest-application" => Ok(PointChoice::LatestApplication),
        name => match (name.parse(), name.parse()) {
            (Ok(number), _) => Ok(PointChoice::Number(number)),
            (_, Ok(marker)) => Ok(PointChoice::Marker(marker)),
            _ => Err("a recovery point's number or marker, `latest` or `latest-application` is expected"
                .to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        <super::Cli as clap::CommandFactory>::command().debug_assert();
    }
}
