//! A page of a listing: the names that come first behind some name, in the order of their bytes.

use crate::{Name, RelayError};
use chrono::DateTime;
use futures::{StreamExt, stream::BoxStream};
use object_store::{ObjectMeta, path::Path};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Names on a page.
pub(crate) const PAGE_NAMES_MAX: usize = 4096;
/// What a page and its making take of the memory, at most, but for names of extraordinary length.
pub(crate) const PAGE_MEMORY_BYTES: u64 = 4 << 20;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Page {
    pub(crate) objects: Vec<Entry>,
    /// Only of a listing by folders.
    pub(crate) folders: Vec<String>,
    /// There may be others behind these.
    pub(crate) more: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) modified_ms: i64,
}

impl From<&ObjectMeta> for Entry {
    fn from(meta: &ObjectMeta) -> Self {
        let modified_ms = meta.last_modified.timestamp_millis();
        Self { name: meta.location.to_string(), bytes: meta.size, modified_ms }
    }
}

impl Entry {
    /// What the client tells of the object.
    pub(crate) fn meta(&self) -> Result<ObjectMeta, RelayError> {
        let name: Name = self.name.parse()?;
        Ok(ObjectMeta {
            location: name.path(),
            last_modified: DateTime::from_timestamp_millis(self.modified_ms).unwrap_or_default(),
            size: self.bytes,
            e_tag: None,
            version: None,
        })
    }
}

impl Page {
    /// The last name on it, behind which the next one begins.
    pub(crate) fn last(&self) -> Option<&str> {
        let object = self.objects.last().map(|entry| entry.name.as_str());
        object.max(self.folders.last().map(String::as_str))
    }

    /// The first of what a store lists in any order.
    pub(crate) async fn of(
        mut listed: BoxStream<'static, object_store::Result<ObjectMeta>>,
        after: Option<&Name>,
    ) -> object_store::Result<Self> {
        let mut first = First::new(after);
        while let Some(meta) = listed.next().await {
            let meta = meta?;
            first.add(meta.location.as_ref(), || Item::Object((&meta).into()));
        }
        Ok(first.page())
    }

    /// The same by folders, of a listing of all that is beneath a prefix.
    pub(crate) async fn by_folders(
        mut listed: BoxStream<'static, object_store::Result<ObjectMeta>>,
        prefix: Option<&Name>,
        after: Option<&Name>,
    ) -> object_store::Result<Self> {
        let start = prefix.map_or(0, |prefix| prefix.as_str().len() + 1);
        let mut first = First::new(after);
        while let Some(meta) = listed.next().await {
            let meta = meta?;
            let name = meta.location.as_ref();
            match name.get(start..).and_then(|rest| rest.find('/')) {
                Some(end) => first.add(&name[..start + end], || Item::Folder),
                None => first.add(name, || Item::Object((&meta).into())),
            }
        }
        Ok(first.page())
    }

    /// The same of a listing by folders.
    pub(crate) fn of_folders(objects: &[ObjectMeta], folders: &[Path], after: Option<&Name>) -> Self {
        let mut first = First::new(after);
        for meta in objects {
            first.add(meta.location.as_ref(), || Item::Object(meta.into()));
        }
        for folder in folders {
            first.add(folder.as_ref(), || Item::Folder);
        }
        first.page()
    }
}

enum Item {
    Object(Entry),
    Folder,
}

/// Keeps the first names of all that are added, and no more.
struct First<'a> {
    after: Option<&'a Name>,
    kept: BTreeMap<String, Item>,
    more: bool,
}

impl<'a> First<'a> {
    const fn new(after: Option<&'a Name>) -> Self {
        Self { after, kept: BTreeMap::new(), more: false }
    }

    fn add(&mut self, name: &str, item: impl FnOnce() -> Item) {
        // What is not a relay's name was not put by one.
        if self.after.is_some_and(|after| name <= after.as_str()) || name.parse::<Name>().is_err() {
            return;
        }
        if self.kept.contains_key(name) {
            return;
        }
        if self.kept.len() >= PAGE_NAMES_MAX {
            self.more = true;
            if self.kept.last_key_value().is_some_and(|(last, _)| name > last.as_str()) {
                return;
            }
            self.kept.pop_last();
        }
        self.kept.insert(name.to_owned(), item());
    }

    fn page(self) -> Page {
        let mut page = Page { more: self.more, ..Page::default() };
        for (name, item) in self.kept {
            match item {
                Item::Object(entry) => page.objects.push(entry),
                Item::Folder => page.folders.push(name),
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::{ObjectStore, ObjectStoreExt};

    #[tokio::test]
    async fn pages_follow_each_other_without_gaps() {
        let count = PAGE_NAMES_MAX * 2 + 7;
        let meta = move |n: usize| ObjectMeta {
            // In no order.
            location: Path::from(format!("a/{:08}", (n * 7919) % count)),
            last_modified: DateTime::default(),
            size: n as u64,
            e_tag: None,
            version: None,
        };
        let (mut names, mut after) = (Vec::new(), None);
        loop {
            let listed = futures::stream::iter((0..count).map(meta).map(Ok)).boxed();
            let page = Page::of(listed, after.as_ref()).await.unwrap();
            assert!(page.objects.len() <= PAGE_NAMES_MAX);
            names.extend(page.objects.iter().map(|entry| entry.name.clone()));
            after = page.last().map(|last| last.parse().unwrap());
            if !page.more {
                break;
            }
        }
        let expected: Vec<String> = (0..count).map(|n| format!("a/{n:08}")).collect();
        assert_eq!(names, expected);
    }

    #[tokio::test]
    async fn folders_are_told_once_and_by_any_way_alike() {
        let store = object_store::memory::InMemory::new();
        for name in ["a/b/1", "a/b/2", "a/c/d/3", "a/x", "a/b.4", "ab/5", "top"] {
            store.put(&name.into(), "x".into()).await.unwrap();
        }
        for prefix in [None, Some("a"), Some("a/b"), Some("none")] {
            for after in [None, Some("a"), Some("a/b"), Some("a/x")] {
                let (prefix, after): (Option<Name>, Option<Name>) =
                    (prefix.map(|name| name.parse().unwrap()), after.map(|name| name.parse().unwrap()));
                let path = prefix.as_ref().map(Name::path);
                let folders = store.list_with_delimiter(path.as_ref()).await.unwrap();
                let expected = Page::of_folders(&folders.objects, &folders.common_prefixes, after.as_ref());
                let page = Page::by_folders(store.list(path.as_ref()), prefix.as_ref(), after.as_ref());
                assert_eq!(page.await.unwrap(), expected, "{prefix:?} after {after:?}");
            }
        }
    }
}
