//! What the members of a group say to each other on port 20004, and the TLS that they do it over.
//!
//! Each side shows its machine's certificate of the vault's authority; there are no others. Who is a member, and where, is told by a
//! [`SignedRoster`]; whoever has a newer one passes it on, so that a change spreads also where the collector is out of reach.
//!
//! A machine's certificate is one for clients. Members take it for a peer that they have called as well: what counts is which machine it
//! names, and that the authority issued it to a machine.

use crate::roster::SignedRoster;
use crate::{Credential, Identity, WireError, tls};
use highwater_delta::{GroupId, MachineId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Application protocol of port 20004.
pub const ALPN_GROUP: &[u8] = b"highwater-group/1";

const CONNECT_MAX: Duration = Duration::from_secs(5);
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// One frame between two members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// The newest roster that the sender has: the first frame in each direction, and again when it changes.
    Roster(SignedRoster),
    /// Of the protocol of markers.
    Said {
        /// Of this group.
        group: GroupId,
        /// What.
        message: highwater_group::Message,
    },
}

/// For a member that is called.
fn group_server(
    ca: &CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, WireError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .with_client_cert_verifier(machines_of(ca)?)
        .with_single_cert(chain, key)
        .map_err(|e| WireError::identity("certificate and key", e))?;
    config.alpn_protocols = vec![ALPN_GROUP.to_vec()];
    // A resumed handshake would skip the certificate, and with it its expiry and revocation.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// For a member that calls.
fn group_client(
    ca: &CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, WireError> {
    let verifier = Arc::new(AMachine(machines_of(ca)?));
    let mut config = ClientConfig::builder_with_provider(Arc::new(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| WireError::Handshake(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|e| WireError::identity("certificate and key", e))?;
    config.alpn_protocols = vec![ALPN_GROUP.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    // There is no name to tell: who it is, is told by the certificate.
    config.enable_sni = false;
    Ok(config)
}

/// A connection between two members.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Meets a caller: who it is, and the connection. The authority's word is that it is a machine; whether it is a member, and its certificate
/// has not been revoked, is for the roster to say.
pub async fn meet(
    identity: &Identity,
    stream: TcpStream,
) -> Result<(Credential, Box<dyn Stream>), WireError> {
    let config = group_server(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key())?;
    let stream = within(TlsAcceptor::from(Arc::new(config)).accept(stream)).await?;
    let connection = &stream.get_ref().1;
    let credential = peer(connection.alpn_protocol(), connection.peer_certificates())?;
    Ok((credential, Box::new(stream)))
}

/// Calls a member, which must be this machine.
pub async fn call(
    identity: &Identity,
    machine: MachineId,
    address: &str,
) -> Result<(Credential, Box<dyn Stream>), WireError> {
    let config = group_client(&identity.ca, identity.cert_chain.clone(), identity.key.clone_key())?;
    let stream = timeout(CONNECT_MAX, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| WireError::TimedOut { what: "connecting", after: CONNECT_MAX })??;
    // A marker is many small messages.
    stream.set_nodelay(true)?;
    // TLS wants a name to expect. Here it is the certificate's machine that counts.
    let nobody = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let connect = TlsConnector::from(Arc::new(config)).connect(nobody, stream);
    let stream = within(connect).await?;
    let connection = &stream.get_ref().1;
    let credential = peer(connection.alpn_protocol(), connection.peer_certificates())?;
    if credential.machine != machine {
        return Err(WireError::Handshake(format!("machine {} answers in its place", credential.machine)));
    }
    Ok((credential, Box::new(stream)))
}

async fn within<T>(handshake: impl Future<Output = std::io::Result<T>>) -> Result<T, WireError> {
    let done = timeout(HANDSHAKE_MAX, handshake).await;
    done.map_err(|_| WireError::TimedOut { what: "the TLS handshake", after: HANDSHAKE_MAX })?
        .map_err(tls::io_error)
}

/// Who is at the other end of a connection, after its handshake.
fn peer(alpn: Option<&[u8]>, certs: Option<&[CertificateDer<'_>]>) -> Result<Credential, WireError> {
    if alpn != Some(ALPN_GROUP) {
        return Err(WireError::Handshake("the peer did not ask for protocol highwater-group/1".to_owned()));
    }
    let cert = certs.and_then(<[_]>::first);
    Credential::of(cert.ok_or_else(|| WireError::Handshake("the peer has no certificate".to_owned()))?)
}

fn machines_of(ca: &CertificateDer<'static>) -> Result<Arc<dyn ClientCertVerifier>, WireError> {
    WebPkiClientVerifier::builder_with_provider(tls::roots(ca)?, Arc::new(tls::provider()))
        .build()
        .map_err(|e| WireError::identity("the authority's certificate", e))
}

/// Takes a machine's certificate, by the same rules, from one that was called. Which machine it must be is for the caller to say.
#[derive(Debug)]
struct AMachine(Arc<dyn ClientCertVerifier>);

impl ServerCertVerifier for AMachine {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.0.verify_client_cert(end_entity, intermediates, now).map(|_| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
