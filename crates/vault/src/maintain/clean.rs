//! Deleting objects that nothing refers to.

use crate::{
    Result,
    journal::Journal,
    runs::{Kind, ObjectName, Trashed},
    store,
};
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::SegmentId;
use object_store::path::Path;
use std::time::{Duration, Instant};

/// Deletions at once.
const DEPTH: usize = 8;
/// Deletions are gone on with for so long after the first that failed.
const FAILING_MAX: Duration = Duration::from_secs(60);

/// Deletes objects; answers those that are gone now, and the first failure. One that the store refuses to delete, because something
/// there protects it, is left for a later run.
pub(super) async fn delete(journal: &Journal, objects: &[Trashed]) -> (Vec<Trashed>, Result<()>) {
    let (store, machine) = (journal.vault.store().clone(), journal.machine);
    let mut deleted = stream::iter(objects.to_vec())
        .map(move |trashed| {
            let store = store.clone();
            async move {
                let path = store::object_path(machine, trashed.object.kind, trashed.object.id);
                store::delete(&*store, &path).await.map(|gone| gone.then_some(trashed))
            }
        })
        .buffered(DEPTH);
    let (mut gone, mut failed, mut since) = (Vec::new(), Ok(()), None);
    while let Some(deleted) = deleted.next().await {
        match deleted {
            Ok(trashed) => gone.extend(trashed),
            Err(error) => {
                failed = failed.and(Err(error));
                // A few objects may fail. A store that is out of reach is not waited for again and again.
                if since.get_or_insert_with(Instant::now).elapsed() > FAILING_MAX {
                    break;
                }
            }
        }
    }
    (gone, failed)
}

/// Deletes objects that were written and never named.
pub(crate) async fn delete_all(journal: &Journal, objects: &[ObjectName]) -> Result<()> {
    for object in objects {
        let path = store::object_path(journal.machine, object.kind, object.id);
        store::delete(&**journal.vault.store(), &path).await?;
    }
    Ok(())
}

/// Objects that nobody has named yet: of a maintainer that was interrupted, or goes on.
pub(super) async fn unnamed(journal: &Journal) -> Result<Vec<(SegmentId, Path)>> {
    let newest = journal.state.newest_maintained;
    let store = journal.vault.store();
    let mut found = Vec::new();
    for kind in [Kind::Rewritten, Kind::Map] {
        let dir = store::object_dir(journal.machine, kind);
        let listed = match newest {
            Some(id) => store.list_with_offset(Some(&dir), &store::object_path(journal.machine, kind, id)),
            None => store.list(Some(&dir)),
        };
        let all: Vec<Path> = listed.map_ok(|meta| meta.location).try_collect().await?;
        found.extend(all.into_iter().filter_map(|path| Some((store::segment_of(&path)?, path))));
    }
    Ok(found)
}

/// Deletes those that still nobody has named. To be called by who has become the maintainer since they were found: those who wrote them
/// cannot name them any more then, and what a later maintainer writes is not among them.
pub(super) async fn leftovers(journal: &Journal, unnamed: Vec<(SegmentId, Path)>) -> Result<()> {
    let newest = journal.state.newest_maintained;
    for (id, path) in unnamed {
        if Some(id) > newest {
            store::delete(&**journal.vault.store(), &path).await?;
        }
    }
    Ok(())
}
