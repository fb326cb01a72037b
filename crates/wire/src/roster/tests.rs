use super::*;

fn roster() -> Roster {
    let member = |n: u8| RosterMember {
        machine: MachineId::from_bytes([n; 16]),
        host_name: format!("host{n}"),
        address: Some(format!("10.0.0.{n}:20004")),
        generation_min: 0,
    };
    Roster {
        group: GroupId::new(),
        name: "shop".into(),
        epoch: 3,
        issued_ms: 1_790_000_000_000,
        members: (1..=5).map(member).collect(),
        crash_every_ms: Some(60_000),
        application_every_ms: None,
        prepare_max_ms: 60_000,
        hold_max_ms: 4_000,
    }
}

#[test]
fn a_signed_roster_is_believed_and_no_other() {
    let (own, other) = (Authority::create("one").unwrap(), Authority::create("two").unwrap());
    let signed = roster().sign(&own).unwrap();
    assert_eq!(signed.open(own.cert()).unwrap().members.len(), 5);
    assert!(signed.open(other.cert()).is_err());
    for at in 0..signed.roster.len() {
        let mut changed = signed.clone();
        changed.roster[at] ^= 1;
        assert!(changed.open(own.cert()).is_err(), "byte {at}");
    }
    for at in 0..signed.signature.len() {
        let mut changed = signed.clone();
        changed.signature[at] ^= 1;
        assert!(changed.open(own.cert()).is_err(), "byte {at} of the signature");
    }
    let mut longer = signed.clone();
    longer.roster.push(0);
    assert!(longer.open(own.cert()).is_err());
}

#[test]
fn a_signature_for_something_else_is_none() {
    let own = Authority::create("one").unwrap();
    let bytes = postcard::to_stdvec(&roster()).unwrap();
    let signature = own.sign(&bytes).unwrap();
    assert!(SignedRoster { roster: bytes, signature }.open(own.cert()).is_err());
}

#[test]
fn the_greatest_roster_fits() {
    let own = Authority::create("one").unwrap();
    let mut great = roster();
    great.name = "n".repeat(MAX_NAME_BYTES);
    great.members = (0..MEMBERS_MAX)
        .map(|n| RosterMember {
            machine: MachineId::from_bytes((n as u128).to_be_bytes()),
            host_name: "h".repeat(MAX_NAME_BYTES / 2),
            address: Some("a".repeat(MAX_NAME_BYTES)),
            generation_min: u32::MAX,
        })
        .collect();
    let signed = great.sign(&own).unwrap();
    assert_eq!(signed.open(own.cert()).unwrap(), great);
    great.members.push(great.members[0].clone());
    assert!(great.sign(&own).is_err());
}

#[test]
fn nonsense_is_refused() {
    let own = Authority::create("one").unwrap();
    let cases: [fn(&mut Roster); 6] = [
        |r| r.members.clear(),
        |r| r.members[1] = r.members[0].clone(),
        |r| r.hold_max_ms = 61_000,
        |r| r.hold_max_ms = 0,
        |r| r.crash_every_ms = Some(1),
        |r| r.name = "n".repeat(1000),
    ];
    for (n, case) in cases.iter().enumerate() {
        let mut bad = roster();
        case(&mut bad);
        assert!(bad.sign(&own).is_err(), "{n}");
        // Nor is it believed if it was signed.
        let roster = postcard::to_stdvec(&bad).unwrap();
        let signature = own.sign(&signed_bytes(&roster)).unwrap();
        assert!(SignedRoster { roster, signature }.open(own.cert()).is_err(), "{n}");
    }
}
