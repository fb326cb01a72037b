//! What lies in a vault outside its machines, and is of no kind that is known.

use super::{PROBLEMS_MAX, Report};
use crate::{Result, Vault, store};
use futures::TryStreamExt;

/// Folders with documents of their own, or of others: keys, control documents, machines, what other collectors store here, and what
/// looks at the store's clock.
const FOLDERS: [&str; 5] = ["keys", "control", "machines", "relays", "clock"];

/// Notes them, and no more than are told; of a vault at another collector, none.
pub(super) async fn note(vault: &Vault, own: &mut Report) -> Result<()> {
    // There the other side can look.
    if vault.is_at_relay() {
        return Ok(());
    }
    let root = vault.store().list_with_delimiter(None).await?;
    let vault_file = store::vault_path();
    let files = root.objects.iter().map(|meta| &meta.location).filter(|path| **path != vault_file);
    own.strangers.extend(files.take(PROBLEMS_MAX).map(ToString::to_string));
    for folder in root.common_prefixes {
        if folder.filename().is_some_and(|name| FOLDERS.contains(&name)) {
            continue;
        }
        let mut listed = vault.store().list(Some(&folder));
        while own.strangers.len() < PROBLEMS_MAX
            && let Some(meta) = listed.try_next().await?
        {
            own.strangers.push(meta.location.to_string());
        }
    }
    own.strangers.sort();
    Ok(())
}
