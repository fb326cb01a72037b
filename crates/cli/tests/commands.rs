//! The command against vaults made here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod console;

use console::{Outcome, Typed, call};
use highwater_cli::{Console, Exit, run};
use highwater_delta::*;
use highwater_vault::{DiskRecord, Vault, VaultKey, local_store};
use serde_json::Value;
use std::path::{Path, PathBuf};

const B: usize = BLOCK_BYTES;

struct Place {
    dir: tempfile::TempDir,
    machine: MachineId,
}
fn disk(n: u8) -> DiskId {
    DiskId::from_bytes([n; 16])
}

/// A vault with one machine `web-1`: disks `sda` and `vg0/data`, points 1 and 3, and a partial commit 2.
fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let machine = MachineId::from_bytes([0xab; 16]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let key = VaultKey::generate().unwrap();
        key.save(&dir.path().join("key")).unwrap();
        let vault = Vault::create(local_store(&dir.path().join("vault")).unwrap(), &key).await.unwrap();
        vault.register_machine(machine, "web-1").await.unwrap();
        vault.register_machine(MachineId::from_bytes([0xac; 16]), "db-1").await.unwrap();
        let mut writer = vault.writer(machine).await.unwrap();
        let hash = writer.hash_key();
        let size_bytes = 100 * B as u64;
        let record = |n, name: &str| DiskRecord { disk: disk(n), name: name.into(), size_bytes };
        writer.set_disks(vec![record(1, "sda"), record(2, "vg0/data")]).unwrap();
        for round in 1..=3_u8 {
            writer.begin(DeltaId::new()).await.unwrap();
            for n in [1, 2] {
                let extent = Extent { start: Block(u64::from(round)), count: 1, fill: Fill::Data };
                let mut out = Vec::new();
                encode_chunk(disk(n), &[extent], &[round * 16 + n; B], &hash, 1, &mut out).unwrap();
                writer.push(out.into()).await.unwrap();
            }
            let disks = [1, 2].map(|n| PointDisk { disk: disk(n), size_bytes }).to_vec();
            let consistency = Consistency::Filesystem;
            let info = PointInfo { consistency, taken_at_ms: 1_795_195_703_000, freeze_us: 1500, disks };
            let kind = if round == 2 { CommitKind::Partial } else { CommitKind::Point(info) };
            writer.commit(kind).await.unwrap();
        }
    });
    Place { dir, machine }
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn run(&self, args: &[&str]) -> Outcome {
        let vault = self.path("vault").display().to_string();
        let key = self.path("key").display().to_string();
        let mut all = vec!["highwater", "--vault", &vault, "--key", &key];
        all.extend(args);
        bare(&all, "")
    }
}

/// With lines typed, which are secrets where one is asked for.
fn bare(args: &[&str], typed: &str) -> Outcome {
    let secrets: Vec<&str> = typed.lines().collect();
    call(args, Typed { lines: typed, secrets: &secrets, ..Typed::default() })
}

fn expected(disk: u8, rounds: u8) -> Vec<u8> {
    let mut image = vec![0; 100 * B];
    for round in 1..=rounds {
        image[usize::from(round) * B..][..B].fill(round * 16 + disk);
    }
    image
}

#[test]
fn machines_and_points_are_listed() {
    let place = place();
    let text = place.run(&["machines"]);
    assert_eq!(text.exit, Exit::Success, "{}", text.err);
    assert!(text.out.contains("web-1") && text.out.contains("db-1") && text.out.starts_with("MACHINE"));
    let json = place.run(&["machines", "--json"]).json();
    assert_eq!(json["machines"][0]["host-name"], "web-1");
    assert_eq!(json["machines"][0]["points"], 2);
    assert_eq!(json["machines"][1]["latest-point"], Value::Null);

    let json = place.run(&["points", "web-1", "--json"]).json();
    let points = json["points"].as_array().unwrap();
    assert_eq!(points.iter().map(|p| p["point"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(points[1]["taken-at"], "2026-11-20T17:28:23Z");
    assert_eq!(points[1]["consistency"], "filesystem");
    assert_eq!(points[1]["disks"][1]["name"], "vg0/data");
    let text = place.run(&["points", "abab"]);
    assert!(text.out.contains("vg0/data") && text.out.contains("1.5 ms"), "{}", text.out);
}

#[test]
fn machines_are_found_by_id_begin_or_host_name_and_never_guessed() {
    let place = place();
    let id = place.machine.to_string();
    for name in [&id, "abab", "ABAB", "web-1"] {
        assert_eq!(place.run(&["points", name]).exit, Exit::Success, "{name}");
    }
    for name in ["a", "web", "", "00000000-0000-0000-0000-000000000000"] {
        let outcome = place.run(&["points", name, "--json"]);
        assert_eq!(outcome.exit, Exit::Failure, "{name}");
        assert_eq!(outcome.json()["error"]["code"], "HW-1505", "{name}");
    }
}

#[test]
fn points_are_recovered_to_files() {
    let place = place();
    for (point, rounds) in [("1", 1), ("3", 3), ("latest", 3)] {
        let to = place.path(&format!("out-{point}/deep"));
        let args = ["recover", "web-1", "--point", point, "--to", to.to_str().unwrap(), "--threads", "3"];
        let outcome = place.run(&args);
        assert_eq!(outcome.exit, Exit::Success, "{}", outcome.err);
        assert!(std::fs::read(to.join("sda.img")).unwrap() == expected(1, rounds));
        assert!(std::fs::read(to.join("vg0_data.img")).unwrap() == expected(2, rounds));
        let number = if point == "1" { 1 } else { 3 };
        let report = std::fs::read(to.join(format!("recovery-point-{number}.json"))).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["point"]["point"], number);
        assert!(outcome.err.contains("filesystem-consistent"), "the plan is shown: {}", outcome.err);

        // Again: refused, nothing touched.
        let again = place.run(&[&args[..], &["--json"]].concat());
        assert_eq!(again.json()["error"]["code"], "HW-1217");
        assert_eq!(std::fs::read_dir(&to).unwrap().count(), 3);
    }
    let to = place.path("one");
    let args = ["recover", "web-1", "--point", "3", "--disk", "vg0/data", "--to", to.to_str().unwrap()];
    let json = place.run(&[&args[..], &["--json"]].concat()).json();
    assert_eq!(json["disks"].as_array().unwrap().len(), 1);
    assert_eq!(json["disks"][0]["written-bytes"], 3 * B);
    assert!(!to.join("sda.img").exists());
}

#[test]
fn partial_commits_and_wrong_disks_are_refused() {
    let place = place();
    let to = place.path("out");
    let to = to.to_str().unwrap();
    let code = |args: &[&str]| place.run(args).json()["error"]["code"].clone();
    assert_eq!(code(&["recover", "web-1", "--point", "2", "--to", to, "--json"]), "HW-1216");
    assert_eq!(code(&["recover", "db-1", "--point", "latest", "--to", to, "--json"]), "HW-1507");
    let args = ["recover", "web-1", "--point", "3", "--disk", "sdz", "--to", to, "--json"];
    assert_eq!(code(&args), "HW-1506");
    assert!(!Path::new(to).exists(), "a refused recovery makes nothing");
    assert_eq!(code(&["recover", "web-1", "--point", "x", "--to", to, "--json"]), "HW-1501");
    let file = place.path("file");
    std::fs::write(&file, "precious").unwrap();
    let args = ["recover", "web-1", "--point", "3", "--to", file.to_str().unwrap(), "--json", "--yes"];
    assert_eq!(code(&args), "HW-1217");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn recover_has_what_can_be_read() {
    let place = place();
    let segments = place.path(&format!("vault/machines/{}/segments", place.machine));
    let mut all: Vec<_> = std::fs::read_dir(segments).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    let mut bytes = std::fs::read(&all[0]).unwrap();
    // In the first chunk, which is of the first disk.
    bytes[100] ^= 4;
    std::fs::write(&all[0], bytes).unwrap();

    // The other disk is recovered all the same.
    let to = place.path("others");
    let args = ["recover", "web-1", "--point", "3", "--to", to.to_str().unwrap()];
    let outcome = place.run(&args);
    assert_eq!(outcome.exit, Exit::Damaged, "{}", outcome.err);
    assert!(outcome.err.contains("sda is NOT recovered: HW-1206"), "{}", outcome.err);
    assert!(outcome.err.contains("--skip-damaged"), "{}", outcome.err);
    assert!(
        std::fs::read(to.join("vg0_data.img")).unwrap() == expected(2, 3) && !to.join("sda.img").exists()
    );

    // And what can be read of this one.
    let to = place.path("rest");
    let args = ["recover", "web-1", "--point", "3", "--skip-damaged", "--json", "--to", to.to_str().unwrap()];
    let outcome = place.run(&args);
    assert_eq!(outcome.exit, Exit::Damaged, "{}", outcome.err);
    let told = outcome.json();
    let damaged = to.join("sda.img.damaged");
    assert_eq!(told["disks"][0]["target"], damaged.to_str().unwrap());
    let lacking = serde_json::json!([{ "offset": B, "bytes": B }]);
    assert_eq!(
        (&told["disks"][0]["lacking"]["bytes"], &told["disks"][0]["lacking"]["ranges"]),
        (&B.into(), &lacking)
    );
    assert_eq!((&told["disks"][1]["lacking"]["bytes"], &told["failed"]), (&0.into(), &serde_json::json!([])));
    let mut rest = expected(1, 3);
    rest[B..2 * B].fill(0);
    assert!(std::fs::read(damaged).unwrap() == rest && !to.join("sda.img").exists());
    assert!(std::fs::read(to.join("vg0_data.img")).unwrap() == expected(2, 3));
    let text =
        place.run(&["recover", "web-1", "--point", "3", "--skip-damaged", "--to", to.to_str().unwrap()]);
    assert!(text.err.contains("it exists already"), "{}", text.err);
    let to = place.path("text");
    let to = to.to_str().unwrap();
    let one =
        |disk| place.run(&["recover", "web-1", "--point", "3", "--skip-damaged", "--disk", disk, "--to", to]);
    let text = one("sda");
    // A later report takes no other's place.
    assert_eq!(one("vg0/data").exit, Exit::Success);
    for report in ["recovery-point-3.json", "recovery-point-3-2.json"] {
        assert!(Path::new(to).join(report).is_file(), "{report}");
    }
    assert!(
        text.out.contains("4.00 KiB of it LACK") && text.out.contains("4096 bytes from 4096"),
        "{}",
        text.out
    );
}

#[test]
fn what_was_recorded_before_damage_is_recovered() {
    let place = place();
    // Of three commits the last is a point; its record is cut off.
    let manifest = place.path(&format!("vault/machines/{}/manifest", place.machine));
    let mut all: Vec<_> = std::fs::read_dir(manifest).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    let last = all.last().unwrap();
    let bytes = std::fs::read(last).unwrap();
    std::fs::write(last, &bytes[..bytes.len() - 1]).unwrap();

    let listed = place.run(&["points", "web-1"]);
    assert_eq!(listed.exit, Exit::Damaged, "{}", listed.out);
    assert!(listed.err.contains("NOTHING is known") && listed.out.contains("vg0/data"), "{}", listed.err);
    let json = place.run(&["points", "web-1", "--json"]).json();
    assert_eq!((json["points"].as_array().unwrap().len(), &json["damage"]["code"]), (1, &"HW-1206".into()));

    let to = place.path("out");
    let args = ["recover", "web-1", "--point", "latest", "--to", to.to_str().unwrap()];
    let refused = place.run(&args);
    assert_eq!(refused.exit, Exit::Damaged);
    assert!(refused.err.contains("--skip-damaged") && !to.exists(), "{}", refused.err);
    let outcome = place.run(&[&args[..], &["--skip-damaged", "--json"]].concat());
    assert_eq!(outcome.exit, Exit::Damaged, "{}", outcome.err);
    let told = outcome.json();
    assert_eq!((&told["point"]["point"], &told["damage"]["code"]), (&1.into(), &"HW-1206".into()));
    assert!(std::fs::read(to.join("sda.img")).unwrap() == expected(1, 1));

    // The other machine is planned and maintained all the same.
    let plan = place.run(&["vault", "plan"]);
    assert_eq!(plan.exit, Exit::Failure);
    assert!(plan.out.contains("db-1") && plan.err.contains("HW-1510"), "{} {}", plan.out, plan.err);
    let done = place.run(&["vault", "maintain", "--yes", "--json"]).json();
    let machines = done["machines"].as_array().unwrap();
    assert!(machines.iter().any(|one| one["error"]["code"] == "HW-1206"), "{done}");
    assert!(machines.iter().any(|one| one["report"].is_object()), "{done}");
    // Of a record nothing is made anew, and that is said.
    let repair = place.run(&["vault", "repair", "--dry-run", "--json"]);
    assert_eq!((repair.exit, &repair.json()["problems"][0]["code"]), (Exit::Damaged, &"HW-1206".into()));
}

#[test]
fn verify_finds_damage_and_recover_leaves_no_half_file() {
    let place = place();
    assert_eq!(place.run(&["verify"]).exit, Exit::Success);
    let clean = place.run(&["verify", "web-1", "--json"]).json();
    assert_eq!((&clean["clean"], &clean["report"]["points"]), (&Value::Bool(true), &Value::from(2)));

    let segments = place.path(&format!("vault/machines/{}/segments", place.machine));
    let mut all: Vec<_> = std::fs::read_dir(segments).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    let mut bytes = std::fs::read(&all[0]).unwrap();
    bytes[100] ^= 4;
    std::fs::write(&all[0], bytes).unwrap();
    let outcome = place.run(&["verify", "--json"]);
    assert_eq!(outcome.exit, Exit::Damaged);
    assert_eq!(outcome.json()["report"]["problems"][0]["code"], "HW-1206");
    let text = place.run(&["verify"]);
    assert!(text.out.contains("DAMAGED HW-1206"), "{}", text.out);

    let to = place.path("out");
    let args = ["recover", "web-1", "--point", "1", "--disk", "sda", "--to", to.to_str().unwrap()];
    let refused = |code: &str| {
        let outcome = place.run(&args);
        assert_eq!(outcome.exit, Exit::Damaged);
        assert!(outcome.err.contains(code), "{}", outcome.err);
        assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
    };
    refused("HW-1206");
    let bytes = std::fs::read(&all[0]).unwrap();
    for len in [0, 10, 100, bytes.len() - 70, bytes.len() - 1] {
        std::fs::write(&all[0], &bytes[..len]).unwrap();
        assert_eq!(place.run(&["verify"]).exit, Exit::Damaged, "{len}");
        refused("HW-1206");
    }
    std::fs::remove_file(&all[0]).unwrap();
    assert_eq!(place.run(&["verify"]).exit, Exit::Damaged);
    refused("HW-1207");
}

#[test]
fn a_verification_can_be_sampled_and_gone_on_with() {
    let place = place();
    let file = place.path("state");
    let file = file.to_str().unwrap();
    let whole = place.run(&["vault", "verify", "--json", "--resume", file, "--rate", "1GiB"]);
    assert_eq!((whole.exit, &whole.json()["sample"]), (Exit::Success, &Value::Null));
    assert!(!Path::new(file).exists(), "nothing is left to go on with");
    let sampled = place.run(&["verify", "--sample", "50"]);
    assert!(sampled.err.contains("--sample 50 --seed "), "{}", sampled.err);
    assert!(sampled.out.contains("were not read"), "{}", sampled.out);
    let by_seed = |seed: &str| {
        let report = place.run(&["verify", "--sample", "50", "--seed", seed, "--json"]).json();
        assert_eq!(report["sample"]["seed"].to_string(), seed);
        report["report"]["segments"].as_u64().unwrap()
    };
    // Ids are random: so many draw the same once in a million million runs.
    let read: Vec<u64> = (1..=40).map(|seed: u32| by_seed(&seed.to_string())).collect();
    assert!(read.iter().any(|n| *n != read[0]), "{read:?}");
    assert_eq!(place.run(&["verify", "--sample", "0"]).exit, Exit::Usage);
    assert_eq!(place.run(&["verify", "--seed", "1"]).exit, Exit::Usage);
    std::fs::write(file, "{}").unwrap();
    let garbled = place.run(&["verify", "--json", "--resume", file]);
    assert_eq!((garbled.exit, &garbled.json()["error"]["code"]), (Exit::Failure, &"HW-1250".into()));
    assert_eq!(std::fs::read(file).unwrap(), b"{}", "what is not understood is not deleted");
}

#[test]
fn a_repair_shows_its_plan_and_what_is_lost() {
    let place = place();
    assert_eq!(place.run(&["vault", "repair"]).exit, Exit::Success, "nothing to do is not asked about");
    let segments = place.path(&format!("vault/machines/{}/segments", place.machine));
    let mut all: Vec<_> = std::fs::read_dir(&segments).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    let stray = segments.join(format!("{}.seg", SegmentId::from_bytes([1; 16])));
    std::fs::write(&stray, "nobody's").unwrap();
    // Its index, and another's content.
    for (segment, from_end) in [(&all[0], true), (&all[1], false)] {
        let mut bytes = std::fs::read(segment).unwrap();
        let at = if from_end { bytes.len() - 100 } else { 100 };
        bytes[at] ^= 1;
        std::fs::write(segment, bytes).unwrap();
    }
    let asked = place.run(&["vault", "repair", "--grace", "0s"]);
    assert_eq!(asked.exit, Exit::NotConfirmed, "{}", asked.err);
    assert!(
        asked.out.contains("2 stretches are made anew") && asked.out.contains("1 object that"),
        "{}",
        asked.out
    );
    let shown = place.run(&["vault", "repair", "--grace", "0s", "--dry-run", "--json"]);
    let plan = &shown.json()["machines"][0]["plan"];
    assert_eq!((shown.exit, &plan["strays"]), (Exit::Damaged, &Value::from(1)));
    assert_eq!(plan["losses"]["points"].as_array().unwrap().len(), 2);
    assert!(stray.exists());
    let kept = place.run(&["vault", "repair", "--yes", "--json"]).json();
    assert_eq!(kept["machines"][0]["report"]["deleted"], 0, "it is not old enough");
    let done = place.run(&["vault", "repair", "--grace", "0s", "--yes"]);
    assert_eq!(done.exit, Exit::Damaged, "{}", done.err);
    assert!(
        done.out.contains("LOST") && done.out.contains("1 point is whole; the newest is 1"),
        "{}",
        done.out
    );
    assert!(!stray.exists());
    let to = place.path("out");
    let recover =
        |point: &str| place.run(&["recover", "web-1", "--point", point, "--to", to.to_str().unwrap()]).exit;
    assert_eq!((recover("1"), recover("3")), (Exit::Success, Exit::Failure));
}

#[test]
fn vault_and_key_come_from_the_configuration_too() {
    let place = place();
    let config = place.path("collector.toml");
    let (vault, key) = (place.path("vault"), place.path("key"));
    let text = format!(
        "vault = \"file://{}\"\nkey-file = \"{}\"\n[ingest]\nlisten = \"[::]:9443\"\n",
        vault.display(),
        key.display()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    assert_eq!(bare(&["highwater", "machines", "--config", config], "").exit, Exit::Success);

    let none = bare(&["highwater", "machines", "--config", "/nonexistent", "--json"], "");
    assert_eq!((none.exit, &none.json()["error"]["code"]), (Exit::Failure, &"HW-1504".into()));
    std::fs::write(config, "vault = ").unwrap();
    assert_eq!(
        bare(&["highwater", "machines", "--config", config, "--json"], "").json()["error"]["code"],
        "HW-1504"
    );
    let other = place.path("other");
    VaultKey::generate().unwrap().save(&other).unwrap();
    let wrong = place.run(&["machines", "--json", "--key", other.to_str().unwrap()]);
    assert_eq!(wrong.json()["error"]["code"], "HW-1204", "the later of two --key counts");
    let none = place.path("none").display().to_string();
    for (vault, code) in [(none.as_str(), "HW-1503"), ("ftp://x", "HW-1224"), ("s3://x?secret=y", "HW-1224")]
    {
        let asked = ["highwater", "machines", "--json", "--vault", vault, "--key", key.to_str().unwrap()];
        assert_eq!(bare(&asked, "").json()["error"]["code"], code, "{vault}");
    }
}

#[test]
fn a_closed_pipe_is_success() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let place = place();
    let vault = place.path("vault").display().to_string();
    let key = place.path("key").display().to_string();
    for verb in ["machines", "verify", "man", "--help"] {
        let (mut err, mut input) = (Vec::new(), &b""[..]);
        let mut console = Console {
            out: &mut Closed,
            err: &mut err,
            input: &mut input,
            secrets: &mut |_| Err(std::io::ErrorKind::UnexpectedEof.into()),
            terminal: false,
            can_ask: false,
        };
        let args = ["highwater", "--vault", &vault, "--key", &key, verb];
        assert_eq!(run(args.iter().map(Into::into), &mut console), Exit::Success, "{verb}");
    }
}

#[test]
fn help_man_and_completions_are_there() {
    for (args, part) in [
        (&["highwater", "--help"][..], "recover"),
        (&["highwater", "man"], ".TH"),
        (&["highwater", "completions", "bash"], "complete -F"),
        (&["highwater", "completions", "zsh"], "#compdef"),
    ] {
        let outcome = bare(args, "");
        assert_eq!(outcome.exit, Exit::Success);
        assert!(outcome.out.contains(part), "{args:?}");
    }
    let outcome = bare(&["highwater", "frobnicate"], "");
    assert_eq!((outcome.exit, outcome.out.as_str()), (Exit::Usage, ""));
}

/// A loop device, detached when dropped.
struct Loop(String);
impl Loop {
    /// `None` where there are none (no root, a container): the test has nothing to work on then.
    fn over(file: &Path) -> Option<Self> {
        let made =
            std::process::Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        made.status.success().then(|| Self(String::from_utf8_lossy(&made.stdout).trim().to_owned()))
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_device_gets_what_differs_and_only_when_confirmed() {
    let place = place();
    let backing = place.path("backing");
    let mut before = vec![0x77; 120 * B];
    before[..100 * B].copy_from_slice(&expected(1, 1));
    before[50 * B] = 9;
    std::fs::write(&backing, &before).unwrap();
    let Some(device) = Loop::over(&backing) else {
        eprintln!("no loop devices here: not tested");
        return;
    };
    let args = ["recover", "web-1", "--point", "3", "--disk", "sda", "--to", &device.0];
    let refused = place.run(&args);
    assert_eq!(refused.exit, Exit::NotConfirmed);
    assert!(refused.err.contains("OVERWRITTEN where it differs"), "{}", refused.err);
    let vault = place.path("vault").display().to_string();
    let key = place.path("key").display().to_string();
    let whole: Vec<&str> = ["highwater", "--vault", &vault, "--key", &key].into_iter().chain(args).collect();
    assert_eq!(bare(&whole, "y\n").exit, Exit::NotConfirmed);
    assert!(std::fs::read(&backing).unwrap() == before, "untouched until confirmed");

    let json = place.run(&[&args[..], &["--yes", "--json"]].concat()).json();
    // Blocks 2 and 3 are new, block 50 goes back to zeros, block 1 is the same already.
    assert_eq!(json["disks"][0]["written-bytes"], 3 * B, "{json}");
    let after = std::fs::read(&backing).unwrap();
    assert!(after[..100 * B] == expected(1, 3)[..]);
    assert!(after[100 * B..].iter().all(|b| *b == 0x77), "what lies behind the disk is not touched");
    let typed = format!("{}\n", device.0);
    assert_eq!(bare(&whole, &typed).exit, Exit::Success);
    let all = place.run(&[&args[..], &["--yes", "--json", "--all-blocks"]].concat()).json();
    assert_eq!(all["disks"][0]["written-bytes"], 100 * B);

    let both = ["recover", "web-1", "--point", "3", "--to", &device.0, "--yes", "--json"];
    assert_eq!(place.run(&both).json()["error"]["code"], "HW-1506");
    let held = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(0o200)
        .open(&device.0)
        .expect("O_EXCL on a free device");
    assert_eq!(place.run(&[&args[..], &["--yes", "--json"]].concat()).json()["error"]["code"], "HW-1217");
    drop(held);
    drop(device);

    std::fs::write(&backing, vec![0; 99 * B]).unwrap();
    let small = Loop::over(&backing).unwrap();
    let args = ["recover", "web-1", "--point", "3", "--disk", "sda", "--to", &small.0, "--yes", "--json"];
    assert_eq!(place.run(&args).json()["error"]["code"], "HW-1217");
}

use std::os::unix::fs::OpenOptionsExt;

#[test]
fn a_device_that_is_not_there_does_not_become_a_file() {
    let place = place();
    for to in ["/dev/highwater-nope", "/dev/highwater-nope/deeper"] {
        let outcome = place.run(&["recover", "web-1", "--point", "latest", "--to", to, "--json"]);
        assert_eq!(outcome.json()["error"]["code"], "HW-1217", "{}", outcome.out);
        assert!(!Path::new(to).exists(), "{to} was made");
    }
    // Where this is a tmpfs, as systemd and containers have it, the plan says so.
    let memory = Path::new("/run");
    if highwater_vault::recover::directory_place(memory)
        .is_ok_and(|p| p == highwater_vault::recover::Place::Memory)
        && let Ok(dir) = tempfile::tempdir_in(memory)
    {
        let to = dir.path().join("to").display().to_string();
        let outcome = place.run(&["recover", "web-1", "--point", "latest", "--to", &to]);
        assert!(outcome.exit == Exit::Success && outcome.err.contains("IN MEMORY"), "{}", outcome.err);
    }
}

#[test]
fn help_and_the_manual_tell_of_subcommands() {
    assert!(bare(&["highwater", "help"], "").out.contains("recover"));
    let page = bare(&["highwater", "man"], "").out;
    assert!(page.contains("HIGHWATER RECOVER") && page.contains("all\\-blocks"), "{page}");
}

#[test]
fn points_expire_as_policies_say_and_held_ones_do_not() {
    let place = place();
    let shown = place.run(&["vault", "policy", "show"]);
    assert_eq!(shown.exit, Exit::Success);
    assert!(
        shown.out.contains("every point is kept for 2h") && shown.out.contains("one of each 4h for 15days")
    );
    let nothing = place.run(&["vault", "plan", "db-1"]);
    assert!(nothing.out.contains("nothing to do"), "{}", nothing.out);
    let plan = place.run(&["vault", "plan", "web-1"]);
    assert!(plan.out.contains("merged: 1 (with") && !plan.out.contains("expire"), "{}", plan.out);

    // A tier that is no coarser than the one before, and what is no time.
    let refused = place.run(&["vault", "policy", "set", "--keep-all", "2h", "--tier", "1h:1h", "--json"]);
    assert_eq!((refused.exit, refused.json()["error"]["code"].as_str().unwrap()), (Exit::Failure, "HW-1241"));
    assert_eq!(place.run(&["vault", "policy", "set", "--keep-all", "2 hours ago"]).exit, Exit::Usage);
    // What would go is said before.
    for more in [&[][..], &["web-1"]] {
        let asked = place.run(&[&["vault", "policy", "set", "--keep-all", "0s"], more].concat());
        assert!(asked.exit == Exit::NotConfirmed && asked.err.contains("1 recovery point"), "{}", asked.err);
    }
    let set = place.run(&["vault", "policy", "set", "web-1", "--keep-all", "0s", "--yes", "--json"]);
    assert_eq!(set.json()["own"], true, "{}", set.err);

    let held = place.run(&["vault", "hold", "web-1", "1", "--reason", "case 7"]);
    assert!(held.out.contains("legal hold"), "{} {}", held.out, held.err);
    assert!(place.run(&["points", "web-1"]).out.contains("legal hold"));
    assert!(place.run(&["vault", "policy", "show", "web-1"]).out.contains("case 7"));
    let plan = place.run(&["vault", "plan", "web-1", "--json"]).json();
    assert_eq!(plan["machines"][0]["plan"]["protected"], serde_json::json!([1]));
    assert_eq!(place.run(&["vault", "pin", "web-1", "2"]).exit, Exit::Failure, "a commit that is no point");
    let pinned = place.run(&["vault", "pin", "web-1", "1", "--json"]);
    assert_eq!(pinned.json()["error"]["code"].as_str().unwrap(), "HW-1243");
    let asked = place.run(&["vault", "release", "web-1", "1"]);
    assert!(asked.exit == Exit::NotConfirmed && asked.err.contains("legal hold"), "{}", asked.err);
    assert_eq!(place.run(&["vault", "release", "web-1", "1", "--yes"]).exit, Exit::Success);

    let plan = place.run(&["vault", "plan", "web-1"]);
    assert!(plan.out.contains("1 of 2 recovery points expire: 1"), "{}", plan.out);
    let asked = place.run(&["vault", "maintain", "web-1"]);
    assert_eq!(asked.exit, Exit::NotConfirmed);
    assert_eq!(place.run(&["points", "web-1", "--json"]).json()["points"].as_array().unwrap().len(), 2);
    let done = place.run(&["vault", "maintain", "web-1", "--yes", "--grace", "0s", "--json"]).json();
    assert_eq!(done["machines"][0]["report"]["expired"], 1, "{done}");
    assert_eq!(done["machines"][0]["report"]["merged-runs"], 3, "{done}");
    let swept = place.run(&["vault", "maintain", "--yes", "--grace", "0s"]);
    assert!(swept.out.contains("nothing was to be done") || swept.out.contains("deleted"), "{}", swept.out);
    assert_eq!(place.run(&["points", "web-1", "--json"]).json()["points"].as_array().unwrap().len(), 1);
    let report = place.run(&["verify", "--json"]).json();
    assert_eq!((&report["clean"], &report["report"]["maps"]), (&true.into(), &1.into()), "{report}");
    assert_eq!(report["report"]["orphans"], serde_json::json!([]));

    // What is left recovers as it was.
    let to = place.path("out");
    let args = ["recover", "web-1", "--point", "latest", "--disk", "sda", "--to", to.to_str().unwrap()];
    let recovered = place.run(&args);
    assert_eq!(recovered.exit, Exit::Success, "{}", recovered.err);
    let image = std::fs::read(to.join("sda.img")).unwrap();
    for round in 1..=3_usize {
        assert!(image[round * B..][..B].iter().all(|byte| usize::from(*byte) == round * 16 + 1), "{round}");
    }
}
