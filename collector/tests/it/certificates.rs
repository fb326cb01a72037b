//! Certificates of machines: renewed in time, refused when revoked, and bought again by a machine that returns.

use crate::support::{Agent, Site};
use highwater_collector::certificates::{self, Origin, State};
use highwater_collector::clock::now_ms;
use highwater_collector::tokens::{self, Returning};
use highwater_collector::{Collector, Config, init};
use highwater_delta::{CommitId, DiskId, MachineId};
use highwater_wire::enroll::{Token, enroll};
use highwater_wire::message::{AgentMessage, CollectorMessage, Refusal};
use highwater_wire::{Credential, Identity, WireError};
use highwater_wire::{certificate::fingerprint, identity::Csr};
use std::time::{Duration, Instant};

const HOUR: Duration = Duration::from_secs(3600);

fn refusal(result: Result<Agent, WireError>) -> Refusal {
    match result {
        Err(WireError::Refused(refusal)) => refusal,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("welcomed"),
    }
}

/// A request that names these, which a [`Csr`] of ours never does.
fn request(names: &[String]) -> String {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names =
        names.iter().map(|name| rcgen::SanType::URI(name.as_str().try_into().unwrap())).collect();
    params.serialize_request(&key).unwrap().pem().unwrap()
}

async fn renew(agent: &mut Agent, csr_pem: &str) -> Result<String, Refusal> {
    agent.send(AgentMessage::Renew { csr_pem: csr_pem.to_owned() }).await;
    match agent.receiver.recv().await.unwrap() {
        CollectorMessage::Renewed { cert_pem } => Ok(cert_pem),
        CollectorMessage::NotRenewed(refusal) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

async fn token_for(site: &Site, machine: MachineId) -> Token {
    let shared = &site.running.shared;
    let generation = certificates::next_generation(&shared.vault, machine).await.unwrap();
    let returning = Some(Returning { machine, generation });
    let ca = fingerprint(shared.authority.cert());
    tokens::create(&shared.vault, ca, now_ms(), HOUR, None, returning).await.unwrap()
}

async fn state(site: &Site, machine: MachineId) -> certificates::Listed {
    let all = certificates::list(&site.vault().await).await.unwrap();
    all.into_iter().find(|listed| listed.machine == machine).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_near_its_end_is_renewed_within_the_session() {
    let site = Site::with(|config| config.certificate_validity = Duration::from_secs(600)).await;
    // An hour of skew and less than half of it left.
    let old = site.machine_for(MachineId::new(), 0, Duration::from_secs(5)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let disk = DiskId::new();
    let mut agent = site.agent(&old, disk).await;
    let csr = Csr::create().unwrap();
    let cert = renew(&mut agent, &csr.csr_pem).await.unwrap();
    let new = old.renewed(&csr.key_pem, &cert).unwrap();
    let (before, after) = (old.credential().unwrap(), new.credential().unwrap());
    assert_eq!((after.machine, after.generation), (before.machine, before.generation));
    assert!(after.expires_ms > before.expires_ms + 500_000 && after.serial != before.serial);
    // The session goes on, and the next one is opened with the new certificate, also when the old one has expired.
    agent.deliver(disk, 0, &[1]).await;
    let listed = state(&site, old.machine).await;
    assert_eq!((listed.expires_ms, listed.origin), (Some(after.expires_ms), Some(Origin::Renewal)));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(agent.refusal().await.code, 1327, "a session does not outlive its certificate");
    assert_eq!(site.connect(&old).await.err().unwrap().code(), 1111);
    site.agent(&new, disk).await.deliver(disk, 0, &[2]).await;
    assert!(site.metrics().await.contains("highwater_collector_certificate_renewals_total 1\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_a_renewal_is_for_is_said_by_the_certificate_alone() {
    let site = Site::new().await;
    let (one, two) = (MachineId::new(), MachineId::new());
    site.machine_for(two, 0, HOUR).await;
    let thief = site.machine_for(one, 3, Duration::from_secs(10)).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let mut agent = site.connect(&thief).await.unwrap();
    let named = format!("urn:highwater:machine:{two}");
    let generation = "urn:highwater:generation:9".to_owned();
    for bad in [vec![named], vec![generation], vec!["urn:highwater:collector".to_owned()]] {
        let refusal = renew(&mut agent, &request(&bad)).await.unwrap_err();
        assert_eq!((refusal.code, refusal.fatal), (1113, false), "{refusal:?}");
    }
    // Without a name, or with its own, it is itself.
    let cert = renew(&mut agent, &request(&[format!("urn:highwater:machine:{one}")])).await.unwrap();
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
    let Credential { machine, generation, .. } = Credential::of(&cert).unwrap();
    assert_eq!((machine, generation), (one, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_are_refused_when_they_come_early_and_end_the_session_when_often() {
    let site = Site::new().await;
    let disk = DiskId::new();
    let fresh = site.machine_for(MachineId::new(), 0, 9000 * HOUR).await;
    let mut agent = site.agent(&fresh, disk).await;
    let csr = Csr::create().unwrap();
    let refusal = renew(&mut agent, &csr.csr_pem).await.unwrap_err();
    assert_eq!((refusal.code, refusal.retry, refusal.fatal), (1325, true, false));
    agent.deliver(disk, 0, &[1]).await;

    let disk = DiskId::new();
    let late = site.machine_for(MachineId::new(), 0, Duration::from_secs(20)).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let mut agent = site.agent(&late, disk).await;
    let mut codes = Vec::new();
    for _ in 0..4 {
        codes.push(renew(&mut agent, &csr.csr_pem).await.map_or_else(|refusal| refusal.code, |_| 0));
    }
    assert_eq!(codes, [0, 0, 0, 0]);
    agent.deliver(disk, 0, &[1]).await;
    agent.send(AgentMessage::Renew { csr_pem: "nonsense".to_owned() }).await;
    assert_eq!(agent.refusal().await.code, 1329);
    // Another session of the machine has no other allowance.
    let mut again = site.connect(&late).await.unwrap();
    again.send(AgentMessage::Renew { csr_pem: csr.csr_pem.clone() }).await;
    assert_eq!(again.refusal().await.code, 1329);
    // What is refused counts as well.
    let mut agent = site.connect(&fresh).await.unwrap();
    for _ in 0..3 {
        assert_eq!(renew(&mut agent, &csr.csr_pem).await.unwrap_err().code, 1325);
    }
    agent.send(AgentMessage::Renew { csr_pem: csr.csr_pem }).await;
    assert_eq!(agent.refusal().await.code, 1329);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_version_one_is_served_and_may_not_renew() {
    let site = Site::new().await;
    let identity = site.machine().await;
    let hello = highwater_wire::message::Hello {
        machine: identity.machine,
        version_min: 1,
        version_max: 1,
        agent_version: String::new(),
        host_name: String::new(),
        kernel: String::new(),
    };
    let address = site.running.ingest.to_string();
    let (welcome, mut sender, mut receiver) =
        highwater_wire::connect(&address, "127.0.0.1", &identity, hello).await.unwrap();
    assert_eq!(welcome.version, 1);
    sender.send(&AgentMessage::Renew { csr_pem: String::new() }).await.unwrap();
    sender.flush().await.unwrap();
    let CollectorMessage::Refused(refusal) = receiver.recv().await.unwrap() else { panic!() };
    assert_eq!(refusal.code, 1311);
    assert_eq!(site.connect(&identity).await.unwrap().welcome.version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_machine_is_cut_off_and_told_and_nobody_else_is() {
    let site = Site::new().await;
    let (bad, good) = (site.enrolled().await, site.enrolled().await);
    let (bad_disk, good_disk) = (DiskId::new(), DiskId::new());
    let mut running = site.agent(&bad, bad_disk).await;
    let mut other = site.agent(&good, good_disk).await;
    running.deliver(bad_disk, 0, &[1]).await;
    assert_eq!(state(&site, bad.machine).await.state, State::Enrolled);
    // As the command does it: through the vault, and nothing else.
    let begun = Instant::now();
    assert!(certificates::revoke(&site.vault().await, bad.machine, None).await.unwrap());
    let told = running.refusal().await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((told.code, told.retry), (1119, false));
    assert!(told.cause.contains(&bad.machine.to_string()) && told.action.contains("token create --machine"));
    let told = refusal(site.connect(&bad).await);
    assert_eq!((told.code, told.retry), (1119, false));
    assert_eq!(state(&site, bad.machine).await.state, State::Revoked);
    other.deliver(good_disk, 0, &[1]).await;
    assert_eq!(state(&site, good.machine).await.state, State::Enrolled);
    assert!(site.metrics().await.contains("highwater_collector_refusals_total{code=\"HW-1119\"} 2\n"));
    // Once more changes nothing.
    assert!(!certificates::revoke(&site.vault().await, bad.machine, None).await.unwrap());
    let unknown = certificates::revoke(&site.vault().await, MachineId::new(), None).await.unwrap_err();
    assert_eq!(unknown.code(), 1209);
    // Its points stay.
    assert_eq!(site.vault().await.machine(bad.machine).await.unwrap().points.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_found_by_a_renewal_holds_at_once() {
    let site = Site::new().await;
    let identity = site.enrolled().await;
    let mut agent = site.connect(&identity).await.unwrap();
    // Between two readings of who is revoked, which are 2 s apart.
    certificates::revoke(&site.vault().await, identity.machine, None).await.unwrap();
    agent.send(AgentMessage::Renew { csr_pem: Csr::create().unwrap().csr_pem }).await;
    assert_eq!(agent.refusal().await.code, 1119);
    assert_eq!(refusal(site.connect(&identity).await).code, 1119);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_outlasts_the_collector() {
    let site = Site::new().await;
    let identity = site.enrolled().await;
    certificates::revoke(&site.vault().await, identity.machine, None).await.unwrap();
    let Site { running, dir } = site;
    running.shutdown().await;
    let mut config = Config::load(&dir.path().join(init::CONFIG_FILE)).unwrap();
    for address in [&mut config.listen, &mut config.management_listen, &mut config.metrics_listen] {
        *address = "127.0.0.1:0".parse().unwrap();
    }
    let site = Site { running: Collector::start(config).await.unwrap(), dir };
    // From its very first connection on.
    assert_eq!(refusal(site.connect(&identity).await).code, 1119);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_returns_as_itself_with_a_token_made_for_it() {
    let site = Site::new().await;
    let (old, disk) = (site.enrolled().await, DiskId::new());
    site.agent(&old, disk).await.deliver(disk, 0, &[1]).await;
    let early = token_for(&site, old.machine).await;
    certificates::revoke(&site.vault().await, old.machine, None).await.unwrap();
    site.running.shared.refresh_revoked().await.unwrap();

    // A token of before would undo the revocation; it is not used up by that.
    let error = enroll(&site.url(), &early, "host").await.unwrap_err().to_string();
    assert!(error.contains("403") && error.contains("HW-1119"), "{error}");
    let token = token_for(&site, old.machine).await;
    let new = enroll(&site.url(), &token, "renamed").await.unwrap().identity;
    assert_eq!((new.machine, new.credential().unwrap().generation), (old.machine, 1));
    let mut agent = site.agent(&new, disk).await;
    assert_eq!(agent.welcome.last_commit, CommitId(1), "with its history and its disks");
    agent.deliver(disk, 1, &[2]).await;
    assert_eq!(refusal(site.connect(&old).await).code, 1119, "the old certificate stays revoked");
    agent.deliver(disk, 1, &[3]).await;
    let listed = state(&site, old.machine).await;
    assert_eq!((listed.state, listed.generation, listed.host.as_str()), (State::Enrolled, 1, "host"));

    // Revoked again, with the new one.
    certificates::revoke(&site.vault().await, old.machine, None).await.unwrap();
    assert_eq!(agent.refusal().await.code, 1119);
    let void = token_for(&site, old.machine).await;
    certificates::revoke(&site.vault().await, old.machine, None).await.unwrap();
    let error = enroll(&site.url(), &void, "host").await.unwrap_err().to_string();
    assert!(error.contains("HW-1119"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_opens_nothing_and_is_listed() {
    let site = Site::new().await;
    let identity: Identity = site.machine_for(MachineId::new(), 0, Duration::from_secs(1)).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(site.connect(&identity).await.err().unwrap().code(), 1111);
    assert_eq!(state(&site, identity.machine).await.state, State::Expired);
    let token = token_for(&site, identity.machine).await;
    let again = enroll(&site.url(), &token, "host").await.unwrap().identity;
    assert_eq!((again.machine, again.credential().unwrap().generation), (identity.machine, 0));
    site.connect(&again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erased_machine_is_cut_off_and_never_comes_back() {
    let site = Site::new().await;
    let identity = site.enrolled().await;
    let machine = identity.machine;
    let token = token_for(&site, machine).await;
    let mut agent = site.connect(&identity).await.unwrap();
    highwater_vault::erase::erase(&site.vault().await, machine).await.unwrap();
    assert_eq!(agent.refusal().await.code, 1119);
    assert_eq!(refusal(site.connect(&identity).await).code, 1119);
    // Neither with a token from before nor with one from afterwards.
    for token in [token, token_for(&site, machine).await] {
        assert!(enroll(&site.url(), &token, "host").await.is_err());
    }
    let vault = site.vault().await;
    assert_eq!(certificates::find(&vault, &machine.to_string()).await.unwrap_err().code(), 1233);
    assert!(certificates::list(&vault).await.unwrap().is_empty());
    let error = vault.register_machine(machine, "host").await.unwrap_err();
    assert_eq!(error.code(), 1233);
}
