//! Certificates: the vault's own authority, what it issues, and who a certificate names.
//!
//! Keys are ECDSA P-256. A machine's key is made on the machine and never leaves it; of its signing request only the
//! public key is used, every name in it is ignored. The authority's key is kept sealed in the vault.

use crate::WireError;
use crate::certificate::{COLLECTOR_URI, MACHINE_URI_PREFIX, RELAY_URI_PREFIX};
use crate::credential::{Credential, GENERATION_URI_PREFIX};
use highwater_delta::{MachineId, RelayId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

/// Most bytes of a signing request.
pub const CSR_BYTES_MAX: usize = 8 * 1024;
/// Most bytes of a machine's certificate, as PEM.
pub const CERT_BYTES_MAX: usize = 16 * 1024;
/// Most names of a server certificate.
pub const SERVER_NAMES_MAX: usize = 64;

const DAY: Duration = Duration::from_secs(86_400);
/// How long an authority is valid.
pub const CA_VALIDITY: Duration = Duration::from_secs(3652 * DAY.as_secs());
/// How long a machine's certificate is valid.
pub const CLIENT_VALIDITY: Duration = Duration::from_secs(365 * DAY.as_secs());
/// How long a collector's certificate is valid; the collector issues itself a new one long before.
pub const SERVER_VALIDITY: Duration = Duration::from_secs(90 * DAY.as_secs());
/// Clocks may differ by so much at issue; by less for a certificate that is valid for less.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// The certificate authority of a vault.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cert_pem: String,
    cert: CertificateDer<'static>,
    expires_ms: u64,
}

/// What a machine's certificate is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who it is for.
    pub machine: MachineId,
    /// See [`crate::credential`].
    pub generation: u32,
    /// How long it is valid; never longer than the authority.
    pub validity: Duration,
}

/// What a relay's certificate is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayGrant {
    /// Who it is for.
    pub relay: RelayId,
    /// See [`crate::credential`].
    pub generation: u32,
    /// How long it is valid; never longer than the authority.
    pub validity: Duration,
}

/// A certificate and its key, as PEM.
pub struct Issued {
    /// The certificate, followed by the authority's.
    pub chain_pem: String,
    /// PKCS #8.
    pub key_pem: Zeroizing<String>,
}

impl Authority {
    /// A new authority; `name` is for people.
    pub fn create(name: &str) -> Result<Self, WireError> {
        let key = generate_key()?;
        let mut params = params(&format!("Highwater CA {name}"), CA_VALIDITY)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&key).map_err(|e| WireError::identity("the authority", e))?;
        Self::new(cert.pem(), key)
    }

    /// The authority with this certificate and key.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, WireError> {
        let key = KeyPair::from_pem(key_pem).map_err(|e| WireError::identity("the authority's key", e))?;
        Self::new(cert_pem.to_owned(), key)
    }

    fn new(cert_pem: String, key: KeyPair) -> Result<Self, WireError> {
        let unusable = |e: String| WireError::identity("the authority's certificate", e);
        let cert =
            CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|e| unusable(e.to_string()))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&cert).map_err(|e| unusable(e.to_string()))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(unusable("it belongs to another key".to_owned()));
        }
        let expires = parsed.validity().not_after.timestamp();
        let expires_ms = u64::try_from(expires).unwrap_or(0).saturating_mul(1000);
        let issuer = Issuer::from_ca_cert_der(&cert, key).map_err(|e| unusable(e.to_string()))?;
        Ok(Self { issuer, cert_pem, cert, expires_ms })
    }

    /// Its certificate.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Its certificate.
    #[must_use]
    pub const fn cert(&self) -> &CertificateDer<'static> {
        &self.cert
    }

    /// When it expires, in milliseconds since 1970. Nothing that it issues is valid for longer.
    #[must_use]
    pub const fn expires_ms(&self) -> u64 {
        self.expires_ms
    }

    /// Its key, to be sealed.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }

    /// A signature by its key. Whoever calls begins what is signed with something that no certificate begins with.
    pub(crate) fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, WireError> {
        use rcgen::SigningKey;
        self.issuer.key().sign(bytes).map_err(|e| WireError::identity("the authority's key", e))
    }

    /// A certificate and a new key for a collector that is reached under these names and addresses.
    pub fn issue_server(&self, names: &[String]) -> Result<Issued, WireError> {
        let what = "the collector's certificate";
        if names.is_empty() || names.len() > SERVER_NAMES_MAX {
            return Err(WireError::identity(
                what,
                format!("give 1 to {SERVER_NAMES_MAX} names or addresses"),
            ));
        }
        let key = generate_key()?;
        let mut params = params("Highwater collector", SERVER_VALIDITY)?;
        params.subject_alt_names =
            CertificateParams::new(names).map_err(|e| WireError::identity(what, e))?.subject_alt_names;
        params.subject_alt_names.push(uri(COLLECTOR_URI)?);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let cert = params.signed_by(&key, &self.issuer).map_err(|e| WireError::identity(what, e))?;
        Ok(Issued {
            chain_pem: format!("{}{}", cert.pem(), self.cert_pem),
            key_pem: Zeroizing::new(key.serialize_pem()),
        })
    }

    /// A machine's first certificate, of the usual validity: see [`Authority::certify`].
    pub fn sign_csr(&self, csr_pem: &str, machine: MachineId) -> Result<String, WireError> {
        self.certify(csr_pem, Grant { machine, generation: 0, validity: CLIENT_VALIDITY })
    }

    /// A machine's certificate for the key in a signing request, which must prove that it has that key. Whatever names
    /// the request has are ignored.
    pub fn certify(&self, csr_pem: &str, grant: Grant) -> Result<String, WireError> {
        self.issue(&read_request(csr_pem)?, Subject::machine(grant))
    }

    /// The same for a machine that is known already: a request that names anybody else is refused.
    pub fn recertify(&self, csr_pem: &str, grant: Grant) -> Result<String, WireError> {
        let request = read_request(csr_pem)?;
        let own = format!("{MACHINE_URI_PREFIX}{}", grant.machine);
        let names = &request.params.subject_alt_names;
        if names.iter().any(|name| !matches!(name, SanType::URI(uri) if uri.as_str() == own)) {
            return Err(WireError::identity("the signing request", "it names somebody else"));
        }
        self.issue(&request, Subject::machine(grant))
    }

    /// A relay's certificate: as [`Authority::certify`]. The key in the request is all that is used of it.
    pub fn certify_relay(&self, csr_pem: &str, grant: RelayGrant) -> Result<String, WireError> {
        let RelayGrant { relay, generation, validity } = grant;
        let subject = Subject { prefix: RELAY_URI_PREFIX, id: relay.to_string(), generation, validity };
        self.issue(&read_request(csr_pem)?, subject)
    }

    fn issue(&self, request: &CertificateSigningRequestParams, to: Subject) -> Result<String, WireError> {
        let Subject { prefix, id, generation, validity } = to;
        let mut params = params(&id, validity)?;
        let authority_ends = SystemTime::UNIX_EPOCH + Duration::from_millis(self.expires_ms);
        params.not_after = params.not_after.min(authority_ends.into());
        params.subject_alt_names = vec![uri(&format!("{prefix}{id}"))?];
        if generation > 0 {
            params.subject_alt_names.push(uri(&format!("{GENERATION_URI_PREFIX}{generation}"))?);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(|e| WireError::identity("the signing request", e))?;
        Ok(cert.pem())
    }
}

/// Whom a certificate is for.
struct Subject {
    prefix: &'static str,
    id: String,
    generation: u32,
    validity: Duration,
}

impl Subject {
    fn machine(grant: Grant) -> Self {
        let Grant { machine, generation, validity } = grant;
        Self { prefix: MACHINE_URI_PREFIX, id: machine.to_string(), generation, validity }
    }
}

/// Whether [`Authority::certify`] would take a signing request. Costs a check of its signature, and no signature.
///
/// # Errors
/// What is wrong with it.
pub fn check_request(csr_pem: &str) -> Result<(), WireError> {
    read_request(csr_pem).map(drop)
}

/// Reads a request, bounded; its signature is checked.
fn read_request(csr_pem: &str) -> Result<CertificateSigningRequestParams, WireError> {
    let unusable = |cause: String| WireError::identity("the signing request", cause);
    if csr_pem.len() > CSR_BYTES_MAX {
        return Err(unusable(format!("it is longer than {CSR_BYTES_MAX} bytes")));
    }
    let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| unusable(e.to_string()))?;
    if request.public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
        return Err(unusable("its key is not ECDSA P-256".to_owned()));
    }
    Ok(request)
}

/// A key made here, and the request to certify it.
pub struct Csr {
    /// For the collector.
    pub csr_pem: String,
    /// Stays here. PKCS #8.
    pub key_pem: Zeroizing<String>,
}

impl Csr {
    /// Makes a key and a request. It carries no name: the collector says who the machine is.
    pub fn create() -> Result<Self, WireError> {
        let key = generate_key()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(|e| WireError::identity("the signing request", e))?;
        Ok(Self { csr_pem: request, key_pem: Zeroizing::new(key.serialize_pem()) })
    }
}

/// The machine that a certificate names. Says nothing about who issued it.
pub fn machine_from_cert(cert: &CertificateDer<'_>) -> Result<MachineId, WireError> {
    Ok(Credential::of(cert)?.machine)
}

/// Certificates and key as TLS wants them, checked to belong together.
pub fn load_chain(
    chain_pem: &str,
    key_pem: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), WireError> {
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| WireError::identity("a certificate", e))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|e| WireError::identity("a private key", e))?;
    rustls::sign::CertifiedKey::from_der(chain.clone(), key.clone_key(), &crate::tls::provider())
        .map_err(|e| WireError::identity("certificate and key", e))?;
    Ok((chain, key))
}

/// Random bytes for secrets.
pub fn random<const N: usize>() -> Result<[u8; N], WireError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| WireError::identity("a secret", "no randomness to be had"))?;
    Ok(bytes)
}

fn generate_key() -> Result<KeyPair, WireError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| WireError::identity("a new key", e))
}

fn uri(text: &str) -> Result<SanType, WireError> {
    text.try_into().map(SanType::URI).map_err(|e| WireError::identity("a name", e))
}

/// What all certificates share.
fn params(common_name: &str, validity: Duration) -> Result<CertificateParams, WireError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW.min(validity)).into();
    params.not_after = (now + validity).into();
    // Positive and short enough for RFC 5280.
    let mut serial = random::<16>()?;
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

#[cfg(test)]
mod tests;
