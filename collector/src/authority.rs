//! The vault's certificate authority within the vault, and the collector's own certificate.
//!
//! The authority lies sealed in one control document, made once. The collector's own key never touches a disk: it
//! issues itself a certificate at each start, and again once a third of its validity has passed.

use crate::CollectorError;
use highwater_vault::Vault;
use highwater_wire::identity::{Authority, load_chain};
use highwater_wire::tls;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, RwLock};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const DOCUMENT: &str = "authority";

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct Sealed {
    cert_pem: String,
    key_pem: String,
}

/// Makes the vault's authority, unless there is one.
pub async fn create(vault: &Vault) -> Result<Authority, CollectorError> {
    let authority = Authority::create(&vault.id().to_string())?;
    let sealed = Sealed {
        cert_pem: authority.cert_pem().to_owned(),
        key_pem: authority.key_pem().as_str().to_owned(),
    };
    let text = Zeroizing::new(
        serde_json::to_vec(&sealed).map_err(|_| CollectorError::Document(DOCUMENT.to_owned()))?,
    );
    if vault.control_create(DOCUMENT, &text).await? { Ok(authority) } else { load(vault).await }
}

/// Reads the vault's authority.
pub async fn load(vault: &Vault) -> Result<Authority, CollectorError> {
    let missing = || CollectorError::Document(DOCUMENT.to_owned());
    let text = vault.control_get(DOCUMENT).await?.ok_or_else(missing)?;
    let sealed: Sealed = serde_json::from_slice(&text).map_err(|_| missing())?;
    Ok(Authority::from_pem(&sealed.cert_pem, &sealed.key_pem)?)
}

/// The collector's certificate, which can be renewed while it is used.
#[derive(Debug)]
pub struct OwnCert(RwLock<Arc<CertifiedKey>>);

impl OwnCert {
    /// Issues one for these names.
    pub fn issue(authority: &Authority, names: &[String]) -> Result<Self, CollectorError> {
        Ok(Self(RwLock::new(certified(authority, names)?)))
    }

    /// Issues the next one.
    pub fn renew(&self, authority: &Authority, names: &[String]) -> Result<(), CollectorError> {
        let next = certified(authority, names)?;
        *self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner) = next;
        Ok(())
    }
}

fn certified(authority: &Authority, names: &[String]) -> Result<Arc<CertifiedKey>, CollectorError> {
    let issued = authority.issue_server(names)?;
    let (chain, key) = load_chain(&issued.chain_pem, &issued.key_pem)?;
    Ok(tls::fixed_cert(chain, key)?)
}

impl ResolvesServerCert for OwnCert {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone())
    }
}
