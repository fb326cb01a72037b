//! Another collector as the place of a vault.

use super::remote::within;
use crate::{Result, VaultError, location::Relay};
use highwater_relay::Client;
use object_store::{ObjectStore, path::Path};
use std::sync::Arc;

/// Opens it: the identity is read, and nothing asked of the other collector yet.
pub(super) fn open(relay: &Relay) -> Result<Arc<dyn ObjectStore>> {
    let refuse = |cause: String| VaultError::Location { location: relay.to_string(), cause };
    let client = Client::open(relay.address.clone()).map_err(|e| refuse(e.to_string()))?;
    let prefix = Path::parse(&relay.prefix).map_err(|e| refuse(e.to_string()))?;
    Ok(within(client, prefix))
}
