//! Checkpoints: a state, stored, so that replay need not begin at the first record.
//!
//! They begin with two bytes that say how they are to be read; those of the first release begin otherwise ([`decode`]).

use super::{Lease, MachineState};
use crate::{
    Result, VaultError,
    record::{DiskRecord, PointRecord, SegmentRef},
};
use highwater_delta::{CommitId, DeltaId, MachineId};
use serde::Deserialize;
use std::collections::VecDeque;

/// What a checkpoint begins with. The first release's begin with the length of an id: 16.
const MAGIC: [u8; 2] = [0xff, 3];
/// The same without a lease at the end.
const MAGIC_WITHOUT_LEASE: [u8; 2] = [0xff, 2];

/// A state as the first release stored it.
#[derive(Deserialize)]
struct FirstState {
    machine: MachineId,
    host_name: String,
    disks: Vec<DiskRecord>,
    former_disks: Vec<DiskRecord>,
    last_commit: CommitId,
    points: Vec<PointRecord>,
    segments: Vec<SegmentRef>,
    last_record: u64,
    epoch: u64,
    chain: [u8; 32],
    recent: VecDeque<(DeltaId, CommitId)>,
    bytes_since_point: u64,
}

impl From<FirstState> for MachineState {
    fn from(first: FirstState) -> Self {
        let mut state = Self::empty(first.machine, first.host_name);
        let mut segments = first.segments.into_iter().peekable();
        let mut commits: Vec<CommitId> = first.points.iter().map(|point| point.id).collect();
        let brought: Vec<_> = segments.clone().map(|segment| segment.commit).collect();
        commits.extend(brought);
        commits.sort_unstable();
        commits.dedup();
        for commit in commits {
            let mut own = Vec::new();
            while let Some(segment) = segments.next_if(|segment| segment.commit <= commit) {
                own.push(segment);
            }
            state.push_run(commit, own);
        }
        Self {
            disks: first.disks,
            former_disks: first.former_disks,
            last_commit: first.last_commit,
            points: first.points,
            last_record: first.last_record,
            epoch: first.epoch,
            chain: first.chain,
            recent: first.recent,
            bytes_since_point: first.bytes_since_point,
            ..state
        }
    }
}

/// The plaintext of a checkpoint.
pub(crate) fn encode(state: &MachineState) -> Result<Vec<u8>> {
    let failed = |_| VaultError::Limit("bytes of a checkpoint");
    let plain = postcard::to_extend(state, MAGIC.to_vec()).map_err(failed)?;
    postcard::to_extend(&state.lease, plain).map_err(failed)
}

/// Reads the plaintext of a checkpoint; the cause if it is none.
pub(crate) fn decode(plain: &[u8]) -> Result<MachineState, postcard::Error> {
    let state: MachineState = if let Some(body) = plain.strip_prefix(&MAGIC) {
        let (state, rest) = postcard::take_from_bytes(body)?;
        let lease: Lease = postcard::from_bytes(rest)?;
        MachineState { lease, ..state }
    } else if let Some(body) = plain.strip_prefix(&MAGIC_WITHOUT_LEASE) {
        postcard::from_bytes(body)?
    } else {
        postcard::from_bytes::<FirstState>(plain)?.into()
    };
    if state.is_sound() { Ok(state) } else { Err(postcard::Error::DeserializeBadEncoding) }
}
