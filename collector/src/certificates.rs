//! Machines' certificates, as sealed documents of the vault: so that they can be revoked while a collector runs, and hold for
//! every collector of the vault.
//!
//! `certificates/<machine>/<serial>` is written before a certificate is handed out. `revoked/<machine>.<generation>` ends
//! all of the machine's certificates up to that generation ([`highwater_wire::credential`]), for ever; documents are never
//! changed, so nothing takes that back. A machine that is to return is enrolled again with a token made for it: the
//! token, and what it buys, are of the next generation. A token made before the revocation is void with it.

use crate::CollectorError;
use crate::clock::now_ms;
use crate::holder::Holder;
use crate::shared::Shared;
use futures::{StreamExt, TryStreamExt, stream};
use highwater_delta::MachineId;
use highwater_vault::Vault;
use highwater_wire::identity::{Grant, RelayGrant};
use highwater_wire::{Credential, RelayCredential, WireError};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Documents read at once.
const READ_DEPTH: usize = 16;

/// How a certificate came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// With a token.
    Enrolment,
    /// By the certificate before it.
    Renewal,
}

#[derive(Serialize, Deserialize)]
struct Document {
    generation: u32,
    issued_at_ms: u64,
    expires_ms: u64,
    origin: Origin,
}

#[derive(Serialize)]
struct Revocation {
    revoked_at_ms: u64,
    /// For people.
    reason: Option<String>,
}

/// A machine and its newest certificate that is not revoked.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listed {
    /// The machine.
    pub machine: MachineId,
    /// Its host name at its first enrolment.
    pub host: String,
    /// Whether it may connect.
    pub state: State,
    /// Generation of its certificate, or of the last one revoked.
    pub generation: u32,
    /// When its certificate expires, in milliseconds since 1970; of a machine enrolled before this was recorded, none.
    pub expires_ms: Option<u64>,
    /// How it got that certificate.
    pub origin: Option<Origin>,
}

/// Whether a machine may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has a certificate that is valid.
    Enrolled,
    /// Its certificate has expired.
    Expired,
    /// It was locked out, and has not been enrolled again.
    Revoked,
}

/// Certifies a machine's new key, and records it first.
pub async fn issue(
    shared: &Shared,
    csr_pem: &str,
    grant: Grant,
    origin: Origin,
) -> Result<String, CollectorError> {
    let pem = match origin {
        Origin::Enrolment => shared.authority.certify(csr_pem, grant)?,
        Origin::Renewal => shared.authority.recertify(csr_pem, grant)?,
    };
    let Credential { machine, generation, serial, expires_ms, .. } = Credential::of(&read(&pem)?)?;
    record(
        &shared.vault,
        machine,
        &serial,
        Document { generation, issued_at_ms: now_ms(), expires_ms, origin },
    )
    .await?;
    Ok(pem)
}

fn read(cert_pem: &str) -> Result<CertificateDer<'static>, CollectorError> {
    CertificateDer::from_pem_slice(cert_pem.as_bytes())
        .map_err(|_| CollectorError::Document("certificates".to_owned()))
}

/// The same for a relay.
pub async fn issue_relay(
    shared: &Shared,
    csr_pem: &str,
    grant: RelayGrant,
    origin: Origin,
) -> Result<String, CollectorError> {
    let pem = shared.authority.certify_relay(csr_pem, grant)?;
    let RelayCredential { relay, generation, serial, expires_ms, .. } = RelayCredential::of(&read(&pem)?)?;
    record(
        &shared.vault,
        relay,
        &serial,
        Document { generation, issued_at_ms: now_ms(), expires_ms, origin },
    )
    .await?;
    Ok(pem)
}

async fn record<H: Holder>(
    vault: &Vault,
    holder: H,
    serial: &str,
    document: Document,
) -> Result<(), CollectorError> {
    let name = format!("{}/{holder}/{serial}", H::CERTIFICATES);
    let text = serde_json::to_vec(&document).map_err(|_| CollectorError::Document(name.clone()))?;
    if vault.control_create(&name, &text).await? { Ok(()) } else { Err(CollectorError::Document(name)) }
}

/// Renews the certificate of a session. Whom it is for is said by the certificate that the session was opened with, and by
/// nothing that was asked.
pub async fn renew(shared: &Shared, held: &Credential, csr_pem: &str) -> Result<String, CollectorError> {
    // First: also what is refused costs a look into the vault and a line in the log.
    shared.allow_renewal(held.machine)?;
    // Those that the collector knows may be some seconds old.
    if let Some(upto) =
        revoked_upto(&shared.vault, held.machine).await?.filter(|upto| held.generation <= *upto)
    {
        // Told to end here, the machine would else be let in again until they are read.
        shared.note_revoked(held.machine, upto);
        return Err(WireError::Revoked(held.machine).into());
    }
    check_due(shared, held.not_before_ms, held.expires_ms)?;
    let grant = Grant {
        machine: held.machine,
        generation: held.generation,
        validity: shared.config.certificate_validity,
    };
    issue(shared, csr_pem, grant, Origin::Renewal).await
}

/// The same of a relay's connection.
pub async fn renew_relay(
    shared: &Shared,
    held: &RelayCredential,
    csr_pem: &str,
) -> Result<String, CollectorError> {
    if let Some(upto) = revoked_upto(&shared.vault, held.relay).await?.filter(|upto| held.generation <= *upto)
    {
        shared.note_relay_revoked(held.relay, upto);
        return Err(WireError::RelayRevoked(held.relay).into());
    }
    check_due(shared, held.not_before_ms, held.expires_ms)?;
    let grant = RelayGrant {
        relay: held.relay,
        generation: held.generation,
        validity: shared.config.certificate_validity,
    };
    issue_relay(shared, csr_pem, grant, Origin::Renewal).await
}

fn check_due(shared: &Shared, not_before_ms: u64, expires_ms: u64) -> Result<(), CollectorError> {
    let half_ms = expires_ms.saturating_sub(not_before_ms) / 2;
    if expires_ms.saturating_sub(now_ms()) > half_ms {
        return Err(CollectorError::RenewalNotDue);
    }
    if shared.authority.expires_ms() <= expires_ms {
        return Err(CollectorError::AuthorityExpires);
    }
    Ok(())
}

/// Up to which generation the certificates of each are revoked.
pub async fn all_revoked<H: Holder>(vault: &Vault) -> Result<HashMap<H, u32>, CollectorError> {
    let mut revoked: HashMap<H, u32> = HashMap::new();
    let names = vault.control_list(&format!("{}/", H::REVOKED)).await?;
    for (holder, generation) in names.iter().filter_map(|name| parse(name)) {
        let upto = revoked.entry(holder).or_default();
        *upto = generation.max(*upto);
    }
    // Who was erased ends with every certificate that he may have.
    for name in vault.control_list(H::ERASED).await? {
        let holder = name.rsplit('/').next().and_then(|holder| holder.parse().ok());
        revoked.extend(holder.map(|holder| (holder, u32::MAX)));
    }
    Ok(revoked)
}

/// Up to which generation the certificates of one are revoked, if at all.
pub async fn revoked_upto<H: Holder>(vault: &Vault, holder: H) -> Result<Option<u32>, CollectorError> {
    Ok(all_revoked::<H>(vault).await?.get(&holder).copied())
}

/// A revocation's name: `revoked/<machine>.<generation>`.
fn parse<H: Holder>(name: &str) -> Option<(H, u32)> {
    let (machine, generation) = name.strip_prefix(H::REVOKED)?.strip_prefix('/')?.rsplit_once('.')?;
    Some((machine.parse().ok()?, generation.parse().ok()?))
}

/// The generation of what a machine, or relay, that is enrolled now gets.
pub async fn next_generation<H: Holder>(vault: &Vault, holder: H) -> Result<u32, CollectorError> {
    Ok(revoked_upto(vault, holder).await?.map_or(0, |upto| upto.saturating_add(1)))
}

/// Locks a machine out, with every certificate and every unused token that it has now. False if it was locked out already:
/// then only such tokens are void.
pub async fn revoke(
    vault: &Vault,
    machine: MachineId,
    reason: Option<String>,
) -> Result<bool, CollectorError> {
    // A machine that nobody knows is a slip of the pen.
    vault.host_name(machine).await?;
    lock_out(vault, machine, reason).await
}

/// The same for one that is known to be there.
pub async fn lock_out<H: Holder>(
    vault: &Vault,
    holder: H,
    reason: Option<String>,
) -> Result<bool, CollectorError> {
    let generation = next_generation(vault, holder).await?;
    let was_there = generation == 0
        || documents(vault, holder).await?.iter().any(|document| document.generation == generation);
    let name = format!("{}/{holder}.{generation}", H::REVOKED);
    let text = serde_json::to_vec(&Revocation { revoked_at_ms: now_ms(), reason })
        .map_err(|_| CollectorError::Document(name.clone()))?;
    // Whoever else has just created it has done the same.
    vault.control_create(&name, &text).await?;
    Ok(was_there)
}

/// All machines of the vault, and how they stand.
pub async fn list(vault: &Vault) -> Result<Vec<Listed>, CollectorError> {
    let revoked = all_revoked::<MachineId>(vault).await?;
    let machines = vault.machines().await?;
    stream::iter(machines)
        .map(|machine| listed(vault, machine, revoked.get(&machine).copied()))
        .buffered(READ_DEPTH)
        .try_collect()
        .await
}

async fn listed(vault: &Vault, machine: MachineId, upto: Option<u32>) -> Result<Listed, CollectorError> {
    let host = vault.host_name(machine).await?;
    let Standing { state, generation, expires_ms, origin } = standing(vault, machine, upto).await?;
    Ok(Listed { machine, host, state, generation, expires_ms, origin })
}

/// How somebody stands: see [`Listed`].
pub struct Standing {
    /// Whether it may connect.
    pub state: State,
    /// See [`Listed`].
    pub generation: u32,
    /// See [`Listed`].
    pub expires_ms: Option<u64>,
    /// See [`Listed`].
    pub origin: Option<Origin>,
}

/// How a machine or relay stands whose certificates are revoked up to some generation.
pub async fn standing<H: Holder>(
    vault: &Vault,
    holder: H,
    upto: Option<u32>,
) -> Result<Standing, CollectorError> {
    let documents = documents(vault, holder).await?;
    let good = documents.iter().filter(|document| upto.is_none_or(|upto| document.generation > upto));
    let newest = good.max_by_key(|document| (document.generation, document.expires_ms));
    let state = match newest {
        Some(document) if document.expires_ms <= now_ms() => State::Expired,
        // Enrolled before certificates were recorded.
        None if upto.is_some() => State::Revoked,
        _ => State::Enrolled,
    };
    Ok(Standing {
        state,
        generation: newest.map(|document| document.generation).or(upto).unwrap_or(0),
        expires_ms: newest.map(|document| document.expires_ms),
        origin: newest.map(|document| document.origin),
    })
}

async fn documents<H: Holder>(vault: &Vault, holder: H) -> Result<Vec<Document>, CollectorError> {
    let names = vault.control_list(&format!("{}/{holder}", H::CERTIFICATES)).await?;
    stream::iter(names)
        .map(|name| async move {
            let bad = || CollectorError::Document(name.clone());
            let text = vault.control_get(&name).await?.ok_or_else(bad)?;
            serde_json::from_slice(&text).map_err(|_| bad())
        })
        .buffered(READ_DEPTH)
        .try_collect()
        .await
}

/// The machine that an operator means: by its id, by the beginning of one, or by its host's name; if only one can be meant.
pub async fn find(vault: &Vault, text: &str) -> Result<MachineId, CollectorError> {
    if let Ok(machine) = text.parse() {
        vault.host_name(machine).await?;
        return Ok(machine);
    }
    let mut found = Vec::new();
    let begin = text.to_ascii_lowercase();
    for machine in vault.machines().await? {
        let is_begin = !begin.is_empty() && machine.to_string().starts_with(&begin);
        if is_begin || vault.host_name(machine).await? == text {
            found.push(machine);
        }
    }
    match found[..] {
        [machine] => Ok(machine),
        [] => {
            Err(CollectorError::NoSuchMachine(text.to_owned(), "no machine of the vault has this id or name"))
        }
        _ => Err(CollectorError::NoSuchMachine(
            text.to_owned(),
            "several machines have this name, or an id that begins so",
        )),
    }
}
