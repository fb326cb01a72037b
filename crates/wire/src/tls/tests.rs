use super::*;
use crate::identity::{self, Authority, CLIENT_VALIDITY, Csr, Grant};
use crate::message::{CollectorMessage, Hello};
use crate::session::{FrameWriter, Timeouts};
use crate::{Identity, connect};
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Server {
    addr: SocketAddr,
    seen: tokio::task::JoinHandle<Result<Credential, WireError>>,
}

/// Takes one connection, authenticates it, refuses it with a word, and tells what it saw.
async fn server(ca: &Authority, names: &[&str], revoked: Revoked) -> Server {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let issued = ca.issue_server(&names).unwrap();
    let (chain, key) = identity::load_chain(&issued.chain_pem, &issued.key_pem).unwrap();
    let resolver =
        rustls::sign::SingleCertAndKey::from(Arc::unwrap_or_clone(fixed_cert(chain, key).unwrap()));
    let config = ingest_server(ca.cert(), Arc::new(resolver)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.map_err(io_error)?;
        let machine = authenticate(stream.get_ref().1, &revoked)?;
        let (_input, output) = tokio::io::split(stream);
        let mut writer = FrameWriter::new(output, Timeouts::default());
        let refusal = CollectorMessage::Refused(WireError::Unexpected("test").to_refusal());
        writer.control(&crate::codec::encode(&refusal).unwrap()).await?;
        writer.shutdown().await?;
        Ok(machine)
    });
    Server { addr, seen }
}

fn identity_of(ca: &Authority) -> Identity {
    let csr = Csr::create().unwrap();
    let cert = ca.sign_csr(&csr.csr_pem, MachineId::new()).unwrap();
    Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap()
}

fn hello(machine: MachineId) -> Hello {
    Hello {
        machine,
        version_min: 1,
        version_max: 1,
        agent_version: String::new(),
        host_name: String::new(),
        kernel: String::new(),
    }
}

async fn error_of(server: &Server, name: &str, identity: &Identity) -> WireError {
    match connect(&server.addr.to_string(), name, identity, hello(identity.machine)).await {
        Ok(_) => panic!("connected"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn the_right_ones_meet() {
    let ca = Authority::create("a").unwrap();
    let agent = identity_of(&ca);
    for name in ["dr.example", "127.0.0.1"] {
        let server = server(&ca, &["dr.example", "127.0.0.1"], Revoked::default()).await;
        let error = error_of(&server, name, &agent).await;
        assert!(matches!(&error, WireError::Refused(refusal) if refusal.code == 1109), "{error:?}");
        assert_eq!(server.seen.await.unwrap().unwrap().machine, agent.machine);
    }
}

#[tokio::test]
async fn another_name_is_noticed() {
    let ca = Authority::create("a").unwrap();
    let server = server(&ca, &["dr.example"], Revoked::default()).await;
    assert_eq!(error_of(&server, "other.example", &identity_of(&ca)).await.code(), 1111);
    assert!(server.seen.await.unwrap().is_err());
}

#[tokio::test]
async fn another_authority_is_noticed_by_either_side() {
    let (ca, other) = (Authority::create("a").unwrap(), Authority::create("a").unwrap());
    let one = server(&ca, &["dr.example"], Revoked::default()).await;
    assert_eq!(error_of(&one, "dr.example", &identity_of(&other)).await.code(), 1111);
    assert!(one.seen.await.unwrap().is_err());

    // A client that trusts the server, with a certificate of somebody else.
    let two = server(&ca, &["dr.example"], Revoked::default()).await;
    let mut agent = identity_of(&other);
    agent.papers.ca = ca.cert().clone();
    assert_eq!(error_of(&two, "dr.example", &agent).await.code(), 1111);
    assert_eq!(two.seen.await.unwrap().unwrap_err().code(), 1111);
}

#[tokio::test]
async fn a_machine_cannot_pose_as_a_collector_nor_a_collector_as_a_machine() {
    let ca = Authority::create("a").unwrap();
    let issued = ca.issue_server(&["dr.example".to_owned()]).unwrap();
    let (chain, key) = identity::load_chain(&issued.chain_pem, &issued.key_pem).unwrap();
    let one = server(&ca, &["dr.example"], Revoked::default()).await;
    let config = agent_client(ca.cert(), chain[..1].to_vec(), key).unwrap();
    attempt(one.addr, config).await;
    assert_eq!(one.seen.await.unwrap().unwrap_err().code(), 1111);

    let agent = identity_of(&ca);
    let resolver = rustls::sign::SingleCertAndKey::from(Arc::unwrap_or_clone(
        fixed_cert(agent.cert_chain.clone(), agent.key.clone_key()).unwrap(),
    ));
    let config = ingest_server(ca.cert(), Arc::new(resolver)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        TlsAcceptor::from(Arc::new(config)).accept(stream).await.map(drop).map_err(io_error)
    });
    let impostor =
        connect(&addr.to_string(), "dr.example", &agent, hello(agent.machine)).await.err().unwrap();
    assert_eq!(impostor.code(), 1111);
    assert!(seen.await.unwrap().is_err());
}

#[tokio::test]
async fn revoked_ones_are_turned_away() {
    let ca = Authority::create("a").unwrap();
    let agent = identity_of(&ca);
    let revoked = Revoked { machines: [(agent.machine, 0)].into(), ..Revoked::default() };
    let one = server(&ca, &["dr.example"], revoked.clone()).await;
    let _ = error_of(&one, "dr.example", &agent).await;
    assert_eq!(one.seen.await.unwrap().unwrap_err().code(), 1119);
    // The next generation of the same machine is not meant.
    let csr = Csr::create().unwrap();
    let grant = Grant { machine: agent.machine, generation: 1, validity: CLIENT_VALIDITY };
    let cert = ca.certify(&csr.csr_pem, grant).unwrap();
    let again = Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
    let two = server(&ca, &["dr.example"], revoked).await;
    let _ = error_of(&two, "dr.example", &again).await;
    assert_eq!(two.seen.await.unwrap().unwrap().generation, 1);
}

async fn attempt(addr: SocketAddr, config: ClientConfig) {
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = "dr.example".try_into().unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await {
        // In TLS 1.3 the client hears of its refusal only afterwards.
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await;
    }
}

#[tokio::test]
async fn no_certificate_old_tls_and_foreign_protocols_are_refused() {
    let ca = Authority::create("a").unwrap();
    let agent = identity_of(&ca);
    let builder = |versions: &[&'static rustls::SupportedProtocolVersion]| {
        ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots(ca.cert()).unwrap())
    };
    let certified = |versions: &[&'static rustls::SupportedProtocolVersion], alpn: &[&[u8]]| {
        let mut config =
            builder(versions).with_client_auth_cert(agent.cert_chain.clone(), agent.key.clone_key()).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    };
    let tls13 = &[&rustls::version::TLS13][..];
    let mut anonymous = builder(tls13).with_no_client_auth();
    anonymous.alpn_protocols = vec![ALPN.to_vec()];
    let cases = [
        ("no certificate", anonymous),
        ("TLS 1.2", certified(&[&rustls::version::TLS12], &[ALPN])),
        ("another ALPN", certified(tls13, &[b"h2"])),
        ("no ALPN", certified(tls13, &[])),
    ];
    for (case, config) in cases {
        let server = server(&ca, &["dr.example"], Revoked::default()).await;
        attempt(server.addr, config).await;
        assert_eq!(server.seen.await.unwrap().unwrap_err().code(), 1111, "{case}");
    }
}

/// Whom a server takes a client for that shows this certificate and asks for this protocol: a machine, and a relay.
async fn taken_for(
    ca: &Authority,
    config: rustls::ClientConfig,
    revoked: Revoked,
) -> (Result<Credential, WireError>, Result<crate::RelayCredential, WireError>) {
    let issued = ca.issue_server(&["dr.example".to_owned()]).unwrap();
    let (chain, key) = identity::load_chain(&issued.chain_pem, &issued.key_pem).unwrap();
    let resolver =
        rustls::sign::SingleCertAndKey::from(Arc::unwrap_or_clone(fixed_cert(chain, key).unwrap()));
    let server = ingest_server(ca.cert(), Arc::new(resolver)).unwrap();
    let (near, far) = tokio::io::duplex(1 << 16);
    let client = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = rustls_pki_types::ServerName::try_from("dr.example").unwrap();
    let (client, server) =
        tokio::join!(client.connect(name, near), TlsAcceptor::from(Arc::new(server)).accept(far));
    let (_client, server) = (client.unwrap(), server.unwrap());
    let connection = server.get_ref().1;
    (authenticate(connection, &revoked), authenticate_relay(connection, &revoked))
}

#[tokio::test]
async fn a_relay_is_no_machine_and_a_machine_no_relay() {
    let ca = Authority::create("a").unwrap();
    let machine = identity_of(&ca);
    let csr = Csr::create().unwrap();
    let relay = highwater_delta::RelayId::new();
    let grant = identity::RelayGrant { relay, generation: 3, validity: std::time::Duration::from_secs(60) };
    let cert = ca.certify_relay(&csr.csr_pem, grant).unwrap();
    let of_relay = crate::RelayIdentity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
    assert_eq!((of_relay.relay, of_relay.credential().unwrap().generation), (relay, 3));
    assert!(Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).is_err());
    let papers = |papers: &crate::papers::Papers| (papers.cert_chain.clone(), papers.key.clone_key());
    let config = |papers: (Vec<_>, _), relay: bool| {
        let made = if relay { relay_client } else { agent_client };
        made(ca.cert(), papers.0, papers.1).unwrap()
    };

    let seen = taken_for(&ca, config(papers(&of_relay), true), Revoked::default()).await;
    assert!(seen.0.is_err() && seen.1.is_ok_and(|seen| seen.relay == relay));
    let seen = taken_for(&ca, config(papers(&machine), false), Revoked::default()).await;
    assert!(seen.0.is_ok() && seen.1.is_err());
    // The one's certificate with the other's protocol is neither.
    for config in [config(papers(&of_relay), false), config(papers(&machine), true)] {
        let seen = taken_for(&ca, config, Revoked::default()).await;
        assert!(seen.0.is_err() && seen.1.is_err());
    }
    for (upto, refused) in [(2, false), (3, true)] {
        let revoked = Revoked { relays: [(relay, upto)].into(), ..Revoked::default() };
        let seen = taken_for(&ca, config(papers(&of_relay), true), revoked).await.1;
        assert_eq!(matches!(seen, Err(WireError::RelayRevoked(_))), refused);
    }
}
