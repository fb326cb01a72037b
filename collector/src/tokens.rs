//! Enrolment tokens, as sealed documents of the vault: so they can be made while a collector runs, and hold for
//! every collector of the vault.
//!
//! `tokens/<id>` keeps the secret's SHA-256 and the expiry. `tokens-used/<id>` is created, if absent, by whoever uses the
//! token: of any number of attempts exactly one creates it. Tokens of relays lie in folders of their own ([`Holder`]), so that the
//! one can't be used for the other.

use crate::CollectorError;
use crate::holder::Holder;
use highwater_delta::MachineId;
use highwater_vault::Vault;
use highwater_wire::enroll::{Token, unhex};
use highwater_wire::{certificate::hex, identity::random};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use zeroize::Zeroizing;

#[derive(Serialize, Deserialize)]
#[serde(bound = "H: Holder")]
struct Document<H> {
    secret_sha256: String,
    expires_at_ms: u64,
    /// For people: the host it was made for.
    host_name: Option<String>,
    /// Who is to return with it; none: somebody new.
    #[serde(default)]
    returning: Option<Returning<H>>,
}

#[derive(Serialize)]
#[serde(bound = "H: Holder")]
struct Used<H> {
    machine: H,
    used_at_ms: u64,
}

/// A machine, or relay, that is enrolled again, as the generation that was next when its token was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "H: Holder")]
pub struct Returning<H = MachineId> {
    /// Which.
    pub machine: H,
    /// See [`highwater_wire::credential`].
    pub generation: u32,
}

/// A token that was checked.
#[derive(Clone, Copy, Debug)]
pub struct Checked<H = MachineId> {
    /// Its id.
    pub id: [u8; 16],
    /// Whom it was made for.
    pub returning: Option<Returning<H>>,
}

/// Makes a token for a machine, that is valid from `now_ms` for `ttl`.
pub async fn create(
    vault: &Vault,
    ca_fingerprint: [u8; 32],
    now_ms: u64,
    ttl: Duration,
    host_name: Option<String>,
    returning: Option<Returning>,
) -> Result<Token, CollectorError> {
    create_for(vault, ca_fingerprint, now_ms, ttl, host_name, returning).await
}

/// The same for whomever.
pub async fn create_for<H: Holder>(
    vault: &Vault,
    ca_fingerprint: [u8; 32],
    now_ms: u64,
    ttl: Duration,
    host_name: Option<String>,
    returning: Option<Returning<H>>,
) -> Result<Token, CollectorError> {
    let token = Token { id: random()?, secret: Zeroizing::new(random()?), ca_fingerprint };
    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let document = Document {
        secret_sha256: hex(&sha256(token.secret.as_ref())),
        expires_at_ms: now_ms.saturating_add(ttl_ms),
        host_name,
        returning,
    };
    let name = name::<H>(&token.id);
    let text = serde_json::to_vec(&document).map_err(|_| CollectorError::Document(name.clone()))?;
    if vault.control_create(&name, &text).await? { Ok(token) } else { Err(CollectorError::Document(name)) }
}

/// Checks a token, without using it: that it was not used yet may change until [`use_up`]. An unknown token and a wrong secret are
/// told apart to nobody, and only who knows the secret hears that it has expired, or was used.
pub async fn check<H: Holder>(
    vault: &Vault,
    id_hex: &str,
    secret_hex: &str,
    now_ms: u64,
) -> Result<Checked<H>, CollectorError> {
    let id: [u8; 16] = unhex(id_hex).map_err(|_| CollectorError::TokenInvalid)?;
    let secret = Zeroizing::new(unhex::<32>(secret_hex).map_err(|_| CollectorError::TokenInvalid)?);
    let text = vault.control_get(&name::<H>(&id)).await?.ok_or(CollectorError::TokenInvalid)?;
    let document: Document<H> =
        serde_json::from_slice(&text).map_err(|_| CollectorError::Document(name::<H>(&id)))?;
    let known: [u8; 32] =
        unhex(&document.secret_sha256).map_err(|_| CollectorError::Document(name::<H>(&id)))?;
    aws_lc_rs::constant_time::verify_slices_are_equal(&known, &sha256(secret.as_ref()))
        .map_err(|_| CollectorError::TokenInvalid)?;
    if now_ms >= document.expires_at_ms {
        return Err(CollectorError::TokenExpired);
    }
    if vault.control_get(&used_name::<H>(&id)).await?.is_some() {
        return Err(CollectorError::TokenUsed);
    }
    Ok(Checked { id, returning: document.returning })
}

/// Uses a checked token for a machine or relay: succeeds once.
pub async fn use_up<H: Holder>(
    vault: &Vault,
    id: &[u8; 16],
    holder: H,
    now_ms: u64,
) -> Result<(), CollectorError> {
    let name = used_name::<H>(id);
    let text = serde_json::to_vec(&Used { machine: holder, used_at_ms: now_ms })
        .map_err(|_| CollectorError::Document(name.clone()))?;
    if vault.control_create(&name, &text).await? { Ok(()) } else { Err(CollectorError::TokenUsed) }
}

fn name<H: Holder>(id: &[u8; 16]) -> String {
    format!("{}/{}", H::TOKENS, hex(id))
}

fn used_name<H: Holder>(id: &[u8; 16]) -> String {
    format!("{}/{}", H::TOKENS_USED, hex(id))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}
