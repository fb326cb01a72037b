//! What somebody proves who he is with: one PEM file of private key, own certificate and the authority's, in a directory of
//! its own. A machine's ([`crate::Identity`]) and a relay's ([`RelayIdentity`]) differ in whom the certificate names.

use crate::credential::RelayCredential;
use crate::{WireError, files, identity, tls};
use highwater_delta::RelayId;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use std::path::Path;
use zeroize::Zeroizing;

/// Name of the file within an identity's directory.
pub const IDENTITY_FILE: &str = "identity.pem";

/// See the module.
pub struct Papers {
    /// Own certificate.
    pub cert_chain: Vec<CertificateDer<'static>>,
    /// Own key.
    pub key: PrivateKeyDer<'static>,
    /// The vault's authority.
    pub ca: CertificateDer<'static>,
    pem: Zeroizing<String>,
}

impl Papers {
    pub(crate) fn from_pems(key_pem: &str, cert_pem: &str, ca_pem: &str) -> Result<Self, WireError> {
        Self::from_pem(Zeroizing::new(format!("{key_pem}{cert_pem}{ca_pem}")))
    }

    fn from_pem(pem: Zeroizing<String>) -> Result<Self, WireError> {
        let (mut chain, key) = identity::load_chain(&pem, &pem)?;
        if chain.len() != 2 {
            let cause = format!("it holds {} certificates, not the own and the authority's", chain.len());
            return Err(WireError::identity("the identity", cause));
        }
        let ca = chain.remove(1);
        Ok(Self { cert_chain: chain, key, ca, pem })
    }

    pub(crate) fn load(dir: &Path) -> Result<Self, WireError> {
        Self::from_pem(files::read_secret(&dir.join(IDENTITY_FILE))?)
    }

    /// The own certificate.
    pub(crate) fn cert(&self) -> Result<&CertificateDer<'static>, WireError> {
        self.cert_chain.first().ok_or_else(|| WireError::identity("the identity", "it has no certificate"))
    }

    /// The authority's certificate is the last of the file.
    fn ca_pem(&self) -> &str {
        self.pem.rfind("-----BEGIN CERTIFICATE-----").map_or("", |at| &self.pem[at..])
    }

    /// Writes it into its directory, durably and as a whole.
    pub fn save(&self, dir: &Path) -> Result<(), WireError> {
        std::fs::create_dir_all(dir).map_err(|source| WireError::File { path: dir.to_owned(), source })?;
        let _lock = files::lock_dir(dir)?;
        files::write_secret(&dir.join(IDENTITY_FILE), self.pem.as_bytes())
    }

    /// With a renewed certificate, which must be valid now, of the same authority, and belong to this key.
    pub(crate) fn renewed(&self, key_pem: &str, cert_pem: &str) -> Result<Self, WireError> {
        let new = Self::from_pems(key_pem, cert_pem, self.ca_pem())?;
        tls::check_machine_cert(&self.ca, new.cert()?, UnixTime::now())?;
        Ok(new)
    }

    /// Writes it in place of `old`, in one step: a crash leaves the one or the other, each with its own key. False, and
    /// nothing written, if the directory holds another identity by now: it was enrolled again meanwhile.
    pub(crate) fn replace(&self, dir: &Path, old: &Self) -> Result<bool, WireError> {
        let _lock = files::lock_dir(dir)?;
        let path = dir.join(IDENTITY_FILE);
        if *files::read_secret(&path)? != *old.pem {
            return Ok(false);
        }
        files::write_secret(&path, self.pem.as_bytes())?;
        Ok(true)
    }
}

/// Who a relay is.
pub struct RelayIdentity {
    /// The relay that the certificate names.
    pub relay: RelayId,
    papers: Papers,
}

impl std::ops::Deref for RelayIdentity {
    type Target = Papers;
    fn deref(&self) -> &Papers {
        &self.papers
    }
}

impl std::fmt::Debug for RelayIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayIdentity").field("relay", &self.relay).finish_non_exhaustive()
    }
}

impl RelayIdentity {
    /// From its parts.
    pub fn from_pems(key_pem: &str, cert_pem: &str, ca_pem: &str) -> Result<Self, WireError> {
        Self::of(Papers::from_pems(key_pem, cert_pem, ca_pem)?)
    }

    fn of(papers: Papers) -> Result<Self, WireError> {
        Ok(Self { relay: RelayCredential::of(papers.cert()?)?.relay, papers })
    }

    /// Reads it from its directory.
    pub fn load(dir: &Path) -> Result<Self, WireError> {
        Self::of(Papers::load(dir)?)
    }

    /// What the certificate says.
    pub fn credential(&self) -> Result<RelayCredential, WireError> {
        RelayCredential::of(self.cert()?)
    }

    /// This relay with a renewed certificate: as [`crate::Identity::renewed`].
    pub fn renewed(&self, key_pem: &str, cert_pem: &str) -> Result<Self, WireError> {
        let new = Self::of(self.papers.renewed(key_pem, cert_pem)?)?;
        if new.relay != self.relay {
            return Err(WireError::identity("the renewed certificate", "it names another relay"));
        }
        Ok(new)
    }

    /// Writes it in place of `old`: as [`crate::Identity::replace`].
    pub fn replace(&self, dir: &Path, old: &Self) -> Result<bool, WireError> {
        self.papers.replace(dir, &old.papers)
    }
}
