//! Replication groups: what members are told, and what becomes of what they say.

use crate::support::{Agent, Site, TAKEN_MS};
use highwater_delta::{CommitId, DiskId, GroupId, MachineId};
use highwater_group::{Kind, Life, Marker};
use highwater_vault::groups::{Answer, Group, Of, Report, Times};
use highwater_wire::message::{AgentMessage, CollectorMessage, Kept, PointAnswer, Reachable};
use highwater_wire::{Identity, Roster};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(15);

async fn group(site: &Site, name: &str, members: &[&Identity]) -> Group {
    let members = members.iter().map(|identity| identity.machine).collect();
    let group = Group::new(name, members, Times::default());
    site.vault().await.change_groups(|_| Ok(group.clone())).await.unwrap()
}

/// The next word on the machine's group.
async fn told(agent: &mut Agent, site: &Site) -> Option<Roster> {
    loop {
        match tokio::time::timeout(SOON, agent.receiver.recv()).await.expect("nothing is told").unwrap() {
            CollectorMessage::Group(signed) => {
                let ca = site.running.shared.authority.cert();
                return signed.map(|signed| signed.open(ca).unwrap());
            }
            CollectorMessage::Received { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn marker(coordinator: MachineId, number: u64) -> Marker {
    Marker { coordinator, life: Life { since: 1_790_000_000_000, nonce: 3 }, number }
}

fn kept(group: &Group, marker: Marker, commit: CommitId) -> AgentMessage {
    let (kind, taken_at_ms) = (Kind::Crash, *TAKEN_MS);
    AgentMessage::Kept(Kept { group: group.id, epoch: group.epoch, marker, kind, commit, taken_at_ms })
}

fn report_of(group: &Group, marker: Marker, commit: CommitId) -> Report {
    let (kind, taken_at_ms) = (Kind::Crash, *TAKEN_MS);
    Report { group: group.id, epoch: group.epoch, marker, kind, commit, taken_at_ms }
}

async fn ping(agent: &mut Agent) {
    agent.send(AgentMessage::Ping(9)).await;
    loop {
        match agent.receiver.recv().await.unwrap() {
            CollectorMessage::Pong(9) => return,
            CollectorMessage::Group(_) | CollectorMessage::Received { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_told_of_their_group_and_of_each_change() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let mut first = site.member(&one, DiskId::new()).await;
    assert_eq!(told(&mut first, &site).await, None);
    let made = group(&site, "shop", &[&one, &two]).await;
    let roster = told(&mut first, &site).await.unwrap();
    assert_eq!((roster.group, roster.epoch, roster.name.as_str()), (made.id, 1, "shop"));
    assert_eq!(roster.members.len(), 2);
    assert_eq!((roster.hold_max_ms, roster.crash_every_ms), (5000, Some(300_000)));

    // Whoever comes later is told at once, the same.
    let mut second = site.member(&two, DiskId::new()).await;
    assert_eq!(told(&mut second, &site).await.unwrap(), roster);
    second.send(AgentMessage::Reachable(Reachable { host: None, port: 20004 })).await;
    let before = roster.order();
    let roster = told(&mut first, &site).await.unwrap();
    assert_eq!(roster.member(two.machine).unwrap().address.as_deref(), Some("127.0.0.1:20004"));
    assert!(roster.order() > before);
    told(&mut second, &site).await.unwrap();
    // Where nothing can be reached is passed over.
    second.send(AgentMessage::Reachable(Reachable { host: Some("a\nb".to_owned()), port: 1 })).await;
    ping(&mut second).await;

    let vault = site.vault().await;
    highwater_collector::certificates::revoke(&vault, two.machine, None).await.unwrap();
    let roster = told(&mut first, &site).await.unwrap();
    assert_eq!(roster.member(two.machine).unwrap().generation_min, 1);

    let alone = Group { members: vec![two.machine], ..made.clone() };
    vault.change_groups(|_| Ok(alone.clone())).await.unwrap();
    assert_eq!(told(&mut first, &site).await, None);
    let gone = Group { deleted: true, ..alone };
    vault.change_groups(|_| Ok(gone.clone())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_all_members_keep_is_a_point_and_nothing_else_is() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one, &two]).await;
    let disks = [DiskId::new(), DiskId::new()];
    let (mut first, mut second) = (site.member(&one, disks[0]).await, site.member(&two, disks[1]).await);
    let commits = [first.deliver(disks[0], 1, &[1]).await, second.deliver(disks[1], 1, &[2]).await];
    let (whole, half) = (marker(one.machine, 1), marker(one.machine, 2));
    first.send(kept(&made, whole, commits[0])).await;
    ping(&mut first).await;
    let vault = site.vault().await;
    assert!(vault.group_points(made.id).await.unwrap().is_empty());
    second.send(kept(&made, whole, commits[1])).await;
    ping(&mut second).await;
    let points = vault.group_points(made.id).await.unwrap();
    assert_eq!((points.len(), points[0].marker), (1, whole));

    let more = first.deliver(disks[0], 2, &[3]).await;
    first.send(kept(&made, half, more)).await;
    second.send(AgentMessage::Withdrawn { group: made.id, marker: half }).await;
    ping(&mut first).await;
    ping(&mut second).await;
    assert_eq!(vault.group_points(made.id).await.unwrap(), points);
    let metrics = site.metrics().await;
    for line in [
        "highwater_collector_group_points_total{group=\"shop\"} 1",
        "highwater_collector_group_markers_revoked_total{group=\"shop\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    assert!(metrics.contains("group_rpo_age_seconds{group=\"shop\"}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_is_wanted_is_asked_for_and_answered() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one, &two]).await;
    let vault = site.vault().await;
    let mut agent = site.member(&two, DiskId::new()).await;
    told(&mut agent, &site).await;
    // One that cannot be read stops no other.
    let damaged = vault.ask_point(Of::Machine(one.machine), true, SOON).await.unwrap();
    std::fs::write(site.vault_dir().join(format!("control/point-requests/{damaged}")), [7; 100]).unwrap();
    let id = vault.ask_point(Of::Group(made.id), true, SOON).await.unwrap();
    let (request, group, application) = wanted(&mut agent).await;
    assert_eq!((group, application), (Some(made.id), true));
    assert_eq!(vault.request_taken(id).await.unwrap().unwrap().machine, Some(two.machine));
    let kept = marker(two.machine, 5);
    agent.send(AgentMessage::Answer { request, answer: PointAnswer::Marker(kept) }).await;
    assert_eq!(answer(&site, id).await, Answer::Marker(kept));

    // Who goes before he answers has failed.
    let id = vault.ask_point(Of::Machine(two.machine), false, SOON).await.unwrap();
    let (_, group, application) = wanted(&mut agent).await;
    assert_eq!((group, application), (None, false));
    drop(agent);
    let Answer::Failed { code, .. } = answer(&site, id).await else { panic!() };
    assert_eq!(code.0, 1374);
}

async fn wanted(agent: &mut Agent) -> (u64, Option<GroupId>, bool) {
    loop {
        match tokio::time::timeout(SOON, agent.receiver.recv()).await.expect("nobody asks").unwrap() {
            CollectorMessage::PointWanted { request, group, application } => {
                return (request, group, application);
            }
            CollectorMessage::Group(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn answer(site: &Site, id: highwater_vault::groups::RequestId) -> Answer {
    let vault = site.vault().await;
    for _ in 0..100 {
        if let Some(answer) = vault.request_answer(id).await.unwrap() {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("there is no answer");
}

/// The refusal that ends a session to which this was said.
async fn refused(agent: &mut Agent) -> u16 {
    agent.refusal().await.code
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_so_is_passed_over() {
    let site = Site::new().await;
    let (one, two, three) = (site.machine().await, site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one, &two]).await;
    let other = group(&site, "other", &[&three]).await;
    let disks = [DiskId::new(), DiskId::new()];
    let (mut first, mut third) = (site.member(&one, disks[0]).await, site.member(&three, disks[1]).await);
    let good = first.deliver(disks[0], 1, &[1]).await;
    for _ in 0..4 {
        third.deliver(disks[1], 1, &[1]).await;
    }
    // Of a foreign group, with a commit that only another machine has, and of an epoch that there was not.
    third.send(kept(&made, marker(one.machine, 1), good)).await;
    third.send(AgentMessage::Withdrawn { group: made.id, marker: marker(one.machine, 1) }).await;
    first.send(kept(&other, marker(three.machine, 1), good)).await;
    first.send(kept(&made, marker(one.machine, 1), CommitId(4))).await;
    first.send(kept(&Group { epoch: 9, ..made.clone() }, marker(one.machine, 1), good)).await;
    first.send(AgentMessage::Answer { request: 77, answer: PointAnswer::Point(good) }).await;
    ping(&mut first).await;
    ping(&mut third).await;
    let vault = site.vault().await;
    for folder in ["group-kept", "group-points", "group-addresses"] {
        assert!(vault.control_list(folder).await.unwrap().is_empty(), "{folder}");
    }
    let refusals = "highwater_collector_group_words_passed_over_total{code=\"HW-1370\"} 5";
    let metrics = site.metrics().await;
    assert!(metrics.lines().any(|line| line == refusals), "{metrics}");
    // One point of the machine is one of the group, and not two.
    third.send(kept(&other, marker(three.machine, 1), CommitId(4))).await;
    third.send(kept(&other, marker(three.machine, 2), CommitId(4))).await;
    ping(&mut third).await;
    assert_eq!(vault.group_points(other.id).await.unwrap().len(), 1);
}

/// How many words of machines were passed over, for this reason.
async fn passed_over(site: &Site, code: &str) -> u64 {
    let begin = format!("highwater_collector_group_words_passed_over_total{{code=\"{code}\"}} ");
    let metrics = site.metrics().await;
    metrics.lines().find_map(|line| line.strip_prefix(&begin)).map_or(0, |number| number.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_know_of_groups_is_sent_away() {
    let site = Site::new().await;
    let mut before = site.agent(&site.machine().await, DiskId::new()).await;
    before.send(AgentMessage::Reachable(Reachable { host: None, port: 1 })).await;
    assert_eq!(refused(&mut before).await, 1311);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_beyond_the_allowance_is_passed_over_and_replication_goes_on() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one]).await;
    let other = group(&site, "other", &[&two]).await;
    let vault = site.vault().await;

    let disk = disk_of(&one);
    let mut flood = site.member(&one, disk).await;
    let commit = flood.deliver(disk, 1, &[1]).await;
    for number in 1..=600 {
        flood.send(kept(&made, marker(one.machine, number), commit)).await;
    }
    ping(&mut flood).await;
    let over = passed_over(&site, "HW-1329").await;
    assert!((100..=300).contains(&over), "{over}");
    assert_eq!(vault.group_points(made.id).await.unwrap().len(), 1);
    flood.deliver(disk, 2, &[2]).await;

    let disk = disk_of(&two);
    let mut flood = site.member(&two, disk).await;
    for number in 1..=100 {
        flood.send(AgentMessage::Withdrawn { group: other.id, marker: marker(two.machine, number) }).await;
    }
    ping(&mut flood).await;
    let revoked = vault.control_list(&format!("group-points/{}", other.id)).await.unwrap();
    assert!((60..=70).contains(&revoked.len()), "{}", revoked.len());
    assert_eq!(passed_over(&site, "HW-1329").await - over, 100 - revoked.len() as u64);
    flood.deliver(disk, 1, &[1]).await;
}

/// The group's own document cannot be read, nor what another marker came to: replication goes on, and so do other groups.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_vault_does_not_take_is_passed_over() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let (disk, made) = (disk_of(&one), group(&site, "shop", &[&one]).await);
    let mut agent = site.member(&one, disk).await;
    let (first, second) = (marker(one.machine, 1), marker(one.machine, 2));
    let commit = agent.deliver(disk, 1, &[1]).await;
    agent.send(kept(&made, first, commit)).await;
    ping(&mut agent).await;
    let damage =
        |name: String| std::fs::write(site.vault_dir().join("control").join(name), [7; 100]).unwrap();
    damage(format!("group-points/{}/{first}", made.id));
    let state = site.vault().await.machine(one.machine).await.unwrap();
    assert!(site.vault().await.keep_marker(&state, report_of(&made, first, commit)).await.is_err());
    let commit = agent.deliver(disk, 2, &[2]).await;
    agent.send(kept(&made, second, commit)).await;
    ping(&mut agent).await;
    let points = site.vault().await.group_points(made.id).await.unwrap();
    assert_eq!(points.iter().map(|point| point.marker).collect::<Vec<_>>(), [second]);

    group(&site, "other", &[&two]).await;
    damage("groups/00000002".to_owned());
    let of_next = Group { epoch: 2, ..made.clone() };
    agent.send(kept(&of_next, marker(one.machine, 3), commit)).await;
    ping(&mut agent).await;
    assert_eq!(passed_over(&site, "HW-1206").await, 1);
    agent.deliver(disk, 3, &[3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn markers_that_fail_are_counted_and_a_group_without_points_has_an_age() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one, &two]).await;
    let mut agent = site.member(&one, disk_of(&one)).await;
    // The collector may not have read yet what groups there are.
    while told(&mut agent, &site).await.is_none() {}
    let ended = |number, coordinator, failed: Option<&str>| AgentMessage::MarkerEnded {
        group: made.id,
        marker: marker(coordinator, number),
        kind: Kind::Crash,
        failed: failed.map(str::to_owned),
    };
    for number in 1..=6 {
        agent.send(ended(number, one.machine, Some("db-1 is not connected"))).await;
    }
    // Of another's nobody says anything.
    agent.send(ended(7, two.machine, None)).await;
    ping(&mut agent).await;
    let failures = &site.running.shared.failures;
    let row = failures.last(made.id, Kind::Crash).unwrap();
    assert_eq!((row.count, row.why.as_str()), (6, "db-1 is not connected"));
    agent.send(ended(8, one.machine, None)).await;
    ping(&mut agent).await;
    assert_eq!(failures.last(made.id, Kind::Crash), None);
    highwater_collector::groups::markers::sweep(&site.running.shared, false, &mut Default::default())
        .await
        .unwrap();
    let metrics = site.metrics().await;
    let failed = "highwater_collector_group_markers_failed_total{group=\"shop\"} 6";
    assert!(metrics.lines().any(|line| line == failed), "{metrics}");
    let age = "highwater_collector_group_rpo_age_seconds{group=\"shop\"} ";
    let age: f64 = metrics.lines().find_map(|line| line.strip_prefix(age)).unwrap().parse().unwrap();
    assert!((0.0..120.0).contains(&age), "{age}");
}

/// With a point each second a coordinator says of each that it keeps it, that it came to nothing, and that it has ended.
#[tokio::test(flavor = "multi_thread")]
async fn the_allowance_is_enough_for_a_marker_each_second() {
    let site = Site::new().await;
    let one = site.machine().await;
    let shared = &site.running.shared;
    let _member = site.member(&one, DiskId::new()).await;
    let begun = tokio::time::Instant::now();
    while shared.allow_word(one.machine).is_ok() {}
    tokio::time::sleep(Duration::from_secs(2)).await;
    let seconds = begun.elapsed().as_secs();
    let more = (0..100).take_while(|_| shared.allow_word(one.machine).is_ok()).count() as u64;
    assert!((3 * seconds..=5 * (seconds + 1)).contains(&more), "{more} in {seconds} s");
}

fn disk_of(identity: &Identity) -> DiskId {
    DiskId::from_bytes(*identity.machine.as_bytes())
}

/// A collector that starts anew decides what the one before it did not.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_decided_by_the_next_collector() {
    let site = Site::new().await;
    let (one, two) = (site.machine().await, site.machine().await);
    let made = group(&site, "shop", &[&one, &two]).await;
    let (first, second) = (DiskId::new(), DiskId::new());
    let commits = [
        site.member(&one, first).await.deliver(first, 1, &[1]).await,
        site.member(&two, second).await.deliver(second, 1, &[1]).await,
    ];
    let (vault, kept) = (site.vault().await, marker(one.machine, 1));
    for (identity, commit) in [(&one, commits[0]), (&two, commits[1])] {
        let state = vault.machine(identity.machine).await.unwrap();
        let report = report_of(&made, kept, commit);
        if identity.machine == one.machine {
            vault.keep_marker(&state, report).await.unwrap();
        } else {
            // As one does that dies behind its first step: the report is there, and that is all.
            let reports = vault.control_list("group-kept").await.unwrap();
            let text = vault.control_get(&reports[0]).await.unwrap().unwrap();
            let text = String::from_utf8(text.to_vec()).unwrap();
            let text = text.replace(&format!("\"commit\":{}", commits[0]), &format!("\"commit\":{commit}"));
            let name = format!("group-kept/{}/{kept}.{}", made.id, two.machine);
            assert!(vault.control_create(&name, text.as_bytes()).await.unwrap());
        }
    }
    assert!(vault.group_points(made.id).await.unwrap().is_empty());
    let config = site.running.shared.config.clone();
    let Site { running, dir } = site;
    running.shutdown().await;
    let again = highwater_collector::Collector::start(config).await.unwrap();
    for _ in 0..100 {
        if !vault.group_points(made.id).await.unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let points = vault.group_points(made.id).await.unwrap();
    assert_eq!((points.len(), points[0].done.members.len()), (1, 2));
    again.shutdown().await;
    drop(dir);
}
