//! `vault.json`: that there is a vault, which one, and of which format. The only object that says anything in the clear.

use crate::{Result, VaultError, VaultKey, keys::to_hex, store};
use highwater_delta::VaultId;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};

/// The root key lies in a file, as it is, and may be wrapped besides.
pub(crate) const FORMAT_FIRST: u64 = 1;
/// The root key is wrapped: there is a keys document.
pub(crate) const FORMAT_WRAPPED: u64 = 2;
/// Most bytes of it.
pub(super) const BYTES_MAX: u64 = 4096;

/// Byte for byte as [`VaultFile::encode`] writes it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct VaultFile {
    pub(crate) format: u64,
    pub(crate) vault: VaultId,
    /// Of the first format only: which root key fits.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_check: Option<String>,
}

/// What every format has in common.
#[derive(Deserialize)]
struct Any {
    format: u64,
}

impl VaultFile {
    fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|_| VaultError::Limit("bytes of vault.json"))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let path = store::vault_path();
        let corrupt = |cause: String| VaultError::corrupt(&path, cause);
        let any: Any = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
        if any.format != FORMAT_FIRST && any.format != FORMAT_WRAPPED {
            return Err(VaultError::Format { object: path.to_string(), found: any.format });
        }
        let file: Self = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
        if file.key_check.is_some() != (file.format == FORMAT_FIRST) || file.encode()? != bytes {
            return Err(corrupt("not as it was written".to_owned()));
        }
        Ok(file)
    }

    /// Whether a root key fits. A later format does not say: its keys document does.
    pub(crate) fn check(&self, root: &VaultKey) -> Result<()> {
        let Some(check) = &self.key_check else { return Ok(()) };
        let expected = to_hex(&root.check_value(self.vault)?);
        aws_lc_rs::constant_time::verify_slices_are_equal(expected.as_bytes(), check.as_bytes())
            .map_err(|_| VaultError::WrongKey)
    }
}

/// Reads it; none: there is no vault.
pub(crate) async fn read(objects: &dyn ObjectStore) -> Result<Option<VaultFile>> {
    match store::read_object(objects, &store::vault_path(), BYTES_MAX).await {
        Err(VaultError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
        Ok(bytes) => VaultFile::decode(&bytes).map(Some),
    }
}

/// Makes a vault: one of two at once succeeds. Leaves nothing in a store that cannot create if absent.
pub(crate) async fn create(objects: &dyn ObjectStore, vault: VaultId) -> Result<()> {
    let (path, file) =
        (store::vault_path(), VaultFile { format: FORMAT_WRAPPED, vault, key_check: None }.encode()?);
    if !store::create_own(objects, &path, file.clone()).await? {
        return Err(VaultError::Exists);
    }
    // All safety of commits rests on this refusal, so it is tried out once on every store.
    if store::create_object(objects, &path, file).await? {
        let cleaned = objects.delete(&path).await;
        return Err(VaultError::NoCreateIfAbsent(match cleaned {
            Ok(()) => objects.to_string(),
            Err(e) => format!("{objects}; vault.json could not be deleted: {e}"),
        }));
    }
    Ok(())
}

/// Whether these can be one.
#[cfg(feature = "fuzz")]
pub(crate) fn is_one(bytes: &[u8]) -> bool {
    VaultFile::decode(bytes).is_ok()
}
