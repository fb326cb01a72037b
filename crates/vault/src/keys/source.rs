//! Where a secret comes from that opens a vault.

use super::{
    KeyCommand, Passphrase,
    document::Document,
    file::KeyFile,
    passphrase::Cost,
    wrapping::{How, WrappingId, WrappingKind, open_root, seal_root},
};
use crate::{
    Result, VaultError, VaultKey,
    key::{Secret, random},
};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use highwater_delta::VaultId;
use std::path::PathBuf;
use zeroize::Zeroizing;

/// Passphrases and commands that are tried in one document: each costs.
pub(super) const COSTLY_MAX: usize = 8;

/// What a vault is opened with, or is to be opened with from now on.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// The root key itself.
    Root(VaultKey),
    /// A key file. To be wrapped under, it is made if it is not there.
    File(PathBuf),
    /// A passphrase.
    Passphrase(Passphrase),
    /// A file that holds a passphrase.
    PassphraseFile(PathBuf),
    /// An external command.
    Command(KeyCommand),
}

/// What was found with a source.
pub(super) struct Opened {
    pub(super) root: VaultKey,
    /// The wrapping that it opened; of the root key itself none.
    pub(super) by: Option<WrappingId>,
}

impl KeySource {
    /// Whether it can be used, as far as that can be seen without a vault: files are read; a command is looked for, and not run.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Root(_) | Self::Passphrase(_) => Ok(()),
            Self::File(path) => KeyFile::load(path).map(drop),
            Self::PassphraseFile(path) => Passphrase::load(path).map(drop),
            Self::Command(command) => command.check(),
        }
    }

    /// The root key, out of a document that is not known to be authentic yet; none: the vault has no document.
    pub(super) async fn open(&self, document: Option<&Document>) -> Result<Opened> {
        match self {
            Self::Root(root) => Ok(Opened { root: root.clone(), by: None }),
            Self::File(path) => match KeyFile::load(path)? {
                KeyFile::Root(root) => Ok(Opened { root, by: None }),
                KeyFile::Wrapping(key) => of_file(&key, document),
            },
            Self::Passphrase(passphrase) => of_passphrase(passphrase, document).await,
            Self::PassphraseFile(path) => of_passphrase(&Passphrase::load(path)?, document).await,
            Self::Command(command) => of_command(command, document).await,
        }
    }

    /// Wraps a root key, so that this source opens it.
    pub(super) async fn wrap(
        &self,
        vault: VaultId,
        id: WrappingId,
        root: &VaultKey,
        cost: Cost,
    ) -> Result<How> {
        match self {
            Self::Root(_) => Ok(How::Root),
            Self::File(path) => {
                let sealed = seal_root(&KeyFile::load_or_create(path)?, vault, id, root)?;
                Ok(How::File { sealed })
            }
            Self::Passphrase(passphrase) => {
                passphrase.check_strength()?;
                let mut salt = [0; 16];
                random(&mut salt)?;
                let key = passphrase.stretch(cost, salt).await?;
                Ok(How::Passphrase { cost, salt, sealed: seal_root(&key, vault, id, root)? })
            }
            Self::PassphraseFile(path) => {
                let passphrase = Self::Passphrase(Passphrase::load(path)?);
                Box::pin(passphrase.wrap(vault, id, root, cost)).await
            }
            Self::Command(command) => {
                let mut key = Secret(Zeroizing::new([0; 32]));
                random(key.0.as_mut())?;
                let blob = command.wrap(&key).await?;
                // What cannot be unwrapped must not be found out when it is needed.
                if verify_slices_are_equal(command.unwrap(&blob).await?.0.as_ref(), key.0.as_ref()).is_err() {
                    let cause = "it does not give back what it wrapped".to_owned();
                    return Err(VaultError::KeyCommand { command: command.program().to_owned(), cause });
                }
                Ok(How::Command { blob, sealed: seal_root(&key, vault, id, root)? })
            }
        }
    }
}

fn of_file(key: &Secret, document: Option<&Document>) -> Result<Opened> {
    let mut seen = false;
    for wrapping in document.iter().flat_map(|document| &document.wrappings) {
        if let (Some(document), How::File { sealed }) = (document, &wrapping.how) {
            seen = true;
            if let Some(root) = open_root(key, document.vault, wrapping.id, sealed)? {
                return Ok(Opened { root, by: Some(wrapping.id) });
            }
        }
    }
    Err(refused(WrappingKind::KeyFile, seen, document))
}

async fn of_passphrase(passphrase: &Passphrase, document: Option<&Document>) -> Result<Opened> {
    let mut tried = 0;
    for wrapping in document.iter().flat_map(|document| &document.wrappings) {
        if let (Some(document), How::Passphrase { cost, salt, sealed }) = (document, &wrapping.how)
            && tried < COSTLY_MAX
        {
            tried += 1;
            let key = passphrase.stretch(*cost, *salt).await?;
            if let Some(root) = open_root(&key, document.vault, wrapping.id, sealed)? {
                return Ok(Opened { root, by: Some(wrapping.id) });
            }
        }
    }
    Err(refused(WrappingKind::Passphrase, tried > 0, document))
}

async fn of_command(command: &KeyCommand, document: Option<&Document>) -> Result<Opened> {
    let (mut tried, mut failed) = (0, None);
    for wrapping in document.iter().flat_map(|document| &document.wrappings) {
        if let (Some(document), How::Command { blob, sealed }) = (document, &wrapping.how)
            && tried < COSTLY_MAX
        {
            tried += 1;
            // It may be another command's.
            match command.unwrap(blob).await {
                Err(error) => failed = Some(error),
                Ok(key) => {
                    if let Some(root) = open_root(&key, document.vault, wrapping.id, sealed)? {
                        return Ok(Opened { root, by: Some(wrapping.id) });
                    }
                }
            }
        }
    }
    Err(failed.unwrap_or_else(|| refused(WrappingKind::KeyCommand, tried > 0, document)))
}

fn refused(kind: WrappingKind, seen: bool, document: Option<&Document>) -> VaultError {
    if seen {
        return VaultError::WrongSecret(kind.text());
    }
    let all = document.map(|document| document.wrappings.iter().map(|w| w.kind().text()).collect());
    let mut has: Vec<&str> = all.unwrap_or_else(|| vec![WrappingKind::RootKeyFile.text()]);
    has.sort_unstable();
    has.dedup();
    VaultError::NotWrapped { wanted: kind.text(), has: has.join(", ") }
}
