//! Reading everything back, or a part of it: authenticity, hashes, whether every commit is reachable, whether maps say what segments
//! hold, and what nobody names.
//!
//! # Contract
//!
//! - All records that are there are replayed, and checkpoints are compared with the outcome; one is believed only where the records before it
//!   were deleted because of it.
//! - It changes nothing, and goes on beside writers and maintainers: what is merged away meanwhile is no damage, and what took its place
//!   is read instead.
//! - A [`Pass`] that was interrupted goes on where it was ([`resume`]), in another process too. It has then read whatever was there when it
//!   began and still is; of what came later, most.
//! - A sample ([`Sample`]) replays all records, sees that every object is there and as long as it should be, and reads a part of them.
//!   Which, its seed tells.
//! - The first failure of the store itself ends it, since that says nothing about the data; the pass can be gone on with.
//! - Memory: [`crate::MachineState`]; some 100 bytes for each object of a machine; one segment's index, or one map's tables and a
//!   reference for each of its pages; 8 MiB of an object; and 32 MiB of indexes that maps are compared with.
//!   [`PROBLEMS_MAX`] problems are told; of more, how many.

mod entries;
mod machine;
mod map;
mod pass;
mod replay;
pub mod resume;
mod sample;
mod segment;
mod strangers;

pub(crate) use replay::by_records;

pub use pass::{Pass, Settings, Watch};
pub use sample::Sample;

use crate::{Result, Vault, VaultError, key::MachineKeys, pace::Pace, runs::ObjectName};
use highwater_delta::{Code, MachineId};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Problems, orphans and strangers that are told, of each.
pub const PROBLEMS_MAX: usize = 10_000;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Machines.
    pub machines: u64,
    /// Manifest records.
    pub records: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Recovery points.
    pub points: u64,
    /// Segments that are named, and were read.
    pub segments: u64,
    /// Maps over merged segments.
    pub maps: u64,
    /// Entries of maps, each compared with the segment that it names.
    pub entries: u64,
    /// Chunks.
    pub chunks: u64,
    /// Blocks with content, each checked against its hash.
    pub blocks: u64,
    /// Bytes of segments and maps.
    pub bytes: u64,
    /// Segments and maps that a sample left out: they are there, and as long as they should be.
    pub not_read: u64,
    /// Control documents.
    pub control_documents: u64,
    /// Segments and maps that nothing names: of a delta under way, or left by an interruption. No damage; the machine's next
    /// writer removes those of an interruption, and [`crate::repair`] what is left of others.
    pub orphans: Vec<String>,
    /// Objects of no kind that is known.
    pub strangers: Vec<String>,
    /// Damage.
    pub problems: Vec<Problem>,
    /// Segments and maps that are damaged or missing.
    pub damaged: Vec<Damaged>,
    /// Problems, orphans and strangers that are not told, since there are too many.
    pub left_out: u64,
}

/// Something damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Problem {
    /// Stable number.
    pub code: Code,
    /// Whose; empty for what belongs to the vault.
    pub machine: Option<MachineId>,
    /// What.
    pub cause: String,
    /// What to do about it.
    pub action: Cow<'static, str>,
}

/// A segment or map that is damaged or missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Damaged {
    /// Whose.
    pub machine: MachineId,
    /// Which.
    pub object: ObjectName,
    /// Of a map: what it says of blocks can be read all the same, and is what its segments hold.
    #[serde(default)]
    pub entries_hold: bool,
}

/// What is read, and how.
struct Place<'a> {
    vault: &'a Vault,
    machine: MachineId,
    keys: &'a MachineKeys,
    pace: &'a Pace,
}

impl Report {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }
    fn problem(&mut self, machine: Option<MachineId>, error: &VaultError) {
        let (code, action) = (Code(error.code()), error.action().into());
        self.tell(Problem { code, machine, cause: error.to_string(), action });
    }
    /// What was told already is not told again: a part may be looked at twice.
    fn tell(&mut self, problem: Problem) {
        if self.problems.contains(&problem) {
            return;
        }
        match self.problems.len() < PROBLEMS_MAX {
            true => self.problems.push(problem),
            false => self.left_out += 1,
        }
    }
    fn absorb(&mut self, other: Self) {
        self.machines += other.machines;
        self.records += other.records;
        self.checkpoints += other.checkpoints;
        self.points += other.points;
        self.segments += other.segments;
        self.maps += other.maps;
        self.entries += other.entries;
        self.chunks += other.chunks;
        self.blocks += other.blocks;
        self.bytes += other.bytes;
        self.not_read += other.not_read;
        self.control_documents += other.control_documents;
        self.left_out += other.left_out;
        other.problems.into_iter().for_each(|problem| self.tell(problem));
        for damaged in other.damaged {
            if !self.damaged.contains(&damaged) {
                self.damaged.push(damaged);
            }
        }
        for (own, others) in [(&mut self.orphans, other.orphans), (&mut self.strangers, other.strangers)] {
            let room = PROBLEMS_MAX.saturating_sub(own.len());
            self.left_out += others.len().saturating_sub(room) as u64;
            own.extend(others.into_iter().take(room));
        }
    }
    /// Keeps damage; failures of the store itself end the verification, since they say nothing about the data.
    fn keep<T>(&mut self, machine: Option<MachineId>, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error @ VaultError::Store(_)) => Err(error),
            Err(error) => {
                self.problem(machine, &error);
                Ok(None)
            }
        }
    }
}

/// Verifies all machines and the control documents, in full.
pub async fn verify_vault(vault: &Vault) -> Result<Report> {
    Pass::new(vault, None, None).run(vault, &Settings::default(), &()).await
}

/// Verifies one machine, in full.
pub async fn verify_machine(vault: &Vault, machine: MachineId) -> Result<Report> {
    Pass::new(vault, Some(machine), None).run(vault, &Settings::default(), &()).await
}

/// Checks one segment or map as a verification does.
#[cfg(test)]
pub(crate) async fn check_object(
    vault: &Vault,
    machine: MachineId,
    kind: crate::Kind,
    reference: &crate::SegmentRef,
) -> Result<()> {
    let (keys, _) = vault.machine_keys(machine).await?;
    let pace = Pace::new(None);
    let place = Place { vault, machine, keys: &keys, pace: &pace };
    match kind {
        crate::Kind::Map => map::check(&place, reference).await.map(drop),
        kind => segment::check(&place, kind, reference, &mut Report::default()).await,
    }
}
