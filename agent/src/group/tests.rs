//! Members of a group over real connections, with engines that only say what they are told to do; and callers who mean harm.

use super::{owner::Options, *};
use highwater_delta::{GroupId, MachineId};
use highwater_wire::{
    FrameWriter, Identity, PeerMessage, Roster, RosterMember, SignedRoster, Timeouts, codec,
    identity::{Authority, Csr, Grant},
    message::PointAnswer,
    peer,
};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

const GROUP: GroupId = GroupId::from_bytes([9; 16]);

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn identity(authority: &Authority, machine: MachineId, generation: u32) -> Arc<Identity> {
    let csr = Csr::create().unwrap();
    let grant = Grant { machine, generation, validity: Duration::from_secs(3600) };
    let cert = authority.certify(&csr.csr_pem, grant).unwrap();
    Arc::new(Identity::from_pems(&csr.key_pem, &cert, authority.cert_pem()).unwrap())
}

/// A member: what its engine was asked, and what it told its collector.
struct Member {
    id: MachineId,
    address: SocketAddr,
    identity: Arc<Identity>,
    told: mpsc::Sender<Told>,
    asked: Arc<Mutex<Vec<(Instant, ToEngine)>>>,
    said: mpsc::UnboundedReceiver<AgentMessage>,
    /// Its engine's words.
    done: mpsc::UnboundedSender<FromEngine>,
    status: SharedStatus,
    _dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Member {
    fn start(authority: &Authority, n: u8) -> Self {
        let id = MachineId::from_bytes([n; 16]);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port()));
        let (identity, dir) = (identity(authority, id, 0), tempfile::tempdir().unwrap());
        let (tell, told) = mpsc::channel(8);
        let (ask, mut asks) = mpsc::channel::<ToEngine>(64);
        let (done, dones) = mpsc::unbounded_channel();
        let engine = done.clone();
        let (say, said) = mpsc::unbounded_channel();
        let asked = Arc::new(Mutex::new(vec![]));
        let (noted, status) = (asked.clone(), SharedStatus::default());
        // The engine: everything succeeds.
        tokio::spawn(async move {
            while let Some(ask) = asks.recv().await {
                noted.lock().unwrap().push((Instant::now(), ask.clone()));
                let _ = match ask {
                    ToEngine::Prepare { marker, .. } => {
                        done.send(FromEngine::Prepared { marker, done: true })
                    }
                    ToEngine::Freeze { marker, .. } => done.send(FromEngine::Frozen { marker, done: true }),
                    ToEngine::Keep { marker } => {
                        let _ = done.send(FromEngine::Kept { marker, intact: true });
                        done.send(FromEngine::Stored { marker, commit: CommitId(7), taken_at_ms: 7 })
                    }
                    ToEngine::Drop { .. } => Ok(()),
                    ToEngine::Tell(message) => {
                        let _ = say.send(message);
                        Ok(())
                    }
                };
            }
        });
        let options = Options { listen: address, run_dir: dir.path().to_owned() };
        let own = identity.clone();
        let task = tokio::spawn(run(options, id, move || own.clone(), told, ask, dones, status.clone()));
        Self { id, address, identity, told: tell, asked, said, done: engine, status, _dir: dir, task }
    }

    async fn group(&self, roster: &SignedRoster) {
        self.told.send(Told::Group(Some(roster.clone()))).await.unwrap();
    }

    async fn next(&mut self) -> AgentMessage {
        timeout(Duration::from_secs(20), self.said.recv()).await.expect("it says something").unwrap()
    }

    fn asked(&self) -> Vec<ToEngine> {
        self.asked.lock().unwrap().iter().map(|(_, ask)| ask.clone()).collect()
    }
}

fn roster(members: &[Member], epoch: u64) -> Roster {
    let member = |member: &Member| RosterMember {
        machine: member.id,
        host_name: format!("host{}", member.id.as_bytes()[0]),
        address: Some(member.address.to_string()),
        generation_min: 0,
    };
    Roster {
        group: GROUP,
        name: "shop".into(),
        epoch,
        issued_ms: 1,
        members: members.iter().map(member).collect(),
        crash_every_ms: None,
        application_every_ms: None,
        prepare_max_ms: 5_000,
        hold_max_ms: 2_000,
    }
}

async fn together(authority: &Authority, count: u8) -> (Vec<Member>, Roster) {
    let members: Vec<Member> = (1..=count).map(|n| Member::start(authority, n)).collect();
    let roster = roster(&members, 1);
    let signed = roster.sign(authority).unwrap();
    for member in &members {
        member.group(&signed).await;
    }
    // They listen.
    for member in &members {
        let until = Instant::now() + Duration::from_secs(10);
        while tokio::net::TcpStream::connect(member.address).await.is_err() {
            assert!(Instant::now() < until, "nobody listens");
            sleep(Duration::from_millis(10)).await;
        }
    }
    (members, roster)
}

async fn marker(members: &mut [Member], kind: Kind) -> Marker {
    members[1].told.send(Told::Wanted { request: 5, group: GROUP, kind }).await.unwrap();
    let mut kept = vec![];
    for member in members.iter_mut() {
        loop {
            match member.next().await {
                AgentMessage::Kept(told) => {
                    assert_eq!((told.kind, told.epoch, told.commit), (kind, 1, CommitId(7)));
                    kept.push(told.marker);
                    break;
                }
                AgentMessage::MarkerEnded { failed, .. } => assert_eq!(failed, None),
                AgentMessage::Answer { request, answer } => {
                    assert_eq!(request, 5);
                    assert!(matches!(answer, PointAnswer::Marker(_)), "{answer:?}");
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(kept.iter().all(|marker| *marker == kept[0]), "{kept:?}");
    kept[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_keeps_a_marker_that_one_asks_for() {
    let authority = Authority::create("test").unwrap();
    let (mut members, _) = together(&authority, 5).await;
    let first = marker(&mut members, Kind::Crash).await;
    sleep(Duration::from_millis(500)).await;
    let second = marker(&mut members, Kind::Application).await;
    assert!(second > first);
    // All were frozen before any was told to thaw.
    let all: Vec<(Instant, ToEngine)> =
        members.iter().flat_map(|m| m.asked.lock().unwrap().clone()).collect();
    let at = |what: &dyn Fn(&ToEngine) -> bool| -> Vec<Instant> {
        all.iter().filter(|(_, ask)| what(ask)).map(|(at, _)| *at).collect()
    };
    let frozen = at(&|ask| matches!(ask, ToEngine::Freeze { marker, .. } if *marker == first));
    let kept = at(&|ask| *ask == ToEngine::Keep { marker: first });
    assert_eq!((frozen.len(), kept.len()), (5, 5));
    assert!(frozen.iter().max() < kept.iter().min());
    let status = members[0].status.get().unwrap();
    assert_eq!((status.name.as_str(), status.members, status.epoch), ("shop", 5, 1));
    assert!(status.last_kept.is_some() && status.listening.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_away_is_named_and_nobody_stays_frozen() {
    let authority = Authority::create("test").unwrap();
    let (mut members, _) = together(&authority, 3).await;
    members[2].task.abort();
    sleep(Duration::from_millis(50)).await;
    members[0].told.send(Told::Wanted { request: 8, group: GROUP, kind: Kind::Crash }).await.unwrap();
    let mut why = None;
    while why.is_none() {
        if let AgentMessage::Answer { request: 8, answer: PointAnswer::Failed(refusal) } =
            members[0].next().await
        {
            why = Some(refusal.cause);
        }
    }
    assert_eq!(why.unwrap(), "no answer in time from host3");
    for member in &members[..2] {
        assert!(member.asked().iter().all(|ask| matches!(ask, ToEngine::Tell(_))), "nobody prepared for it");
    }
}

/// Waits until a member's status is so.
async fn until(member: &Member, is: impl Fn(&GroupStatus) -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !member.status.get().is_some_and(|status| is(&status)) {
        assert!(Instant::now() < until, "{:?}", member.status.get());
        sleep(Duration::from_millis(10)).await;
    }
}

/// A collector's clock was set back: an earlier roster bears a later time. Whoever has kept it cannot pass it on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_certificate_does_not_come_back_with_an_old_roster() {
    let authority = Authority::create("test").unwrap();
    let (members, mut roster) = together(&authority, 2).await;
    let own = members[1].identity.clone();
    roster.issued_ms = 100;
    let old = roster.sign(&authority).unwrap();
    members[0].group(&old).await;
    (roster.issued_ms, roster.name) = (50, "revoked".into());
    roster.members[1].generation_min = 1;
    members[0].group(&roster.sign(&authority).unwrap()).await;
    until(&members[0], |status| status.name == "revoked").await;
    let say = [PeerMessage::Roster(old), prepare(&own, 1)].map(|message| codec::encode(&message).unwrap());
    call(&members[0], &own, &say).await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(members[0].status.get().unwrap().name, "revoked");
    assert!(
        members[0].asked().iter().all(|ask| matches!(ask, ToEngine::Tell(_))),
        "{:?}",
        members[0].asked()
    );
}

/// A vault that was restored knows of an earlier membership only, and of another one that follows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_vault_has_the_say() {
    let authority = Authority::create("test").unwrap();
    let (mut members, mut roster) = together(&authority, 3).await;
    (roster.epoch, roster.issued_ms) = (3, 10);
    roster.members.pop();
    let signed = roster.sign(&authority).unwrap();
    for member in &members[..2] {
        member.group(&signed).await;
        until(member, |status| status.epoch == 3).await;
    }
    // A collector that has not looked into the vault for long has no say.
    (roster.epoch, roster.issued_ms) = (2, 9);
    members[0].group(&roster.sign(&authority).unwrap()).await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(members[0].status.get().unwrap().epoch, 3);
    (roster.epoch, roster.issued_ms) = (2, 20);
    let signed = roster.sign(&authority).unwrap();
    members[0].group(&signed).await;
    until(&members[0], |status| status.epoch == 2).await;
    // Of the third epoch again, with others.
    let mut roster = self::roster(&members, 3);
    roster.issued_ms = 30;
    let signed = roster.sign(&authority).unwrap();
    for member in &members {
        member.group(&signed).await;
        until(member, |status| status.members == 3).await;
    }
    members[2].told.send(Told::Wanted { request: 6, group: GROUP, kind: Kind::Crash }).await.unwrap();
    loop {
        if let AgentMessage::Answer { request: 6, answer } = members[2].next().await {
            assert!(matches!(answer, PointAnswer::Marker(_)), "{answer:?}");
            return;
        }
    }
}

/// Whoever asks while a marker is under way may have written since it was frozen: it is the next one that answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_marker_that_was_under_way_answers_nobody_who_came_later() {
    let authority = Authority::create("test").unwrap();
    let (mut members, _) = together(&authority, 2).await;
    for request in [1, 2] {
        members[0].told.send(Told::Wanted { request, group: GROUP, kind: Kind::Crash }).await.unwrap();
    }
    let mut answers = vec![];
    while answers.len() < 2 {
        if let AgentMessage::Answer { request, answer: PointAnswer::Marker(marker) } = members[0].next().await
        {
            answers.push((request, marker));
        }
    }
    assert_eq!((answers[0].0, answers[1].0), (1, 2));
    assert!(answers[1].1 > answers[0].1, "{answers:?}");
}

/// What a member kept is not stored, and there is no session in which to say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_withdrawn_is_said_again() {
    let authority = Authority::create("test").unwrap();
    let (mut members, _) = together(&authority, 2).await;
    let kept = marker(&mut members, Kind::Crash).await;
    members[0].done.send(FromEngine::Lost { marker: kept }).unwrap();
    let is_it = |said: AgentMessage| matches!(said, AgentMessage::Withdrawn { marker, .. } if marker == kept);
    while !is_it(members[0].next().await) {}
    members[0].told.send(Told::Session).await.unwrap();
    // And no more that it is kept.
    assert!(is_it(members[0].next().await));
}

/// A newer roster spreads from member to member where the collector reaches only one; whoever is not in it is not heard any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roster_spreads() {
    let authority = Authority::create("test").unwrap();
    let (mut members, mut roster) = together(&authority, 3).await;
    marker(&mut members, Kind::Crash).await;
    (roster.epoch, roster.issued_ms) = (2, 2);
    roster.members.remove(2);
    members[1].group(&roster.sign(&authority).unwrap()).await;
    let until = Instant::now() + Duration::from_secs(10);
    while members[0].status.get().unwrap().epoch != 2 {
        assert!(Instant::now() < until, "it did not come");
        sleep(Duration::from_millis(20)).await;
    }
    // An older one, signed as well, changes nothing.
    (roster.epoch, roster.issued_ms) = (1, 1);
    roster.name = "old".into();
    members[0].group(&roster.sign(&authority).unwrap()).await;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(members[0].status.get().unwrap().name, "shop");
    // None: the port is closed.
    members[0].told.send(Told::Group(None)).await.unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while tokio::net::TcpStream::connect(members[0].address).await.is_ok() {
        assert!(Instant::now() < until, "it listens still");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(members[0].status.get(), None);
}

fn prepare(from: &Identity, number: u64) -> PeerMessage {
    let life = highwater_group::Life { since: u64::MAX / 2, nonce: 1 };
    let marker = Marker { coordinator: from.machine, life, number };
    let message = highwater_group::Message::Prepare { marker, kind: Kind::Crash, epoch: 1 };
    PeerMessage::Said { group: GROUP, message }
}

/// Calls a member, and says these things; answers how the connection ended, if it did within a moment.
async fn call(to: &Member, as_whom: &Identity, say: &[Vec<u8>]) -> bool {
    let Ok((_, stream)) = peer::call(as_whom, to.id, &to.address.to_string()).await else { return true };
    let (mut input, output) = tokio::io::split(stream);
    let mut frames = FrameWriter::new(output, Timeouts::default());
    for body in say {
        if frames.control(body).await.is_err() {
            return true;
        }
    }
    let _ = frames.flush().await;
    let drained = async {
        let mut buffer = vec![0; 65536];
        while !matches!(tokio::io::AsyncReadExt::read(&mut input, &mut buffer).await, Ok(0) | Err(_)) {}
    };
    timeout(Duration::from_millis(700), drained).await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_no_member_is_not_listened_to() {
    let authority = Authority::create("test").unwrap();
    let (mut members, mut roster) = together(&authority, 2).await;
    let nothing = |member: &Member| member.asked().iter().all(|ask| matches!(ask, ToEngine::Tell(_)));
    let say = |who: &Identity| vec![codec::encode(&prepare(who, 1)).unwrap()];

    // Another authority's machine, with a member's name. It believes in ours, so that it is not the one who ends it.
    let other = Authority::create("other").unwrap();
    let csr = Csr::create().unwrap();
    let grant = Grant { machine: members[1].id, generation: 0, validity: Duration::from_secs(3600) };
    let cert = other.certify(&csr.csr_pem, grant).unwrap();
    let stranger = Identity::from_pems(&csr.key_pem, &cert, authority.cert_pem()).unwrap();
    let (_, mut stream) =
        peer::call(&stranger, members[0].id, &members[0].address.to_string()).await.unwrap();
    // A member hears who it is only after the caller is done.
    let alert = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 64]).await.unwrap_err().to_string();
    assert!(
        alert.contains("UnknownCA") || alert.contains("ecrypt") || alert.contains("BadCertificate"),
        "{alert}"
    );
    assert!(nothing(&members[0]), "{:?}", members[0].asked());
    // A machine of the vault that is no member.
    let outsider = identity(&authority, MachineId::from_bytes([77; 16]), 0);
    call(&members[0], &outsider, &say(&outsider)).await;
    assert!(nothing(&members[0]), "{:?}", members[0].asked());
    // A member speaks for another.
    let own = members[1].identity.clone();
    let forged = vec![codec::encode(&prepare(&members[0].identity, 1)).unwrap()];
    call(&members[0], &own, &forged).await;
    assert!(nothing(&members[0]), "{:?}", members[0].asked());
    // A revoked certificate of a member.
    roster.issued_ms = 2;
    roster.members[1].generation_min = 1;
    members[0].group(&roster.sign(&authority).unwrap()).await;
    sleep(Duration::from_millis(200)).await;
    call(&members[0], &own, &say(&own)).await;
    assert!(nothing(&members[0]), "{:?}", members[0].asked());
    // The newer one is one.
    let renewed = identity(&authority, members[1].id, 1);
    call(&members[0], &renewed, &say(&renewed)).await;
    assert!(matches!(members[0].asked()[..], [ToEngine::Prepare { .. }, ..]), "{:?}", members[0].asked());
    // While that is connected, the revoked one is not heard.
    let (_, held) = peer::call(&renewed, members[0].id, &members[0].address.to_string()).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    let before = members[0].asked().len();
    let again = vec![codec::encode(&prepare(&own, 9)).unwrap()];
    call(&members[0], &own, &again).await;
    assert_eq!(members[0].asked().len(), before, "{:?}", members[0].asked());
    drop(held);
    let _ = members[0].said.try_recv();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_means_harm_costs_little() {
    let authority = Authority::create("test").unwrap();
    let (members, _) = together(&authority, 2).await;
    let own = members[1].identity.clone();
    // What is no message ends the connection.
    assert!(call(&members[0], &own, &[vec![0xff; 64]]).await);
    // So does more than there is use for.
    let many: Vec<_> = (0..3000).map(|n| codec::encode(&prepare(&own, n)).unwrap()).collect();
    assert!(call(&members[0], &own, &many).await);
    // A frame that claims to be endless is refused by its header.
    let (_, mut stream) = peer::call(&own, members[0].id, &members[0].address.to_string()).await.unwrap();
    let mut header = b"HWF1\x01\0\0\0".to_vec();
    header.extend([0; 8]);
    header.extend(u32::MAX.to_le_bytes());
    header.extend([0; 8]);
    stream.write_all(&header).await.unwrap();
    stream.flush().await.unwrap();
    // Connections that say nothing do not keep others out.
    let mut idle = vec![];
    for _ in 0..200 {
        idle.push(tokio::net::TcpStream::connect(members[0].address).await);
    }
    let mut members = members;
    marker_after_rest(&mut members).await;
}

/// A member rests after what was asked of it; then all is as before.
async fn marker_after_rest(members: &mut [Member]) {
    members[0].told.send(Told::Wanted { request: 5, group: GROUP, kind: Kind::Crash }).await.unwrap();
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        assert!(Instant::now() < until, "no marker");
        if let AgentMessage::Answer { request: 5, answer } = members[0].next().await {
            assert!(matches!(answer, PointAnswer::Marker(_)), "{answer:?}");
            return;
        }
    }
}
