//! Answers that are not what they should be: cut short, or of a moment ago.

use bytes::Bytes;
use futures::{StreamExt, stream, stream::BoxStream};
use object_store::{path::Path, *};
use std::collections::{HashSet, VecDeque};

/// Changes that are remembered.
const REMEMBERED: usize = 16;

/// Only the beginning of what was got; its length is told as it should be.
pub(crate) async fn cut(got: GetResult, part: u16) -> Result<GetResult> {
    let (meta, range) = (got.meta.clone(), got.range.clone());
    let (attributes, extensions) = (got.attributes.clone(), got.extensions.clone());
    let bytes = got.bytes().await?;
    let left = (bytes.len() as u64 * u64::from(part)) >> 16;
    let left: Result<Bytes> = Ok(bytes.slice(..left as usize));
    let payload = GetResultPayload::Stream(stream::iter([left]).boxed());
    Ok(GetResult { payload, meta, range, attributes, extensions })
}

/// The last changes of the store, the newest last.
#[derive(Default)]
pub(crate) struct Changes(VecDeque<Change>);

enum Change {
    Put(Path),
    Deleted(ObjectMeta),
}

impl Changes {
    fn add(&mut self, change: Change) {
        self.0.push_back(change);
        if self.0.len() > REMEMBERED {
            self.0.pop_front();
        }
    }
    pub(crate) fn put(&mut self, path: &Path) {
        self.add(Change::Put(path.clone()));
    }
    pub(crate) fn deleted(&mut self, meta: ObjectMeta) {
        self.add(Change::Deleted(meta));
    }

    /// A list as it was before the last changes. In no order, like any list.
    pub(crate) fn stale(
        &self,
        by: usize,
        prefix: Option<&Path>,
        listed: BoxStream<'static, Result<ObjectMeta>>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let (mut unseen, mut gone) = (HashSet::new(), Vec::new());
        for change in self.0.iter().rev().take(by) {
            match change {
                Change::Put(path) => {
                    unseen.insert(path.clone());
                }
                Change::Deleted(meta) => gone.push(meta.clone()),
            }
        }
        // What was put and deleted again was not there before.
        gone.retain(|meta| !unseen.contains(&meta.location));
        gone.retain(|meta| prefix.is_none_or(|prefix| meta.location.prefix_matches(prefix)));
        let seen = listed.filter(move |meta| {
            let seen = !meta.as_ref().is_ok_and(|meta| unseen.contains(&meta.location));
            std::future::ready(seen)
        });
        seen.chain(stream::iter(gone.into_iter().map(Ok))).boxed()
    }
}
