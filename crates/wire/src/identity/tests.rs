use super::*;
use crate::certificate::{fingerprint, is_collector_cert, parse, serial_of};
use crate::client::Identity;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_machine_is_named_by_its_certificate_and_by_nothing_in_its_request() {
    let ca = Authority::create("test").unwrap();
    let machine = MachineId::new();
    let csr = Csr::create().unwrap();
    let cert = ca.sign_csr(&csr.csr_pem, machine).unwrap();
    let identity = Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
    assert_eq!(identity.machine, machine);
    assert!(!is_collector_cert(&identity.cert_chain[0]));

    // A request that claims to be another machine, a collector and an authority.
    let key = generate_key().unwrap();
    let mut liar = CertificateParams::default();
    liar.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    liar.subject_alt_names =
        vec![uri(&format!("{MACHINE_URI_PREFIX}{}", MachineId::new())).unwrap(), uri(COLLECTOR_URI).unwrap()];
    let liar = liar.serialize_request(&key).unwrap().pem().unwrap();
    let cert = ca.sign_csr(&liar, machine).unwrap();
    let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
    assert_eq!(machine_from_cert(&cert).unwrap(), machine);
    assert!(!is_collector_cert(&cert));
    assert!(!parse(&cert).unwrap().is_ca());
}

#[test]
fn requests_that_prove_nothing_are_refused() {
    let ca = Authority::create("test").unwrap();
    let csr = Csr::create().unwrap().csr_pem;
    let mut tampered = csr.clone().into_bytes();
    let middle = csr.len() / 2;
    tampered[middle] = if tampered[middle] == b'A' { b'B' } else { b'A' };
    let other_key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let other = CertificateParams::default().serialize_request(&other_key).unwrap().pem().unwrap();
    for bad in ["", "x", &String::from_utf8(tampered).unwrap(), &other, &"x".repeat(CSR_BYTES_MAX + 1)] {
        assert_eq!(ca.sign_csr(bad, MachineId::new()).unwrap_err().code(), 1113);
    }
}

#[test]
fn an_authority_survives_being_stored() {
    let ca = Authority::create("test").unwrap();
    let again = Authority::from_pem(ca.cert_pem(), &ca.key_pem()).unwrap();
    assert_eq!(fingerprint(ca.cert()), fingerprint(again.cert()));
    let stranger = Authority::create("other").unwrap();
    assert!(Authority::from_pem(ca.cert_pem(), &stranger.key_pem()).is_err());
}

#[test]
fn an_identity_is_saved_privately_and_checked_when_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::create("test").unwrap();
    let (one, two) = (Csr::create().unwrap(), Csr::create().unwrap());
    let cert = ca.sign_csr(&one.csr_pem, MachineId::new()).unwrap();
    assert!(Identity::from_pems(&two.key_pem, &cert, ca.cert_pem()).is_err(), "a key of another certificate");
    let identity = Identity::from_pems(&one.key_pem, &cert, ca.cert_pem()).unwrap();
    identity.save(dir.path()).unwrap();
    let file = dir.path().join(crate::client::IDENTITY_FILE);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(Identity::load(dir.path()).unwrap().machine, identity.machine);
    std::fs::write(&file, "nothing").unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap_err().code(), 1113);
}

#[test]
fn serial_numbers_differ() {
    let ca = Authority::create("test").unwrap();
    let csr = Csr::create().unwrap();
    let serial = |pem: &str| serial_of(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
    let machine = MachineId::new();
    let (a, b) = (ca.sign_csr(&csr.csr_pem, machine).unwrap(), ca.sign_csr(&csr.csr_pem, machine).unwrap());
    assert_ne!(serial(&a), serial(&b));
}

fn grant(machine: MachineId, generation: u32, validity_seconds: u64) -> Grant {
    Grant { machine, generation, validity: Duration::from_secs(validity_seconds) }
}

fn certificate(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

#[test]
fn a_certificate_says_who_and_for_how_long() {
    let ca = Authority::create("test").unwrap();
    let (csr, machine) = (Csr::create().unwrap(), MachineId::new());
    let issue = |grant| Credential::of(&certificate(&ca.certify(&csr.csr_pem, grant).unwrap())).unwrap();
    let year = issue(Grant { machine, generation: 0, validity: CLIENT_VALIDITY });
    assert_eq!((year.machine, year.generation), (machine, 0));
    assert_eq!(year.validity(), CLIENT_VALIDITY + CLOCK_SKEW);
    assert_eq!(
        year.renewal_due_ms(),
        year.expires_ms - (CLIENT_VALIDITY + CLOCK_SKEW).as_millis() as u64 / 3
    );
    assert_eq!(issue(grant(machine, 7, 60)).generation, 7);
    assert_eq!(issue(grant(machine, 0, 6)).validity(), Duration::from_secs(12), "the skew shrinks with it");
    let for_ever = issue(grant(machine, 0, 100 * 365 * 86_400));
    assert_eq!(for_ever.expires_ms, ca.expires_ms(), "nothing outlasts the authority");
}

#[test]
fn a_renewal_for_anybody_else_is_refused() {
    let ca = Authority::create("test").unwrap();
    let machine = MachineId::new();
    let request = |names: &[String]| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names.iter().map(|name| uri(name).unwrap()).collect();
        params.serialize_request(&generate_key().unwrap()).unwrap().pem().unwrap()
    };
    let (own, other) =
        (format!("{MACHINE_URI_PREFIX}{machine}"), format!("{MACHINE_URI_PREFIX}{}", MachineId::new()));
    for good in [vec![], vec![own.clone()]] {
        let cert = ca.recertify(&request(&good), grant(machine, 3, 60)).unwrap();
        let credential = Credential::of(&certificate(&cert)).unwrap();
        assert_eq!((credential.machine, credential.generation), (machine, 3));
    }
    let next = format!("{GENERATION_URI_PREFIX}9");
    for bad in
        [vec![other.clone()], vec![own.clone(), other], vec![own, next], vec![COLLECTOR_URI.to_owned()]]
    {
        let error = ca.recertify(&request(&bad), grant(machine, 0, 60)).unwrap_err();
        assert!(error.code() == 1113 && error.to_string().contains("somebody else"), "{error}");
    }
}

#[test]
fn a_renewed_identity_takes_the_place_of_the_old_one_whatever_interrupts_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(crate::client::IDENTITY_FILE);
    let ca = Authority::create("test").unwrap();
    let machine = MachineId::new();
    let first = Csr::create().unwrap();
    let cert = ca.certify(&first.csr_pem, grant(machine, 0, 3600)).unwrap();
    let old = Identity::from_pems(&first.key_pem, &cert, ca.cert_pem()).unwrap();
    old.save(dir.path()).unwrap();

    let second = Csr::create().unwrap();
    let cert = ca.recertify(&second.csr_pem, grant(machine, 0, 7200)).unwrap();
    let new = old.renewed(&second.key_pem, &cert).unwrap();
    // A crash before the file was renamed left a part of it: the old identity holds, and is whole.
    std::fs::write(path.with_file_name("identity.pem.new"), &second.key_pem.as_bytes()[..40]).unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap().cert_chain, old.cert_chain);
    assert!(new.replace(dir.path(), &old).unwrap());
    assert_eq!(Identity::load(dir.path()).unwrap().cert_chain, new.cert_chain);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(second.key_pem.as_str()) && !text.contains(first.key_pem.as_str()));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "neither the old key nor a part is left");

    // Enrolled again meanwhile: the renewal of what was there before is not written over it.
    let third = Csr::create().unwrap();
    let cert = ca.recertify(&third.csr_pem, grant(machine, 0, 9000)).unwrap();
    let late = old.renewed(&third.key_pem, &cert).unwrap();
    assert!(!late.replace(dir.path(), &old).unwrap());
    assert_eq!(Identity::load(dir.path()).unwrap().cert_chain, new.cert_chain);
}

#[test]
fn a_renewed_certificate_must_be_this_machines_and_this_authoritys() {
    let (ca, stranger) = (Authority::create("test").unwrap(), Authority::create("test").unwrap());
    let machine = MachineId::new();
    let csr = Csr::create().unwrap();
    let cert = ca.sign_csr(&csr.csr_pem, machine).unwrap();
    let identity = Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
    let next = Csr::create().unwrap();
    let bad = [
        ("another machine's", ca.sign_csr(&next.csr_pem, MachineId::new()).unwrap()),
        ("another authority's", stranger.sign_csr(&next.csr_pem, machine).unwrap()),
        ("another key's", ca.sign_csr(&csr.csr_pem, machine).unwrap()),
        ("expired", ca.certify(&next.csr_pem, grant(machine, 0, 0)).unwrap()),
        ("two", cert.repeat(2)),
        ("none", String::new()),
    ];
    std::thread::sleep(Duration::from_millis(1100));
    for (case, cert) in bad {
        assert_eq!(identity.renewed(&next.key_pem, &cert).unwrap_err().code(), 1113, "{case}");
    }
    assert!(identity.renewed(&next.key_pem, &ca.sign_csr(&next.csr_pem, machine).unwrap()).is_ok());
}
