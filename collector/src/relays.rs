//! Relays: other collectors that keep their vaults here. What is known of each is sealed documents, as of machines; their objects lie
//! beneath `relays/<relay>/` of the store, as they were put, and are of no interest to this collector.
//!
//! Names beneath `control/`: `relays/<relay>` (who), and the folders of [`crate::holder`].

use crate::CollectorError;
use crate::certificates::{self, Origin, Standing, State};
use crate::clock::now_ms;
use crate::metrics::RelayMetrics;
use crate::shared::Shared;
use async_trait::async_trait;
use highwater_delta::{Code, RelayId};
use highwater_relay::RelayError;
use highwater_relay::server::{Gate, Meter, Relays};
use highwater_vault::Vault;
use highwater_wire::{RelayCredential, WireError};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::Level;

#[derive(Serialize, Deserialize)]
struct Document {
    /// For people.
    name: String,
    joined_at_ms: u64,
}

/// A relay and its newest certificate that is not revoked.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listed {
    /// The relay.
    pub relay: RelayId,
    /// What its host called itself when it joined.
    pub name: String,
    /// Whether it may connect.
    pub state: State,
    /// Generation of its certificate, or of the last one revoked.
    pub generation: u32,
    /// When its certificate expires, in milliseconds since 1970.
    pub expires_ms: Option<u64>,
    /// How it got that certificate.
    pub origin: Option<Origin>,
}

fn name_of(relay: RelayId) -> String {
    format!("relays/{relay}")
}

/// Makes a relay known. Does nothing if it is known already.
pub async fn register(vault: &Vault, relay: RelayId, name: &str) -> Result<(), CollectorError> {
    let document = Document { name: name.to_owned(), joined_at_ms: now_ms() };
    let path = name_of(relay);
    let text = serde_json::to_vec(&document).map_err(|_| CollectorError::Document(path.clone()))?;
    vault.control_create(&path, &text).await?;
    Ok(())
}

/// All relays, and how they stand.
pub async fn list(vault: &Vault) -> Result<Vec<Listed>, CollectorError> {
    let revoked = certificates::all_revoked::<RelayId>(vault).await?;
    let mut all = Vec::new();
    for path in vault.control_list("relays/").await? {
        let Some(relay) = path.strip_prefix("relays/").and_then(|id| id.parse().ok()) else { continue };
        let bad = || CollectorError::Document(path.clone());
        let text = vault.control_get(&path).await?.ok_or_else(bad)?;
        let Document { name, .. } = serde_json::from_slice(&text).map_err(|_| bad())?;
        let standing = certificates::standing(vault, relay, revoked.get(&relay).copied()).await?;
        let Standing { state, generation, expires_ms, origin } = standing;
        all.push(Listed { relay, name, state, generation, expires_ms, origin });
    }
    Ok(all)
}

/// The relay that an operator means: by its id, the beginning of one, or its name; if only one can be meant.
pub async fn find(vault: &Vault, text: &str) -> Result<RelayId, CollectorError> {
    let begin = text.to_ascii_lowercase();
    let means = |listed: &Listed| {
        (!begin.is_empty() && listed.relay.to_string().starts_with(&begin)) || listed.name == text
    };
    let found: Vec<RelayId> =
        list(vault).await?.iter().filter(|listed| means(listed)).map(|l| l.relay).collect();
    match found[..] {
        [relay] => Ok(relay),
        [] => Err(CollectorError::NoSuchRelay(text.to_owned(), "no relay has this id or name")),
        _ => Err(CollectorError::NoSuchRelay(
            text.to_owned(),
            "several relays have this name, or an id that begins so",
        )),
    }
}

/// Serves an authenticated connection to its end.
pub async fn connection<S>(
    shared: &Arc<Shared>,
    relays: &Arc<Relays>,
    credential: RelayCredential,
    stream: S,
    peer: SocketAddr,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let relay = credential.relay;
    let _gauge = shared.metrics.relays.connection();
    let gate = Arc::new(Door { shared: shared.clone(), credential });
    let ended = relays.serve(relay, stream, gate, shared.shutdown.cancelled()).await;
    let Err(error) = ended else { return };
    shared.metrics.refused(error.code());
    if let Some(left_out) = shared.say_of_relay(relay, Level::WARN) {
        tracing::warn!(%relay, %peer, code = %Code(error.code()), action = error.action(), %error, left_out, "a relay's connection was closed");
    }
}

/// One connection's.
struct Door {
    shared: Arc<Shared>,
    credential: RelayCredential,
}

#[async_trait]
impl Gate for Door {
    fn admits(&self) -> Result<(), RelayError> {
        let Self { shared, credential } = self;
        if shared.is_relay_revoked(credential) {
            return Err(WireError::RelayRevoked(credential.relay).into());
        }
        if credential.expires_ms <= now_ms() {
            return Err(refused(&CollectorError::RelayExpired));
        }
        if !shared.revocations_are_known() {
            return Err(refused(&CollectorError::RevocationsUnknown));
        }
        Ok(())
    }

    async fn renew(&self, csr_pem: &str) -> Result<String, RelayError> {
        let Self { shared, credential } = self;
        let renewed = async {
            // First: also what is refused costs a look into the vault and a line in the log.
            shared.allow_relay_renewal(credential.relay)?;
            certificates::renew_relay(shared, credential, csr_pem).await
        };
        let pem = renewed.await.map_err(|error: CollectorError| refused(&error))?;
        shared.metrics.renewed();
        if let Some(left_out) = shared.say_of_relay(credential.relay, Level::INFO) {
            tracing::info!(relay = %credential.relay, left_out, "a relay's certificate was renewed");
        }
        Ok(pem)
    }
}

fn refused(error: &CollectorError) -> RelayError {
    let told = error.refusal();
    RelayError::Refused(highwater_relay::Refusal {
        code: format!("HW-{:04}", told.code),
        cause: told.cause,
        action: told.action,
        retry: told.retry,
    })
}

/// Counts what relays do, and says what is refused them.
pub struct Told(pub Arc<Shared>);

impl Told {
    fn metrics(&self) -> &RelayMetrics {
        &self.0.metrics.relays
    }
}

impl Meter for Told {
    fn request(&self, kind: &'static str) {
        self.metrics().request(kind);
    }
    fn received(&self, bytes: u64) {
        self.metrics().received(bytes);
    }
    fn sent(&self, bytes: u64) {
        self.metrics().sent(bytes);
    }
    fn refused(&self, relay: RelayId, error: &RelayError) {
        self.0.metrics.refused(error.code());
        if let Some(left_out) = self.0.say_of_relay(relay, Level::WARN) {
            tracing::warn!(%relay, code = %Code(error.code()), action = error.action(), %error, left_out, "a relay's request was refused");
        }
    }
}
