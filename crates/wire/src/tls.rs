//! TLS as Highwater uses it: version 1.3 only, mutual, ALPN [`ALPN`] for machines and [`ALPN_STORE`] for relays, aws-lc-rs, the vault's own authority and no
//! other.

use crate::credential::RelayCredential;
use crate::{Credential, WireError};
use highwater_delta::{MachineId, RelayId};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use std::collections::HashMap;
use std::sync::Arc;

/// Application protocol of machines on port 9443.
pub const ALPN: &[u8] = b"highwater/1";
/// Application protocol of relays on the same port: a store of objects, in HTTP/1.1.
pub const ALPN_STORE: &[u8] = b"highwater-store/1";
/// Application protocol of the management port.
pub const ALPN_HTTP: &[u8] = b"http/1.1";

/// The one provider of cryptography.
#[must_use]
pub fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

pub(crate) fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, WireError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(|e| WireError::identity("the authority's certificate", e))?;
    Ok(Arc::new(roots))
}

/// For the collector's port 9443: a certificate of the authority is demanded of the client.
pub fn ingest_server(
    ca: &CertificateDer<'static>,
    certs: Arc<dyn ResolvesServerCert>,
) -> Result<ServerConfig, WireError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, Arc::new(provider()))
        .build()
        .map_err(|e| WireError::identity("the authority's certificate", e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certs);
    config.alpn_protocols = vec![ALPN.to_vec(), ALPN_STORE.to_vec()];
    // A resumed handshake would skip the certificate, and with it its expiry and revocation.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// For the management port: the client needs no certificate.
pub fn management_server(certs: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, WireError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(certs);
    config.alpn_protocols = vec![ALPN_HTTP.to_vec()];
    Ok(config)
}

/// For an agent's connection to port 9443.
pub fn agent_client(
    ca: &CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, WireError> {
    ingest_client(ca, chain, key, ALPN)
}

/// For a relay's connection to port 9443.
pub fn relay_client(
    ca: &CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, WireError> {
    ingest_client(ca, chain, key, ALPN_STORE)
}

fn ingest_client(
    ca: &CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    alpn: &[u8],
) -> Result<ClientConfig, WireError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(ca)?, Arc::new(provider()))
        .build()
        .map_err(|e| WireError::identity("the authority's certificate", e))?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|e| WireError::identity("certificate and key", e))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The chain of a collector, fixed.
pub fn fixed_cert(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<rustls::sign::CertifiedKey>, WireError> {
    rustls::sign::CertifiedKey::from_der(chain, key, &provider())
        .map(Arc::new)
        .map_err(|e| WireError::identity("certificate and key", e))
}

/// Whether an authority has issued a machine's certificate, and it is valid now.
pub fn check_machine_cert(
    ca: &CertificateDer<'static>,
    cert: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<(), WireError> {
    WebPkiClientVerifier::builder_with_provider(roots(ca)?, Arc::new(provider()))
        .build()
        .map_err(|e| WireError::identity("the authority's certificate", e))?
        .verify_client_cert(cert, &[], now)
        .map_err(|e| WireError::identity("the machine's certificate", e))?;
    Ok(())
}

/// Certificates that are no longer accepted, though they have not expired.
#[derive(Clone, Debug, Default)]
pub struct Revoked {
    /// Machines, and up to which generation their certificates are revoked.
    pub machines: HashMap<MachineId, u32>,
    /// The same of relays.
    pub relays: HashMap<RelayId, u32>,
}

impl Revoked {
    /// Whether a certificate is no longer accepted.
    #[must_use]
    pub fn covers(&self, credential: &Credential) -> bool {
        self.machines.get(&credential.machine).is_some_and(|upto| credential.generation <= *upto)
    }

    /// The same of a relay's.
    #[must_use]
    pub fn covers_relay(&self, credential: &RelayCredential) -> bool {
        self.relays.get(&credential.relay).is_some_and(|upto| credential.generation <= *upto)
    }
}

/// Whether a client asked for the protocol of relays.
#[must_use]
pub fn is_relay(connection: &rustls::ServerConnection) -> bool {
    connection.alpn_protocol() == Some(ALPN_STORE)
}

/// Who a relay is, after its handshake: see [`authenticate`].
pub fn authenticate_relay(
    connection: &rustls::ServerConnection,
    revoked: &Revoked,
) -> Result<RelayCredential, WireError> {
    if !is_relay(connection) {
        return Err(WireError::Handshake("the client did not ask for protocol highwater-store/1".to_owned()));
    }
    let credential = RelayCredential::of(&client_cert(connection)?)?;
    if revoked.covers_relay(&credential) {
        return Err(WireError::RelayRevoked(credential.relay));
    }
    Ok(credential)
}

fn client_cert(connection: &rustls::ServerConnection) -> Result<CertificateDer<'_>, WireError> {
    let cert = connection.peer_certificates().and_then(<[_]>::first);
    // Another handle on the same bytes.
    cert.map(|cert| CertificateDer::from(cert.as_ref()))
        .ok_or_else(|| WireError::Handshake("the client has no certificate".to_owned()))
}

/// Who a client is, after its handshake: its certificate is of the authority and not revoked, its protocol is ours.
pub fn authenticate(
    connection: &rustls::ServerConnection,
    revoked: &Revoked,
) -> Result<Credential, WireError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(WireError::Handshake("the client did not ask for protocol highwater/1".to_owned()));
    }
    let credential = Credential::of(&client_cert(connection)?)?;
    if revoked.covers(&credential) {
        return Err(WireError::Revoked(credential.machine));
    }
    Ok(credential)
}

/// Tells a failure of TLS from one of the network.
#[must_use]
pub fn io_error(error: std::io::Error) -> WireError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(tls) => WireError::Handshake(tls.to_string()),
        None => WireError::Io(error),
    }
}

#[cfg(test)]
mod tests;
