//! Runs that something is wrong with are made anew, where what they hold can still be told.

use super::{Bad, Settings, damaged_shortcuts, history::History, history::history, names, run_at};
use crate::{
    MachineState, Pace, Result, SegmentRef, Vault, VaultError,
    journal::Journal,
    key::MachineKeys,
    maintain::{clean, last::says_something, merge, turn::Turn},
    maps::{Fill as Full, Merge, SegmentRow, Source, rows},
    record::KIND_MERGED,
    runs::{Content, Item, Kind, ObjectName, Run},
    segment::{FrameKind, IndexBuilder, Page, PageKind, PageRef, SegmentReader},
};
use highwater_delta::{ChunkView, CommitId, SegmentId};
use object_store::ObjectStoreExt;
use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    sync::Arc,
};

/// Runs that name something damaged, or whose maps cannot be read.
pub(super) async fn damaged_runs(
    vault: &Vault,
    keys: &MachineKeys,
    state: &MachineState,
    damaged: &Bad,
) -> Result<Vec<Run>> {
    let mut found = Vec::new();
    for run in &state.runs {
        let own = names(Item::Run(run)).any(|name| damaged.has(name.kind, name.id));
        if own || !damaged_within(vault, keys, state, run, damaged).await?.is_empty() {
            found.push(run.clone());
        }
    }
    Ok(found)
}

/// The damaged segments that a run's maps name, as far as these can be read; of one that is not merged, its own.
async fn damaged_within(
    vault: &Vault,
    keys: &MachineKeys,
    state: &MachineState,
    run: &Run,
    damaged: &Bad,
) -> Result<HashSet<SegmentId>> {
    let mut found = HashSet::new();
    if damaged.is_empty() {
        return Ok(found);
    }
    match &run.content {
        Content::Segments(segments) => {
            found.extend(segments.iter().map(|s| s.id).filter(|id| damaged.has(Kind::Segment, *id)));
        }
        Content::Maps { maps, .. } => {
            for map in maps {
                let reader = SegmentReader::new(vault.store().clone(), state.machine, keys, Kind::Map, map)?;
                match rows(&reader).await {
                    Ok(rows) => found
                        .extend(rows.iter().filter(|row| damaged.has(row.kind, row.id)).map(|row| row.id)),
                    Err(error @ VaultError::Store(_)) => return Err(error),
                    Err(_) => {}
                }
            }
        }
    }
    Ok(found)
}

/// Runs that something is wrong with, and what must not be done for them.
#[derive(Default)]
pub(super) struct Survey {
    /// In the order in which they are made anew: of what is made again from what was merged it shows only then whether that is whole, and until then
    /// the shortcuts over it may be needed.
    pub(super) runs: Vec<Run>,
    /// The stretches of shortcuts that are the last to say where content of a run lies that cannot be made anew. Whatever is done to a run beneath one of
    /// them that moves content would drop it.
    pub(super) last: HashSet<(CommitId, CommitId)>,
}

/// Looks at them.
pub(super) async fn survey(
    journal: &Journal,
    runs: Vec<Run>,
    damaged: &Bad,
    settings: &Settings,
) -> Result<Survey> {
    let keys = &journal.keys;
    let (mut survey, mut others) = (Survey::default(), Vec::new());
    for run in runs {
        let history = match run.is_merged() {
            true => history(&journal.vault, keys, &journal.state, (run.from, run.to), &settings.pace).await?,
            false => History::new(),
        };
        let sources = Sources { journal, keys, damaged, history: &history, pace: &settings.pace };
        let remade = match sources.of(&run).await? {
            None => None,
            Some((_, false)) => Some(false),
            Some((list, true)) => sources.all_there(&sources.rows(&list).await?).await?.then_some(true),
        };
        match remade {
            Some(true) => survey.runs.push(run),
            Some(false) => others.push(run),
            None => {
                survey.last.extend(useful_over(journal, &run).await?);
                others.push(run);
            }
        }
    }
    survey.runs.extend(others);
    Ok(survey)
}

/// The shortcuts over a run that say something, damaged or not.
pub(super) async fn useful_over(journal: &Journal, run: &Run) -> Result<Vec<(CommitId, CommitId)>> {
    let mut found = Vec::new();
    for shortcut in journal.state.shortcuts.iter().filter(|s| s.from <= run.from && run.to <= s.to) {
        if says_something(journal, shortcut).await? {
            found.push((shortcut.from, shortcut.to));
        }
    }
    Ok(found)
}

/// Whether a run's own maps cannot be opened.
pub(super) async fn is_lost(journal: &Journal, run: &Run) -> Result<bool> {
    let Content::Maps { maps, .. } = &run_now(journal, run).content else { return Ok(false) };
    for map in maps {
        let store = journal.vault.store().clone();
        let reader = SegmentReader::new(store, journal.machine, &journal.keys, Kind::Map, map)?;
        match rows(&reader).await {
            Ok(_) => {}
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(_) => return Ok(true),
        }
    }
    Ok(false)
}

/// Makes a run anew; false if that cannot be done.
pub(super) async fn heal(
    journal: &mut Journal,
    turn: &mut Turn,
    run: &Run,
    damaged: &Bad,
    settings: &Settings,
) -> Result<bool> {
    let (vault, keys) = (journal.vault.clone(), journal.keys.clone());
    let history = match run.is_merged() {
        true => history(&vault, &keys, &journal.state, (run.from, run.to), &settings.pace).await?,
        false => History::new(),
    };
    let sources = Sources { journal, keys: &keys, damaged, history: &history, pace: &settings.pace };
    let Some((list, remade)) = sources.of(run).await? else { return Ok(false) };
    let named: HashMap<SegmentId, ObjectName> = {
        let rows = sources.rows(&list).await?;
        if remade && !sources.all_there(&rows).await? {
            return Ok(false);
        }
        rows.iter().map(|row| (row.id, ObjectName { kind: row.kind, id: row.id })).collect()
    };
    // What is in the trash is deleted soon, so that its content has to be moved.
    let trashed: HashSet<SegmentId> = (journal.state.trash.iter().map(|trashed| trashed.object.id))
        .filter(|id| named.contains_key(id))
        .collect();
    let bad: Vec<SegmentId> =
        named.values().filter(|name| damaged.has(name.kind, name.id)).map(|name| name.id).collect();
    let all: HashSet<SegmentId> = trashed.iter().copied().chain(bad.iter().copied()).collect();
    if attempt(journal, turn, run, list.clone(), all, settings).await? {
        return Ok(true);
    }
    // Of several, some may be whole as far as they are needed. What cannot be moved stays where it is.
    let mut done = false;
    if remade {
        done = attempt(journal, turn, run, list, trashed.clone(), settings).await?;
        if !done {
            return Ok(false);
        }
    }
    if bad.len() > 1 || remade {
        for one in bad {
            let Some(run) = run_at(&journal.state, run.from, run.to).cloned() else { break };
            let sources = Sources { journal, keys: &keys, damaged, history: &history, pace: &settings.pace };
            let Some((list, _)) = sources.of(&run).await? else { break };
            done |= attempt(journal, turn, &run, list, HashSet::from([one]), settings).await?;
        }
    }
    // Something of it is lost, but what could be done was.
    Ok(done
        && damaged_within(&vault, &keys, &journal.state, run_now(journal, run), damaged).await?.is_empty())
}

/// Whether one of these lies over a run.
pub(super) fn is_under(shortcuts: &HashSet<(CommitId, CommitId)>, run: &Run) -> bool {
    shortcuts.iter().any(|(from, to)| *from < run.to && run.from < *to)
}

fn run_now<'a>(journal: &'a Journal, run: &'a Run) -> &'a Run {
    run_at(&journal.state, run.from, run.to).unwrap_or(run)
}

/// One merge of a run with itself; false if what it needs cannot be read.
async fn attempt(
    journal: &mut Journal,
    turn: &mut Turn,
    run: &Run,
    sources: Vec<Source>,
    doomed: HashSet<SegmentId>,
    settings: &Settings,
) -> Result<bool> {
    let merged = match merge::remake(journal, turn, run, sources, doomed, &settings.pace, Full::DEFAULT).await
    {
        Ok(merged) => merged,
        Err(error @ (VaultError::Store(_) | VaultError::Maintained(_) | VaultError::Dead)) => {
            return Err(error);
        }
        Err(_) => return Ok(false),
    };
    let body = postcard::to_stdvec(&merged.body).map_err(|_| VaultError::Limit("bytes of a record"))?;
    if journal.put_after_others(KIND_MERGED, &body, |state| merged.fits(state)).await? {
        return Ok(true);
    }
    // It was refused, so that nobody names these.
    clean::delete_all(journal, &merged.created).await?;
    Err(VaultError::Maintained(journal.machine))
}

/// Drops the shortcuts that are damaged, through a run beneath each.
pub(super) async fn drop_shortcuts(
    journal: &mut Journal,
    turn: &mut Turn,
    damaged: &Bad,
    last: &HashSet<(CommitId, CommitId)>,
    settings: &Settings,
) -> Result<()> {
    for (from, to) in damaged_shortcuts(&journal.state, damaged) {
        if last.contains(&(from, to)) || !journal.state.shortcuts.iter().any(|s| (s.from, s.to) == (from, to))
        {
            continue;
        }
        let within = journal.state.runs_within(from, to)?;
        let mut runs: Vec<Run> = journal.state.runs[within].to_vec();
        runs.retain(|run| !is_under(last, run));
        runs.sort_by_key(Run::data_bytes);
        let keys = journal.keys.clone();
        for run in runs {
            let sources =
                Sources { journal, keys: &keys, damaged, history: &History::new(), pace: &settings.pace };
            let Some((list, false)) = sources.of(&run).await? else { continue };
            if attempt(journal, turn, &run, list, HashSet::new(), settings).await? {
                break;
            }
        }
    }
    Ok(())
}

/// Finds what holds what a run holds.
struct Sources<'a> {
    journal: &'a Journal,
    keys: &'a MachineKeys,
    damaged: &'a Bad,
    history: &'a History,
    pace: &'a Pace,
}

type Found<'a> = Pin<Box<dyn Future<Output = Result<Option<(Vec<Source>, bool)>>> + Send + 'a>>;

impl Sources<'_> {
    /// What holds what a run holds, in the order in which it applies, and whether that is not what it names itself; none if it is not
    /// all there any more.
    fn of<'a>(&'a self, run: &'a Run) -> Found<'a> {
        Box::pin(async move {
            if let Some(own) = self.own(run).await? {
                return Ok(Some((own, false)));
            }
            let first = run.objects().first().filter(|_| run.is_merged());
            let Some(parts) = first.and_then(|first| self.history.get(&first.id)) else { return Ok(None) };
            let mut all = Vec::new();
            for part in parts {
                match self.of(part).await? {
                    Some((sources, _)) => all.extend(sources),
                    None => return Ok(None),
                }
            }
            Ok(Some((all, true)))
        })
    }

    /// A run's own objects, if their indexes can be read, or made again from the chunks.
    async fn own(&self, run: &Run) -> Result<Option<Vec<Source>>> {
        let kind = if run.is_merged() { Kind::Map } else { Kind::Segment };
        let mut list = Vec::new();
        for object in run.objects() {
            let source = Source::new(kind, object.clone());
            let read = match kind == Kind::Map && self.damaged.lies(object.id) {
                true => None,
                false => self.read(&source).await?,
            };
            match (read, kind) {
                (Some(_), _) => list.push(source),
                (None, Kind::Segment) => match self.index(object).await? {
                    Some(pages) => list.push(Source { pages: Some(pages), ..source }),
                    None => return Ok(None),
                },
                (None, _) => return Ok(None),
            }
        }
        Ok(Some(list))
    }

    /// Goes through the whole index of a source; answers what it names, or nothing if it cannot be read.
    async fn read(&self, source: &Source) -> Result<Option<Vec<SegmentRow>>> {
        let Journal { vault, machine, .. } = self.journal;
        let mut stream = Merge::new(vault.store(), *machine, self.keys, self.pace, vec![source.clone()]);
        loop {
            match stream.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(Some(stream.rows().to_vec())),
                Err(error @ VaultError::Store(_)) => return Err(error),
                Err(_) => return Ok(None),
            }
        }
    }

    async fn rows(&self, list: &[Source]) -> Result<Vec<SegmentRow>> {
        let mut all = Vec::new();
        for source in list {
            all.extend(self.read(source).await?.unwrap_or_default());
        }
        Ok(all)
    }

    /// Whether all segments are there, as long as they should be.
    async fn all_there(&self, rows: &[SegmentRow]) -> Result<bool> {
        for row in rows.iter().filter(|row| row.live > 0) {
            let path = crate::store::object_path(self.journal.machine, row.kind, row.id);
            match self.journal.vault.store().head(&path).await {
                Ok(meta) if meta.size == row.bytes => {}
                Ok(_) | Err(object_store::Error::NotFound { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// The index of a segment, made again from its chunks. None if one of these cannot be read, or it cannot be told whether these are all.
    async fn index(&self, segment: &SegmentRef) -> Result<Option<Vec<Arc<Page>>>> {
        let Journal { vault, machine, .. } = self.journal;
        let store = vault.store().clone();
        let reader = SegmentReader::new(store, *machine, self.keys, Kind::Segment, segment)?;
        let counted = match reader.footer().await {
            Ok(footer) => Some(footer.chunks),
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(_) => None,
        };
        let (mut index, mut chunks, mut ended, mut bad) = (IndexBuilder::default(), 0, false, false);
        let walked = reader
            .walk_frames(self.pace, |frame| {
                match frame.kind {
                    FrameKind::Chunk => match ChunkView::parse(&frame.plain) {
                        Ok(view) => index.add(&view, frame.at.frame, frame.at.offset, frame.at.len),
                        Err(_) => bad = true,
                    },
                    // Authentic, and so what comes behind the last chunk.
                    _ => {
                        ended = true;
                        return Ok(false);
                    }
                }
                chunks += 1;
                Ok(counted != Some(chunks))
            })
            .await;
        if let Err(error @ VaultError::Store(_)) = walked {
            return Err(error);
        }
        if bad || !(ended || counted == Some(chunks)) {
            return Ok(None);
        }
        let mut pages = Vec::new();
        for (disk, first, end, plain) in index.build().pages {
            let at = PageRef { disk, first, end, frame: 0, offset: 0, len: 0 };
            pages.push(Arc::new(Page::decode(&plain, PageKind::Segment, &at, &reader.path)?));
        }
        Ok(Some(pages))
    }
}
