//! Whom certificates are issued to, and where the vault keeps what is known of them: each kind in folders of its own.

use highwater_delta::{MachineId, RelayId};
use serde::{Serialize, de::DeserializeOwned};
use std::{fmt::Display, hash::Hash, str::FromStr};

/// A machine, or a relay.
pub trait Holder: Copy + Eq + Hash + Display + FromStr + Serialize + DeserializeOwned + Send + Sync {
    /// Folder of certificates.
    const CERTIFICATES: &'static str;
    /// Folder of revocations.
    const REVOKED: &'static str;
    /// Folder of those that are no more.
    const ERASED: &'static str;
    /// Folder of tokens.
    const TOKENS: &'static str;
    /// Folder of tokens that were used.
    const TOKENS_USED: &'static str;
}

impl Holder for MachineId {
    const CERTIFICATES: &'static str = "certificates";
    const REVOKED: &'static str = "revoked";
    const ERASED: &'static str = "erased";
    const TOKENS: &'static str = "tokens";
    const TOKENS_USED: &'static str = "tokens-used";
}

impl Holder for RelayId {
    const CERTIFICATES: &'static str = "relay-certificates";
    const REVOKED: &'static str = "relay-revoked";
    const ERASED: &'static str = "relay-erased";
    const TOKENS: &'static str = "relay-tokens";
    const TOKENS_USED: &'static str = "relay-tokens-used";
}
