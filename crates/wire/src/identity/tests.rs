use super::*;
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
