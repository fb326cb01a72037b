//! Enrolment: a one-time token buys a certificate.
//!
//! The token carries the fingerprint of the vault's authority, so that the agent knows its collector at the very first
//! contact: the chain shown must contain the certificate with that fingerprint, and the server's own must verify under
//! it and for the name in the URL. Only then the secret is sent.

use crate::certificate::{fingerprint, hex};
use crate::client::Identity;
use crate::identity::Csr;
use crate::papers::RelayIdentity;
use crate::{WireError, tls};
use bytes::Bytes;
use highwater_delta::{MachineId, RelayId};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Where the request goes.
pub const ENROL_PATH: &str = "/v1/enrol";
/// Where that of a relay goes.
pub const RELAY_PATH: &str = "/v1/relay";
/// Most bytes of a request's body.
pub const REQUEST_BYTES_MAX: usize = 16 * 1024;
const RESPONSE_BYTES_MAX: usize = 64 * 1024;
const ENROL_MAX: Duration = Duration::from_secs(60);

/// An enrolment token: `hw1.<id>.<secret>.<fingerprint>`, each in hexadecimal.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Names the token; not secret.
    pub id: [u8; 16],
    /// Whoever has it may enrol one machine.
    pub secret: Zeroizing<[u8; 32]>,
    /// SHA-256 of the authority's certificate.
    pub ca_fingerprint: [u8; 32],
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hw1.{}.{}.{}", hex(&self.id), hex(self.secret.as_ref()), hex(&self.ca_fingerprint))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, …)", hex(&self.id))
    }
}

impl FromStr for Token {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        if text.trim().is_empty() {
            return Err(WireError::BadToken("it is empty"));
        }
        let mut parts = text.trim().split('.');
        let mut part = || parts.next().ok_or(WireError::BadToken("it has fewer than four parts"));
        if part()? != "hw1" {
            return Err(WireError::BadToken("it does not begin with hw1"));
        }
        let token = Self {
            id: unhex(part()?)?,
            secret: Zeroizing::new(unhex(part()?)?),
            ca_fingerprint: unhex(part()?)?,
        };
        if parts.next().is_some() {
            return Err(WireError::BadToken("it has more than four parts"));
        }
        Ok(token)
    }
}

/// Reads exactly `N` bytes of hexadecimal.
pub fn unhex<const N: usize>(text: &str) -> Result<[u8; N], WireError> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let mut bytes = [0; N];
    if text.len() != N * 2 {
        return Err(WireError::BadToken("a part has the wrong length"));
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let (high, low) =
            digit(pair[0]).zip(digit(pair[1])).ok_or(WireError::BadToken("a part is not hexadecimal"))?;
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

/// What an agent asks.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// The token's id, hexadecimal.
    pub token_id: String,
    /// The token's secret, hexadecimal.
    pub secret: String,
    /// Signing request.
    pub csr_pem: String,
    /// For people.
    pub host_name: String,
}

/// What the collector answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolResponse {
    /// Who the machine is from now on.
    pub machine: MachineId,
    /// Its certificate.
    pub cert_pem: String,
    /// The authority's.
    pub ca_pem: String,
    /// `host:port` for sessions.
    pub endpoint: String,
}

/// What the collector answers to a relay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayResponse {
    /// Who it is from now on.
    pub relay: RelayId,
    /// Its certificate.
    pub cert_pem: String,
    /// The authority's.
    pub ca_pem: String,
    /// `host:port` for its connections.
    pub endpoint: String,
}

/// What the collector answers when it refuses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolRefusal {
    /// Stable code, `HW-1234`.
    pub code: String,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub action: String,
}

/// What an enrolment yields.
#[derive(Debug)]
pub struct Enrolled {
    /// To be saved at once: the token is used up.
    pub identity: Identity,
    /// `host:port` for [`crate::client::connect`].
    pub endpoint: String,
}

/// What a relay's enrolment yields.
#[derive(Debug)]
pub struct EnrolledRelay {
    /// To be saved at once: the token is used up.
    pub identity: RelayIdentity,
    /// `host:port` of its objects.
    pub endpoint: String,
}

/// Enrols a relay, alike.
pub async fn enroll_relay(url: &str, token: &Token, host_name: &str) -> Result<EnrolledRelay, WireError> {
    let asked = ask::<RelayResponse>(url, RELAY_PATH, token, host_name);
    let (csr, answer) = tokio::time::timeout(ENROL_MAX, asked)
        .await
        .map_err(|_| WireError::TimedOut { what: "enrolling", after: ENROL_MAX })??;
    check_authority(token, &answer.ca_pem)?;
    let identity = RelayIdentity::from_pems(&csr.key_pem, &answer.cert_pem, &answer.ca_pem)?;
    if identity.relay != answer.relay {
        return Err(WireError::identity("the new certificate", "it names another relay"));
    }
    split_endpoint(&answer.endpoint)?;
    Ok(EnrolledRelay { identity, endpoint: answer.endpoint })
}

/// Enrols this machine at a collector's management URL, `https://HOST[:PORT]`.
pub async fn enroll(url: &str, token: &Token, host_name: &str) -> Result<Enrolled, WireError> {
    tokio::time::timeout(ENROL_MAX, enroll_unbounded(url, token, host_name))
        .await
        .map_err(|_| WireError::TimedOut { what: "enrolling", after: ENROL_MAX })?
}

async fn enroll_unbounded(url: &str, token: &Token, host_name: &str) -> Result<Enrolled, WireError> {
    let (csr, answer) = ask::<EnrolResponse>(url, ENROL_PATH, token, host_name).await?;
    check_authority(token, &answer.ca_pem)?;
    let identity = Identity::from_pems(&csr.key_pem, &answer.cert_pem, &answer.ca_pem)?;
    if identity.machine != answer.machine {
        return Err(WireError::identity("the new certificate", "it names another machine"));
    }
    split_endpoint(&answer.endpoint)?;
    Ok(Enrolled { identity, endpoint: answer.endpoint })
}

fn check_authority(token: &Token, ca_pem: &str) -> Result<(), WireError> {
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|e| WireError::identity("the authority's certificate", e))?;
    if fingerprint(&ca) != token.ca_fingerprint {
        return Err(WireError::WrongCollector("the answer names another authority".to_owned()));
    }
    Ok(())
}

/// Makes a key and has it certified.
async fn ask<A: serde::de::DeserializeOwned>(
    url: &str,
    path: &'static str,
    token: &Token,
    host_name: &str,
) -> Result<(Csr, A), WireError> {
    let (host, port) = host_of_url(url)?;
    let csr = Csr::create()?;
    let request = EnrolRequest {
        token_id: hex(&token.id),
        secret: hex(token.secret.as_ref()),
        csr_pem: csr.csr_pem.clone(),
        host_name: host_name.to_owned(),
    };
    let body =
        serde_json::to_vec(&request).map_err(|_| WireError::BadMessage("the request cannot be encoded"))?;
    let (status, answer) = post(&host, port, path, token.ca_fingerprint, body).await?;
    if status != 200 {
        return Err(refusal(status, &answer));
    }
    let answer =
        serde_json::from_slice(&answer).map_err(|_| WireError::BadMessage("the answer to the enrolment"))?;
    Ok((csr, answer))
}

fn refusal(status: u16, answer: &[u8]) -> WireError {
    match serde_json::from_slice::<EnrolRefusal>(answer) {
        Ok(told) => WireError::EnrolRefused {
            status,
            cause: format!("{}: {}", told.code, told.cause),
            action: Some(told.action).filter(|action| !action.is_empty()),
        },
        Err(_) => WireError::EnrolRefused { status, cause: "no reason was given".to_owned(), action: None },
    }
}

/// A failed handshake: whether it was with a collector at all.
fn handshake_error(host: &str, port: u16, error: std::io::Error) -> WireError {
    use rustls::{AlertDescription, Error};
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidMessage(_) | Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
            WireError::NoCollector(host_header(host, port))
        }
        Some(tls) => WireError::WrongCollector(tls.to_string()),
        None => WireError::Io(error),
    }
}

async fn post(
    host: &str,
    port: u16,
    path: &'static str,
    ca_fingerprint: [u8; 32],
    body: Vec<u8>,
) -> Result<(u16, Bytes), WireError> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| WireError::Address(host.to_owned(), "it is neither a host name nor an address"))?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority { ca_fingerprint }))
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN_HTTP.to_vec()];
    let stream = TcpStream::connect((host, port)).await?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| handshake_error(host, port, error))?;
    let http = |e: hyper::Error| WireError::Io(std::io::Error::other(e));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let request = hyper::Request::post(path)
        .header(HOST, host_header(host, port))
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|_| WireError::Address(host.to_owned(), "it cannot be a host"))?;
    let exchange = async move {
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), RESPONSE_BYTES_MAX)
            .collect()
            .await
            .map_err(|e| WireError::Io(std::io::Error::other(e)))?;
        Ok((status, body.to_bytes()))
    };
    // The connection is driven here and ends with this future: nothing is left behind.
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = connection => {
            ended.map_err(http)?;
            exchange.await
        }
    }
}

fn host_header(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Host and port of `https://HOST[:PORT][/]`; the port is 443 unless given.
pub fn host_of_url(url: &str) -> Result<(String, u16), WireError> {
    let bad = |why| WireError::Address(url.to_owned(), why);
    let rest = url.strip_prefix("https://").ok_or(bad("it does not begin with https://"))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#', '@']) {
        return Err(bad("more than a host and a port"));
    }
    let bare_v6 = authority.starts_with('[') && authority.ends_with(']');
    if bare_v6 || !authority.contains(':') {
        return split_endpoint(&format!("{authority}:443"));
    }
    split_endpoint(authority)
}

/// Host (without brackets) and port of `host:port`.
pub fn split_endpoint(endpoint: &str) -> Result<(String, u16), WireError> {
    let bad = |why| WireError::Address(endpoint.to_owned(), why);
    let (host, port) = endpoint.rsplit_once(':').ok_or(bad("no port"))?;
    let port = port.parse().map_err(|_| bad("the port is no number below 65536"))?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6,
        None if host.contains(':') => return Err(bad("an IPv6 address wants brackets")),
        None => host,
    };
    if host.is_empty() {
        return Err(bad("no host"));
    }
    Ok((host.to_owned(), port))
}

/// Accepts the servers of the one authority with this fingerprint.
#[derive(Debug)]
struct PinnedAuthority {
    ca_fingerprint: [u8; 32],
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let other = |text: &str| rustls::Error::General(text.to_owned());
        let ca = intermediates
            .iter()
            .find(|cert| fingerprint(cert) == self.ca_fingerprint)
            .ok_or_else(|| other("the chain shown does not contain the token's authority"))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(tls::provider()))
                .build()
                .map_err(|e| other(&e.to_string()))?;
        if !crate::certificate::is_collector_cert(end_entity) {
            return Err(other("the certificate shown is no collector's"));
        }
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = tls::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
