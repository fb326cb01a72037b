//! Going around damage: whatever else can be merged is, or one object that cannot be read would keep all of its machine's history from
//! being merged, until no more commits fit. Pure.
//!
//! The run of which an object cannot be read is left alone. If it is not known which one that is, the merge is planned anew as two, with a
//! boundary in its middle, and so on: a few tries find it.

use super::{Merge, Purpose};
use crate::{
    MachineState, VaultError,
    runs::{Content, Kind, Run},
    store::object_path,
};
use highwater_delta::CommitId;
use std::collections::HashSet;

/// What is left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    /// Runs are not merged over these commits.
    boundaries: HashSet<CommitId>,
    /// What is not done: cleanings and shortcuts, which cannot be divided.
    left: HashSet<(CommitId, CommitId)>,
    /// Shortcuts that nothing may drop.
    kept: HashSet<(CommitId, CommitId)>,
}

impl Around {
    pub(super) fn is_boundary(&self, commit: CommitId) -> bool {
        self.boundaries.contains(&commit)
            || self.kept.iter().any(|(from, to)| commit == *from || commit == *to)
    }
    pub(super) fn leaves(&self, merge: &Merge) -> bool {
        let drops = |(from, to): &(CommitId, CommitId)| *from < merge.to && merge.from < *to;
        match merge.purpose {
            Purpose::Shortcut => self.left.contains(&(merge.from, merge.to)),
            Purpose::Clean => self.left.contains(&(merge.from, merge.to)) || self.kept.iter().any(drops),
            Purpose::Expire => self.kept.iter().any(drops),
        }
    }

    /// A shortcut is the last to say something.
    pub(super) fn keeps(&mut self, shortcut: (CommitId, CommitId)) {
        self.kept.insert(shortcut);
    }

    /// A merge could not read what it wanted to.
    pub(super) fn failed(&mut self, state: &MachineState, merge: &Merge, error: &VaultError) {
        let within = state.runs_within(merge.from, merge.to).unwrap_or_default();
        let of = |run: &&Run| {
            let kind = if matches!(run.content, Content::Maps { .. }) { Kind::Map } else { Kind::Segment };
            let mut paths = run.objects().iter().map(|object| object_path(state.machine, kind, object.id));
            matches!(error, VaultError::Corrupt { object, .. } | VaultError::Missing { object }
                if paths.any(|path| path.as_ref() == object))
        };
        if merge.purpose == Purpose::Expire
            && within.len() > 1
            && let Some(run) = state.runs[within.clone()].iter().find(of)
        {
            self.boundaries.extend([run.from, run.to]);
        } else if merge.purpose == Purpose::Expire && within.len() > 1 {
            self.boundaries.insert(state.runs[within.start + within.len() / 2 - 1].to);
        } else {
            self.left.insert((merge.from, merge.to));
        }
    }
}
