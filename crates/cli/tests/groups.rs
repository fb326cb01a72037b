//! `group`, `point create` and `recover --group` against vaults made here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod console;

use console::{Outcome, Typed, call};
use highwater_cli::Exit;
use highwater_delta::*;
use highwater_group::{Kind, Life, Marker};
use highwater_vault::groups::{Answer, Of, Report};
use highwater_vault::{DiskRecord, Vault, VaultKey, local_store};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

const B: usize = BLOCK_BYTES;
const TAKEN_AT: u64 = 1_795_195_703_000;

struct Place {
    dir: tempfile::TempDir,
    vault: Vault,
    runtime: tokio::runtime::Runtime,
}

fn machine(n: u8) -> MachineId {
    MachineId::from_bytes([n; 16])
}

/// Machines 1 to 3: `web-1`, `db-1` and `db-2`.
fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let vault = runtime.block_on(async {
        let key = VaultKey::generate().unwrap();
        key.save(&dir.path().join("key")).unwrap();
        let vault = Vault::create(local_store(&dir.path().join("vault")).unwrap(), &key).await.unwrap();
        for (n, name) in [(1, "web-1"), (2, "db-1"), (3, "db-2")] {
            vault.register_machine(machine(n), name).await.unwrap();
        }
        vault
    });
    Place { dir, vault, runtime }
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Outcome {
        self.typed(args, "")
    }

    fn typed(&self, args: &[&str], typed: &str) -> Outcome {
        let vault = self.path("vault").display().to_string();
        let key = self.path("key").display().to_string();
        let mut all = vec!["highwater", "--vault", &vault, "--key", &key, "--index", "none"];
        all.extend(args);
        call(&all, Typed { lines: typed, ..Typed::default() })
    }

    fn point(&self, n: u8, fill: u8) -> CommitId {
        self.runtime.block_on(point(&self.vault, n, fill))
    }

    fn keep(&self, group: &str, marker: Marker, n: u8, commit: CommitId) {
        self.runtime.block_on(keep(&self.vault, group.parse().unwrap(), marker, n, commit));
    }

    /// The name of a machine's report of a marker.
    fn report(&self, group: &str, number: u64, n: u8) -> String {
        format!("group-kept/{group}/{}.{}", marker(number), machine(n))
    }

    /// A group `shop` of machines 1 and 2; answers its id.
    fn shop(&self) -> String {
        let made =
            self.run(&["group", "create", "shop", "--machine", "web-1", "--machine", "db-1", "--json"]);
        made.good().json()["group"].as_str().unwrap().to_owned()
    }

    /// A point of it, with this content on each.
    fn whole(&self, group: &str, number: u64, fill: u8) -> Marker {
        let marker = marker(number);
        for n in [1, 2] {
            let commit = self.point(n, fill + n);
            self.keep(group, marker, n, commit);
        }
        marker
    }
}

async fn point(vault: &Vault, n: u8, fill: u8) -> CommitId {
    let mut writer = vault.writer(machine(n)).await.unwrap();
    let (disk, size_bytes) = (DiskId::from_bytes([n + 100; 16]), 4 * B as u64);
    writer.set_disks(vec![DiskRecord { disk, name: "vda".into(), size_bytes }]).unwrap();
    writer.begin(DeltaId::new()).await.unwrap();
    let extent = Extent { start: Block(1), count: 1, fill: Fill::Data };
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &[fill; B], &writer.hash_key(), 1, &mut out).unwrap();
    writer.push(out.into()).await.unwrap();
    let disks = vec![PointDisk { disk, size_bytes }];
    let info = PointInfo { consistency: Consistency::Filesystem, taken_at_ms: TAKEN_AT, freeze_us: 1, disks };
    writer.commit(CommitKind::Point(info)).await.unwrap()
}

async fn keep(vault: &Vault, group: GroupId, marker: Marker, n: u8, commit: CommitId) {
    let epoch = vault.groups().await.unwrap().get(group).unwrap().epoch;
    let report = Report { group, epoch, marker, kind: Kind::Crash, commit, taken_at_ms: TAKEN_AT };
    let state = vault.machine(machine(n)).await.unwrap();
    vault.keep_marker(&state, report).await.unwrap();
}

fn marker(number: u64) -> Marker {
    Marker { coordinator: machine(1), life: Life { since: 5, nonce: 6 }, number }
}

#[test]
fn groups_are_made_changed_shown_and_deleted() {
    let place = place();
    assert!(place.run(&["group", "list"]).good().out.contains("no groups"));
    let made = place.run(&[
        "group",
        "create",
        "shop",
        "--machine",
        "web-1",
        "--machine",
        "0202",
        "--crash-every",
        "never",
    ]);
    assert!(made.good().out.contains("port 20004"));
    let listed = place.run(&["group", "list", "--json"]).good().json();
    let shop = &listed["groups"][0];
    assert_eq!(
        (&shop["name"], &shop["epoch"], &shop["crash-every"]),
        (&"shop".into(), &1.into(), &Value::Null)
    );
    assert_eq!((&shop["application-every"], &shop["hold"]), (&"1h".into(), &"5s".into()));
    let id = shop["group"].as_str().unwrap().to_owned();

    let refused = place.run(&["group", "create", "other", "--machine", "db-1", "--json"]);
    assert_eq!((refused.exit, &refused.json()["error"]["code"]), (Exit::Failure, &"HW-1260".into()));
    place.run(&["group", "create", "other", "--machine", "db-2"]).good();
    assert_eq!(place.run(&["group", "show", "nothing", "--json"]).json()["error"]["code"], "HW-1516");
    let refused = place.run(&["group", "add", "shop", "db-2", "--json"]).json();
    assert_eq!(refused["error"]["code"], "HW-1260");
    place.run(&["group", "delete", "other", "--yes"]).good();
    let more = place.run(&["group", "add", "shop", "db-2", "web-1", "--json"]).good().json();
    assert_eq!((&more["epoch"], more["members"].as_array().unwrap().len()), (&2.into(), 3));
    assert!(place.run(&["group", "remove", "shop", "web-1"]).good().out.contains("points of its own"));
    assert_eq!(place.run(&["group", "remove", "shop", "web-1", "--json"]).json()["error"]["code"], "HW-1260");
    assert_eq!(
        place.run(&["group", "remove", "shop", "db-1", "db-2", "--json"]).json()["error"]["code"],
        "HW-1260"
    );
    // One that was erased can still be taken out.
    let erased = place.typed(&["vault", "erase-machine", "db-2"], "db-2\n").good();
    assert!(erased.err.contains("belongs to group shop"), "{}", erased.err);
    let more = place.run(&["group", "remove", "shop", &machine(3).to_string(), "--json"]).good().json();
    assert_eq!((&more["epoch"], more["members"].as_array().unwrap().len()), (&4.into(), 1));
    let set =
        ["group", "set", &id[..8], "--name", "store", "--crash-every", "15min", "--hold", "3s", "--json"];
    let set = place.run(&set).good().json();
    assert_eq!(
        (&set["name"], &set["epoch"], &set["crash-every"]),
        (&"store".into(), &4.into(), &"15m".into())
    );
    assert_eq!(
        place.run(&["group", "set", "store", "--hold", "2min", "--json"]).json()["error"]["code"],
        "HW-1260"
    );
    let text = place.run(&["group", "show", "store"]).good().out;
    assert!(
        text.contains("no point yet") && text.contains("db-1") && text.contains("not known yet"),
        "{text}"
    );

    assert_eq!(place.run(&["group", "delete", "store"]).exit, Exit::NotConfirmed);
    assert_eq!(place.typed(&["group", "delete", "store"], "shop\n").exit, Exit::NotConfirmed);
    place.typed(&["group", "delete", "store"], "store\n").good();
    assert!(place.run(&["group", "list"]).good().out.contains("no groups"));
    assert!(place.run(&["group", "show", &id]).good().out.contains("DELETED"));
}

#[test]
fn only_whole_points_are_listed_and_members_are_recovered_together() {
    let place = place();
    let id = place.shop();
    let first = place.whole(&id, 1, 10);
    let second = place.whole(&id, 2, 20);
    let half = place.point(1, 99);
    place.keep(&id, marker(3), 1, half);

    let points = place.run(&["group", "points", "shop", "--json"]).good().json();
    let names: Vec<&str> =
        points["points"].as_array().unwrap().iter().map(|p| p["point"].as_str().unwrap()).collect();
    assert_eq!(names, [second.to_string(), first.to_string()]);
    let show = place.run(&["group", "show", "shop", "--json"]).good().json();
    assert_eq!(
        (&show["points"], &show["waiting"][0]["missing"][0]),
        (&2.into(), &machine(2).to_string().into())
    );
    let text = place.run(&["group", "show", "shop"]).good().out;
    assert!(text.contains("is not offered before it is stored by db-1"), "{text}");
    // All have said so, and whoever was to decide died.
    let (name, other) = (place.report(&id, 3, 1), place.report(&id, 3, 2));
    let report = place.runtime.block_on(place.vault.control_get(&name)).unwrap().unwrap();
    assert!(place.runtime.block_on(place.vault.control_create(&other, &report)).unwrap());
    let text = place.run(&["group", "show", "shop"]).good().out;
    assert!(
        text.contains("is not offered yet: a collector has still to decide") && !text.contains("by ."),
        "{text}"
    );
    std::fs::remove_file(place.path("vault").join("control").join(&other)).unwrap();
    let own = place.run(&["points", "web-1", "--json"]).good().json();
    assert_eq!(own["points"][0]["group-point"]["point"], first.to_string());
    assert_eq!(own["points"][2]["group-point"], Value::Null);
    assert!(place.run(&["points", "web-1"]).good().out.contains("shop"));

    let to = place.path("all");
    let to_text = to.display().to_string();
    let done = place
        .run(&["recover", "--group", "shop", "--point", "latest", "--to", &to_text, "--json"])
        .good()
        .json();
    assert_eq!((done["machines"].as_array().unwrap().len(), &done["meaning"]), (2, &Value::Null));
    for (name, n) in [("web-1", 1), ("db-1", 2)] {
        let image = std::fs::read(to.join(name).join("vda.img")).unwrap();
        assert_eq!(image[B..2 * B], [20 + n; B]);
    }
    let to = place.path("some").display().to_string();
    let first = first.to_string();
    let done = place
        .run(&["recover", "--group", "shop", "--point", &first, "--machine", "db-1", "--to", &to])
        .good();
    assert!(done.out.contains("NOT recovered: web-1") && done.err.contains("may be missing"), "{}", done.out);
    assert_eq!(std::fs::read(place.path("some/db-1/vda.img")).unwrap()[B], 12);
    assert!(!place.path("some/web-1").exists());
    for (args, code) in [
        (vec!["--group", "shop", "--point", "3", "--to", "x"], "HW-1501"),
        (vec!["--group", "shop", "--point", "latest-application", "--to", "x"], "HW-1507"),
        (vec!["--group", "shop", "--point", "latest", "--machine", "db-2", "--to", "x"], "HW-1505"),
        (vec!["web-1", "--point", &first, "--to", "x"], "HW-1501"),
        (vec!["web-1", "--group", "shop", "--point", "latest", "--to", "x"], "HW-1501"),
        (vec!["--point", "latest", "--to", "x"], "HW-1501"),
    ] {
        let refused = place.run(&[&["recover", "--json"][..], &args].concat());
        assert_eq!(refused.json()["error"]["code"], code, "{args:?}");
    }
    // Its points are found by its id after it was deleted.
    place.run(&["group", "delete", "shop", "--yes"]).good();
    let points = place.run(&["group", "points", &id, "--json"]).good().json();
    assert_eq!(points["points"].as_array().unwrap().len(), 2);
}

/// Stands for the collectors: takes the next request, and answers it so.
fn answered(
    place: &Place,
    answer: impl FnOnce(Of) -> Answer + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    let vault = place.vault.clone();
    place.runtime.spawn(async move {
        loop {
            if let Some(id) = vault.point_requests().await.unwrap().pop()
                && vault.request_taken(id).await.unwrap().is_none()
            {
                let request = vault.point_request(id).await.unwrap().unwrap();
                assert!(vault.take_request(id, machine(1)).await.unwrap());
                vault.answer_request(id, &answer(request.of)).await.unwrap();
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
}

#[test]
fn a_point_is_made_and_every_end_of_it_is_told() {
    let place = place();
    let id = place.shop();
    let commits = [place.point(1, 1), place.point(2, 1)];
    let asked = answered(&place, move |of| {
        assert!(matches!(of, Of::Group(_)));
        Answer::Marker(marker(7))
    });
    // The second member's part comes later.
    place.keep(&id, marker(7), 1, commits[0]);
    let (vault, group) = (place.vault.clone(), id.parse().unwrap());
    let later = place.runtime.spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        keep(&vault, group, marker(7), 2, commits[1]).await;
    });
    let made = place.run(&["point", "create", "--crash", "--group", "shop"]).good();
    assert!(made.out.contains("2 members"), "{}", made.out);
    assert!(made.err.contains("waiting until it is stored by db-1"), "{}", made.err);
    place.runtime.block_on(async { (asked.await.unwrap(), later.await.unwrap()) });

    let commit = place.point(3, 5);
    let asked = answered(&place, move |_| Answer::Point(commit));
    let made = place.run(&["point", "create", "--application", "--machine", "db-2", "--json"]).good().json();
    assert_eq!(made["point"], commit.0);
    place.runtime.block_on(asked).unwrap();

    let cause = format!("{} could not freeze", machine(2));
    let asked = answered(&place, |_| Answer::Failed { code: Code(1498), cause, action: "look there".into() });
    let failed = place.run(&["point", "create", "--crash", "--group", "shop", "--json"]);
    let error = &failed.json()["error"];
    assert_eq!((&error["code"], &error["action"]), (&"HW-1498".into(), &"look there".into()));
    assert!(error["cause"].as_str().unwrap().contains("db-1 could not freeze"), "{error}");
    assert_eq!(failed.exit, Exit::Failure);
    place.runtime.block_on(asked).unwrap();

    let asked = answered(&place, |_| Answer::Marker(marker(8)));
    let late =
        place.run(&["point", "create", "--crash", "--group", "shop", "--timeout", "5s", "--json"]).json();
    assert_eq!(late["error"]["code"], "HW-1514");
    place.runtime.block_on(asked).unwrap();
    // Nobody takes it: it is taken back.
    let none =
        place.run(&["point", "create", "--crash", "--group", "shop", "--timeout", "5s", "--json"]).json();
    assert_eq!(none["error"]["code"], "HW-1512");
    let short = place.run(&["point", "create", "--crash", "--group", "shop", "--timeout", "1s", "--json"]);
    assert_eq!(short.json()["error"]["code"], "HW-1501");
    assert!(
        place.run(&["group", "set", "shop", "--json"]).json()["error"]["cause"]
            .as_str()
            .unwrap()
            .contains("--hold")
    );
    let set =
        place.run(&["group", "set", "shop", "--crash-every", "7s", "--application-every", "never"]).good();
    assert!(
        set.out.contains("Crash-consistent points: every 7s; application-consistent: none by themselves"),
        "{}",
        set.out
    );
    let taken = place.runtime.block_on(async {
        let last = place.vault.point_requests().await.unwrap().pop().unwrap();
        place.vault.request_taken(last).await.unwrap()
    });
    assert_eq!(taken.unwrap().machine, None);
}
