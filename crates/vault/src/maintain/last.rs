//! Shortcuts that are the last to say where content of a run lies, since that run's own maps cannot be read. A merge beneath one that
//! moves content, or takes an end of it away, would drop it, and what could be read would be lost.
//!
//! So before a merge it is looked whether the maps of the other runs beneath such shortcuts can be opened: footer and tables, which are two reads a
//! map, once a day. A page of a map that is damaged while these are not is found where the map is read.

use super::{Maintainer, Merge};
use crate::{
    MachineState, Result, SegmentRef, VaultError,
    journal::Journal,
    maps::rows,
    runs::{Content, Kind, Run, Shortcut},
    segment::SegmentReader,
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::CommitId;

/// Maps that are looked at at once.
const DEPTH: usize = 16;

impl Maintainer {
    /// A shortcut that a merge must not drop, and why.
    pub(super) async fn last_shortcut(
        &self,
        merge: &Merge,
    ) -> Result<Option<((CommitId, CommitId), VaultError)>> {
        let state = &self.journal.state;
        let over: Vec<&Shortcut> =
            state.shortcuts.iter().filter(|s| s.from < merge.to && merge.from < s.to).collect();
        let is_other = |run: &&Run| run.to <= merge.from || merge.to <= run.from;
        let beneath = |run: &&Run| over.iter().any(|s| s.from <= run.from && run.to <= s.to);
        let runs: Vec<Run> = state.runs.iter().filter(is_other).filter(beneath).cloned().collect();
        let mut looked = stream::iter(runs)
            .map(|run| async move { self.damage_of(&run).await.map(|damage| (run, damage)) })
            .buffered(DEPTH);
        while let Some((run, damage)) = looked.try_next().await? {
            let Some(error) = damage else { continue };
            if let Some(last) = innermost(&self.journal, &run, &over).await? {
                return Ok(Some((last, error)));
            }
        }
        Ok(None)
    }

    /// Why the maps of a run cannot be opened.
    async fn damage_of(&self, run: &Run) -> Result<Option<VaultError>> {
        let Content::Maps { maps, .. } = &run.content else { return Ok(None) };
        for map in maps {
            if self.settings.refusals.was_good(map.id) {
                continue;
            }
            match open(&self.journal, map).await {
                Ok(()) => self.settings.refusals.good(map.id),
                Err(error) if error.is_damage() => return Ok(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// The smallest of some shortcuts over a run that can be opened.
async fn innermost(
    journal: &Journal,
    run: &Run,
    among: &[&Shortcut],
) -> Result<Option<(CommitId, CommitId)>> {
    let mut over: Vec<&&Shortcut> = among.iter().filter(|s| s.from <= run.from && run.to <= s.to).collect();
    over.sort_by_key(|s| run_count(&journal.state, s));
    for shortcut in over {
        if says_something(journal, shortcut).await? {
            return Ok(Some((shortcut.from, shortcut.to)));
        }
    }
    Ok(None)
}

fn run_count(state: &MachineState, shortcut: &Shortcut) -> usize {
    state.runs_within(shortcut.from, shortcut.to).map_or(usize::MAX, |within| within.len())
}

/// Whether any map of a shortcut can be opened.
pub(crate) async fn says_something(journal: &Journal, shortcut: &Shortcut) -> Result<bool> {
    for map in &shortcut.maps {
        match open(journal, map).await {
            Ok(()) => return Ok(true),
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

async fn open(journal: &Journal, map: &SegmentRef) -> Result<()> {
    let store = journal.vault.store().clone();
    rows(&SegmentReader::new(store, journal.machine, &journal.keys, Kind::Map, map)?).await.map(drop)
}
