//! A vault's key and its wrappings, in its store.

use super::{
    KeySource,
    document::{DOCUMENT_BYTES_MAX, Document},
    passphrase::Cost,
    source::{COSTLY_MAX, Opened},
    wrapping::{Wrapping, WrappingId, WrappingKind},
};
use crate::{
    Result, Store, Vault, VaultError, VaultKey,
    store::{self, delete_if_there},
    vault::file::{self, FORMAT_WRAPPED},
};
use futures::TryStreamExt;
use highwater_delta::VaultId;
use object_store::{ObjectStore, path::Path};
use std::time::{SystemTime, UNIX_EPOCH};

/// How often the newest document is looked for, while others replace it.
const LOOK_TRIES: usize = 8;

/// An opened vault's root key and the ways to it. Wiped from memory when dropped.
pub struct KeyRing {
    store: Store,
    root: VaultKey,
    document: Document,
    opened_by: Option<WrappingId>,
    /// Numbers of documents before the newest.
    older: Vec<u64>,
    cost: Cost,
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyRing({}, {} wrappings)", self.document.vault, self.document.wrappings.len())
    }
}

impl KeyRing {
    /// Makes a new vault with a root key that nobody has but through this source.
    ///
    /// # Errors
    /// A store that holds a vault, or one that cannot create if absent; the source's own.
    pub async fn create(store: impl Into<Store>, source: &KeySource, label: &str) -> Result<Self> {
        let root = match source {
            KeySource::Root(root) => root.clone(),
            _ => VaultKey::generate()?,
        };
        Self::create_costing(store.into(), root, source, label, Cost::DEFAULT).await
    }

    pub(crate) async fn create_costing(
        store: Store,
        root: VaultKey,
        source: &KeySource,
        label: &str,
        cost: Cost,
    ) -> Result<Self> {
        let objects = store.objects().clone();
        let vault = VaultId::new();
        // Nothing is written beside an existing vault, whatever the store makes of create-if-absent.
        if file::read(&*objects).await?.is_some() {
            return Err(VaultError::Exists);
        }
        if !numbers(&*objects).await?.is_empty() {
            return Err(VaultError::Unfinished);
        }
        if let Some(lock) = store.lock() {
            lock.check().await?;
        }
        let wrapping = new_wrapping(vault, &root, source, label, cost).await?;
        let document = Document { vault, number: 1, wrappings: vec![wrapping] };
        let path = store::keys_path(1);
        // Before vault.json, which makes a vault of it: one that is there can be opened.
        if !store::create_own(&*objects, &path, document.encode(&root)?).await? {
            return Err(VaultError::Unfinished);
        }
        if let Err(error) = file::create(&*objects, vault).await {
            // Only if it is certain that no vault needs it.
            if matches!(error, VaultError::Exists | VaultError::NoCreateIfAbsent(_))
                || matches!(file::read(&*objects).await, Ok(None))
            {
                let _ = delete_if_there(&*objects, &path).await;
            }
            return Err(error);
        }
        let opened_by = document.wrappings.first().map(|wrapping| wrapping.id);
        Ok(Self { store, root, document, opened_by, older: Vec::new(), cost })
    }

    /// Opens a vault's key.
    ///
    /// # Errors
    /// [`VaultError::WrongKey`], [`VaultError::WrongSecret`], [`VaultError::NotWrapped`]: not with this source;
    /// [`VaultError::Corrupt`]: what is stored was altered.
    pub async fn open(store: impl Into<Store>, source: &KeySource) -> Result<Self> {
        let store = store.into();
        let objects = store.objects();
        // Both at once: a far store is waited for once less.
        let (file, listed) = futures::future::join(file::read(&**objects), numbers(&**objects)).await;
        let (file, listed) = (file?, listed?);
        let lacking = if listed.is_empty() { VaultError::NotAVault } else { VaultError::Unfinished };
        let file = file.ok_or(lacking)?;
        let (found, older) = newest(&**objects, file.vault, listed).await?;
        let (document, root, by) = match found {
            Some(unverified) => {
                let opened = source.open(Some(&unverified.document)).await?;
                file.check(&opened.root)?;
                let document = unverified.verify(&opened.root)?;
                (document, opened.root, opened.by)
            }
            // What a vault of the first release has until it gets a second key.
            None if file.format != FORMAT_WRAPPED => {
                let opened = source.open(None).await?;
                file.check(&opened.root)?;
                let wrappings = vec![Wrapping::implied()];
                (Document { vault: file.vault, number: 0, wrappings }, opened.root, opened.by)
            }
            None => {
                let object = store::keys_path(1).to_string();
                return Err(VaultError::Missing { object });
            }
        };
        let root_wrapping = document.wrappings.iter().find(|w| w.kind() == WrappingKind::RootKeyFile);
        let opened_by = match (by, root_wrapping) {
            (Some(by), _) => by,
            (None, Some(wrapping)) => wrapping.id,
            // It was removed. Whoever has it can still decrypt everything, but not with this program.
            (None, None) => return Err(VaultError::WrongSecret(WrappingKind::RootKeyFile.text())),
        };
        Ok(Self { store, root, document, opened_by: Some(opened_by), older, cost: Cost::DEFAULT })
    }

    /// The vault that it opens.
    pub fn vault(&self) -> Result<Vault> {
        Vault::with(self.store.clone(), self.document.vault, &self.root)
    }
    /// The vault's identity.
    #[must_use]
    pub fn id(&self) -> VaultId {
        self.document.vault
    }
    /// The ways to open the vault; never none.
    #[must_use]
    pub fn wrappings(&self) -> &[Wrapping] {
        &self.document.wrappings
    }
    /// Which of them it was opened with, if it still is there.
    #[must_use]
    pub fn opened_by(&self) -> Option<WrappingId> {
        self.opened_by
    }
    /// Number of the document that lists them; 0: there is none yet.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.document.number
    }
    /// How many older documents are still there: an interruption, or a store that would not delete them, left them. The next
    /// change deletes them; until then what was removed from them opens a copy of them.
    #[must_use]
    pub fn older_documents(&self) -> usize {
        self.older.len()
    }

    /// Adds a way to open the vault.
    ///
    /// # Errors
    /// [`VaultError::KeysChanged`]: somebody else changed them at the same time, and nothing was added. After an error of the store
    /// it may have been added: open anew and look.
    pub async fn add(&mut self, source: &KeySource, label: &str) -> Result<WrappingId> {
        let new = self.wrapping(source, label).await?;
        let id = new.id;
        let mut wrappings = self.document.wrappings.clone();
        wrappings.push(new);
        self.put(wrappings, |now| now.iter().any(|w| w.id == id)).await?;
        Ok(id)
    }

    /// Removes one. The last one stays.
    ///
    /// # Errors
    /// As [`KeyRing::add`]; [`VaultError::LastWrapping`], [`VaultError::UnknownWrapping`].
    pub async fn remove(&mut self, id: WrappingId) -> Result<()> {
        self.position(id)?;
        if self.document.wrappings.len() == 1 {
            return Err(VaultError::LastWrapping);
        }
        let mut wrappings = self.document.wrappings.clone();
        wrappings.retain(|wrapping| wrapping.id != id);
        self.put(wrappings, |now| now.iter().all(|w| w.id != id)).await
    }

    /// Replaces one by another, at once: at no time do both or neither open the vault. The root key, and all data, stay.
    ///
    /// # Errors
    /// As [`KeyRing::add`]; [`VaultError::UnknownWrapping`].
    pub async fn rotate(&mut self, id: WrappingId, source: &KeySource) -> Result<WrappingId> {
        let at = self.position(id)?;
        let label = self.document.wrappings[at].label.clone();
        let new = self.wrapping(source, &label).await?;
        let new_id = new.id;
        let mut wrappings = self.document.wrappings.clone();
        wrappings[at] = new;
        self.put(wrappings, |now| now.iter().any(|w| w.id == new_id)).await?;
        Ok(new_id)
    }

    /// Deletes older documents that an interruption left.
    pub async fn clean(&mut self) {
        let numbers = std::mem::take(&mut self.older);
        for number in numbers {
            let path = store::keys_path(number);
            if delete_if_there(&**self.store.objects(), &path).await.is_err() {
                self.older.push(number);
            }
        }
    }

    fn position(&self, id: WrappingId) -> Result<usize> {
        let found = self.document.wrappings.iter().position(|wrapping| wrapping.id == id);
        found.ok_or(VaultError::UnknownWrapping(id))
    }

    async fn wrapping(&self, source: &KeySource, label: &str) -> Result<Wrapping> {
        // It would be listed twice, and taking one of both away would take nothing. A command is not asked for the sake of that.
        if !matches!(source, KeySource::Command(_))
            && let Ok(Opened { by: Some(by), .. }) = source.open(Some(&self.document)).await
        {
            return Err(VaultError::SameSecret(by));
        }
        new_wrapping(self.document.vault, &self.root, source, label, self.cost).await
    }

    /// Makes a document of these the newest, or tells that somebody else was faster. `done` says whether what is wanted is true of
    /// given wrappings.
    async fn put(&mut self, wrappings: Vec<Wrapping>, done: impl Fn(&[Wrapping]) -> bool) -> Result<()> {
        for kind in [WrappingKind::Passphrase, WrappingKind::KeyCommand] {
            if wrappings.iter().filter(|w| w.kind() == kind).count() > COSTLY_MAX {
                return Err(VaultError::Limit("passphrases or key commands of one vault"));
            }
        }
        let next = Document { vault: self.document.vault, number: self.document.number + 1, wrappings };
        let (bytes, path) = (next.encode(&self.root)?, store::keys_path(next.number));
        let objects = self.store.objects().clone();
        match store::create_own(&*objects, &path, bytes.clone()).await {
            Ok(true) => {}
            Ok(false) | Err(VaultError::Missing { .. }) => return self.yielding(done).await,
            Err(error) => {
                // Stored all the same, by a put whose answer was lost?
                let there = store::read_object(&*objects, &path, DOCUMENT_BYTES_MAX).await;
                if !there.is_ok_and(|there| there == bytes) {
                    return Err(error);
                }
            }
        }
        let mut all = numbers(&*objects).await?;
        if all.last().is_some_and(|last| *last > next.number) {
            // Others were ahead by more than one, and had deleted what stood at this number; or they built upon this one.
            return self.yielding(done).await;
        }
        all.retain(|number| *number < next.number);
        (self.document, self.older) = (next, all);
        self.forget_opener();
        self.clean().await;
        Ok(())
    }

    /// Somebody else was faster: takes over what he made, which may be what was wanted here.
    async fn yielding(&mut self, done: impl Fn(&[Wrapping]) -> bool) -> Result<()> {
        let objects = &**self.store.objects();
        let (found, older) = newest(objects, self.document.vault, numbers(objects).await?).await?;
        if let Some(unverified) = found {
            self.document = unverified.verify(&self.root)?;
            self.older = older;
        }
        self.forget_opener();
        self.clean().await;
        if done(&self.document.wrappings) { Ok(()) } else { Err(VaultError::KeysChanged) }
    }

    fn forget_opener(&mut self) {
        self.opened_by = self.opened_by.filter(|by| self.document.wrappings.iter().any(|w| w.id == *by));
    }

    #[cfg(test)]
    pub(crate) fn costing(mut self, cost: Cost) -> Self {
        self.cost = cost;
        self
    }
}

async fn new_wrapping(
    vault: VaultId,
    root: &VaultKey,
    source: &KeySource,
    label: &str,
    cost: Cost,
) -> Result<Wrapping> {
    let id = WrappingId::new()?;
    let created_at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64);
    let bare = Wrapping { id, label: label.to_owned(), created_at_ms, how: Wrapping::implied().how };
    bare.check().map_err(|cause| VaultError::Name(cause.to_owned()))?;
    let wrapping = Wrapping { how: source.wrap(vault, id, root, cost).await?, ..bare };
    wrapping.check().map_err(VaultError::Crypto)?;
    Ok(wrapping)
}

/// Numbers of all documents, sorted.
async fn numbers(objects: &dyn ObjectStore) -> Result<Vec<u64>> {
    let mut numbers: Vec<u64> = objects
        .list(Some(&Path::from("keys")))
        .try_filter_map(async |meta| Ok(store::number_of(&meta.location)))
        .try_collect()
        .await?;
    numbers.sort_unstable();
    Ok(numbers)
}

/// The document with the highest number, of which there is a list, and the numbers of those before it.
async fn newest(
    objects: &dyn ObjectStore,
    vault: VaultId,
    mut older: Vec<u64>,
) -> Result<(Option<super::document::Unverified>, Vec<u64>)> {
    for _ in 0..LOOK_TRIES {
        let Some(number) = older.pop() else { return Ok((None, older)) };
        match store::read_object(objects, &store::keys_path(number), DOCUMENT_BYTES_MAX).await {
            Ok(bytes) => return Ok((Some(Document::decode(vault, number, &bytes)?), older)),
            // Replaced since they were listed.
            Err(VaultError::Missing { .. }) => older = numbers(objects).await?,
            Err(error) => return Err(error),
        }
    }
    Err(VaultError::KeysChanged)
}
