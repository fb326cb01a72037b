//! A collector whose vault lies at another one, and that at a third.

use crate::command;
use crate::support::Site;
use highwater_collector::certificates::{self, State};
use highwater_collector::clock::now_ms;
use highwater_collector::{relays, tokens};
use highwater_delta::{DiskId, RelayId};
use highwater_vault::{KeySource, Location, Store, Vault, VaultError, VaultKey, local_store, verify};
use highwater_wire::certificate::fingerprint;
use highwater_wire::enroll::{Token, enroll, enroll_relay};
use highwater_wire::{Identity, RelayIdentity, tls};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const MINUTE: Duration = Duration::from_secs(60);

async fn relay_token(site: &Site, returning: Option<tokens::Returning<RelayId>>) -> Token {
    let shared = &site.running.shared;
    let ca = fingerprint(shared.authority.cert());
    tokens::create_for(&shared.vault, ca, now_ms(), MINUTE, None, returning).await.unwrap()
}

/// Joins a collector; answers who it is there, where its identity lies, and the location of its vault.
async fn join(site: &Site, name: &str) -> (RelayId, PathBuf, Location) {
    let token = relay_token(site, None).await;
    let joined = enroll_relay(&site.url(), &token, name).await.unwrap();
    let dir = site.dir.path().join(format!("identity-{name}"));
    joined.identity.save(&dir).unwrap();
    let location = format!("highwater://{}?identity={}", joined.endpoint, dir.display()).parse().unwrap();
    (joined.identity.relay, dir, location)
}

/// Writes a block for a machine of its own, and reads what was stored.
async fn a_point_is_stored(site: &Site) {
    let identity = site.enrolled().await;
    let disk = DiskId::new();
    let mut agent = site.agent(&identity, disk).await;
    agent.deliver(disk, 7, &[1, 2, 3]).await;
    let shared = &site.running.shared;
    let state = shared.vault.machine(identity.machine).await.unwrap();
    assert_eq!(state.points.len(), 1);
    assert!(verify::verify_vault(&shared.vault).await.unwrap().is_clean());
}

async fn is_clean(store: impl Into<Store>, key: &Path, machines: usize) {
    let vault = Vault::unlock(store, &KeySource::File(key.to_owned())).await.unwrap();
    assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    assert_eq!(vault.machines().await.unwrap().len(), machines);
}

#[tokio::test(flavor = "multi_thread")]
async fn vaults_lie_at_other_collectors_in_a_chain() {
    let c = Site::new().await;
    let (b_at_c, _, location) = join(&c, "b").await;
    let b = Site::at(location).await;
    let (a_at_b, _, location) = join(&b, "a").await;
    let a = Site::at(location).await;
    a_point_is_stored(&a).await;
    a_point_is_stored(&b).await;
    a_point_is_stored(&b).await;
    a_point_is_stored(&c).await;
    let text = c.metrics().await;
    for name in [
        "relay_requests_total{kind=\"put\"}",
        "relay_received_bytes_total",
        "relay_sent_bytes_total",
        "relay_connections",
    ] {
        let name = format!("highwater_collector_{name} ");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(&name))
            .unwrap_or_else(|| panic!("{name}:\n{text}"));
        assert!(value.parse::<f64>().unwrap() > 0.0, "{name}");
    }
    // None sees anything of the others in its own.
    is_clean(local_store(&c.vault_dir()).unwrap(), &c.dir.path().join("vault.key"), 1).await;
    let listed = relays::list(&c.vault().await).await.unwrap();
    assert_eq!((listed.len(), listed[0].relay, listed[0].state), (1, b_at_c, State::Enrolled));
    let (a_key, b_key) = (a.dir.path().join("vault.key"), b.dir.path().join("vault.key"));
    a.running.shutdown().await;
    b.running.shutdown().await;
    // At the end of the chain all lies as it would in directories of their own.
    let b_vault = c.vault_dir().join(format!("relays/{b_at_c}"));
    is_clean(local_store(&b_vault).unwrap(), &b_key, 2).await;
    is_clean(local_store(&b_vault.join(format!("relays/{a_at_b}"))).unwrap(), &a_key, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_place_holds_several_vaults() {
    let site = Site::new().await;
    let (relay, dir, _) = join(&site, "a").await;
    let endpoint = site.running.ingest;
    let key = VaultKey::generate().unwrap();
    for name in ["", "/one", "/two/three"] {
        let location: Location =
            format!("highwater://{endpoint}{name}?identity={}", dir.display()).parse().unwrap();
        let open = || Store::open(&location).unwrap();
        assert!(matches!(Vault::open(open(), &key).await, Err(VaultError::NotAVault)), "{name}");
        Vault::create(open(), &key).await.unwrap();
        Vault::open(open(), &key).await.unwrap().probe().await.unwrap();
        assert!(site.vault_dir().join(format!("relays/{relay}{name}/vault.json")).exists());
    }
    // Its file, or where it should be.
    let nobody: Location = format!("highwater://{endpoint}?identity=/nowhere").parse().unwrap();
    let error = Store::open(&nobody).unwrap_err();
    assert!(error.code() == 1224 && error.to_string().contains("/nowhere/identity.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_not_exchanged() {
    let site = Site::new().await;
    // Tokens.
    let refused = enroll_relay(&site.url(), &site.token(MINUTE).await, "a").await.unwrap_err();
    assert!(refused.to_string().contains("HW-1320"), "{refused}");
    let token = relay_token(&site, None).await;
    let refused = enroll(&site.url(), &token, "a").await.unwrap_err();
    assert!(refused.to_string().contains("HW-1320"), "{refused}");
    enroll_relay(&site.url(), &token, "a").await.unwrap();
    let again = enroll_relay(&site.url(), &token, "a").await.unwrap_err();
    assert!(again.to_string().contains("HW-1321"), "{again}");
    // Certificates.
    let (_, dir, _) = join(&site, "b").await;
    let relay = RelayIdentity::load(&dir).unwrap();
    let machine = site.enrolled().await;
    assert!(Identity::load(&dir).is_err());
    let ask = b"HEAD /objects/vault.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = said(
        &site,
        tls::relay_client(&relay.ca, relay.cert_chain.clone(), relay.key.clone_key()).unwrap(),
        ask,
    );
    assert!(answer.await.starts_with("HTTP/1.1 404"));
    let as_relay =
        tls::relay_client(&machine.ca, machine.cert_chain.clone(), machine.key.clone_key()).unwrap();
    assert_eq!(said(&site, as_relay, ask).await, "");
    let as_machine = tls::agent_client(&relay.ca, relay.cert_chain.clone(), relay.key.clone_key()).unwrap();
    assert_eq!(said(&site, as_machine, ask).await, "");
    let both = {
        let mut config =
            tls::relay_client(&relay.ca, relay.cert_chain.clone(), relay.key.clone_key()).unwrap();
        config.alpn_protocols.push(b"highwater/1".to_vec());
        config
    };
    assert_eq!(said(&site, both, ask).await, "");
}

/// What a server answers to these bytes, up to the end.
async fn said(site: &Site, config: rustls::ClientConfig, bytes: &[u8]) -> String {
    let stream = TcpStream::connect(site.running.ingest).await.unwrap();
    let mut stream =
        TlsConnector::from(Arc::new(config)).connect("127.0.0.1".try_into().unwrap(), stream).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_relay_is_out_and_may_return_as_itself() {
    let site = Site::new().await;
    let (relay, dir, location) = join(&site, "a").await;
    let key = VaultKey::generate().unwrap();
    let vault = Vault::create(Store::open(&location).unwrap(), &key).await.unwrap();
    let old = relay_token(&site, Some(tokens::Returning { machine: relay, generation: 0 })).await;
    // As an operator does, beside the collector.
    assert!(certificates::lock_out(&site.vault().await, relay, None).await.unwrap());
    let until = Instant::now() + MINUTE;
    let refused = loop {
        if let Err(error) = vault.control_create("x", b"").await {
            break error.to_string();
        }
        assert!(Instant::now() < until, "still let in");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(refused.contains("HW-1121"), "{refused}");
    assert_eq!(relays::list(&site.vault().await).await.unwrap()[0].state, State::Revoked);
    let void = enroll_relay(&site.url(), &old, "a").await.unwrap_err();
    assert!(void.to_string().contains("HW-1121"), "{void}");

    let generation = certificates::next_generation(&site.vault().await, relay).await.unwrap();
    let token = relay_token(&site, Some(tokens::Returning { machine: relay, generation })).await;
    let joined = enroll_relay(&site.url(), &token, "a").await.unwrap();
    assert_eq!(joined.identity.relay, relay);
    joined.identity.save(&dir).unwrap();
    // The identity is read anew with each connection.
    let until = Instant::now() + MINUTE;
    while vault.control_create("y", b"").await.is_err() {
        assert!(Instant::now() < until, "not let in again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Vault::open(Store::open(&location).unwrap(), &key).await.unwrap().probe().await.unwrap();
    assert_eq!(relays::list(&site.vault().await).await.unwrap()[0].state, State::Enrolled);
}

#[test]
fn the_command_does_it_at_both_ends() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = command::init(there.path());
    command::any_ports(&config);
    let (_daemon, ports) = command::run(&config);
    let (ok, token) = command::json(&["relay", "token", "--config", &config, "--name", "site-a"]);
    assert!(ok, "{token}");
    let url = ports["management"].as_str().unwrap();
    let (url, identity) = (format!("https://{url}"), here.path().join("relay"));
    let identity = identity.to_str().unwrap();
    let file = here.path().join("token");
    std::fs::write(&file, token["token"].as_str().unwrap()).unwrap();
    let arguments = ["relay", "join", &url, "--token-file", file.to_str().unwrap(), "--identity", identity];
    let (ok, joined) = command::json(&arguments);
    assert!(ok, "{joined}");
    let location = joined["location"].as_str().unwrap();
    let (ok, again) = command::json(&arguments);
    assert!(!ok && again["error"]["code"] == "HW-1315", "{again}");

    let etc = here.path().join("etc");
    let etc = etc.to_str().unwrap();
    let (ok, made) = command::json(&["init", "--dir", etc, "--vault", location, "--name", "127.0.0.1"]);
    assert!(ok, "{made}");
    let (ok, checked) = command::json(&["config", "check", "--config", made["config"].as_str().unwrap()]);
    assert!(ok, "{checked}");
    let other = here.path().join("other");
    let other = other.to_str().unwrap();
    let (ok, twice) = command::json(&["init", "--dir", other, "--vault", location, "--name", "127.0.0.1"]);
    assert!(!ok, "{twice}");

    let (_, listed) = command::json(&["relay", "list", "--config", &config]);
    let relay = listed["relays"][0]["relay"].as_str().unwrap();
    assert_eq!(
        (relay, &listed["relays"][0]["state"]),
        (joined["relay"].as_str().unwrap(), &"enrolled".into())
    );
    let plain = Command::new(env!("CARGO_BIN_EXE_highwater-collector"))
        .args(["relay", "list", "--config", &config])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&plain.stdout).contains(" days left)"), "{plain:?}");
    let (ok, revoked) = command::json(&["relay", "revoke", &relay[..35], "--config", &config]);
    assert!(ok && revoked["was-revoked"] == false, "{revoked}");
    let (ok, unknown) = command::json(&["relay", "revoke", "nobody", "--config", &config]);
    assert!(!ok && unknown["error"]["code"] == "HW-1338", "{unknown}");
}
