//! The ways to a vault's root key: each kind, wrong ones, damage, and two operators at once.

use super::support::*;
use crate::{
    KeyRing, KeySource, Result, Vault, VaultError, VaultKey,
    keys::{Cost, KeyCommand, Passphrase, Wrapping, WrappingId, WrappingKind},
    store,
};
use futures::TryStreamExt;
use highwater_delta::VaultId;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use std::{os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc};

/// So that a test tries many.
pub const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

pub fn phrase(text: &str) -> KeySource {
    KeySource::Passphrase(Passphrase::new(text.as_bytes()).unwrap())
}
pub async fn create(store: &Arc<dyn ObjectStore>, source: &KeySource) -> KeyRing {
    let root = VaultKey::generate().unwrap();
    KeyRing::create_costing(store.clone().into(), root, source, "first", CHEAP).await.unwrap().costing(CHEAP)
}
pub async fn open(store: &Arc<dyn ObjectStore>, source: &KeySource) -> Result<KeyRing> {
    Ok(KeyRing::open(store.clone(), source).await?.costing(CHEAP))
}
/// Names of all keys documents.
pub async fn documents(store: &Arc<dyn ObjectStore>) -> Vec<String> {
    let all: Vec<_> = store.list(Some(&Path::from("keys"))).try_collect().await.unwrap();
    let mut names: Vec<String> = all.into_iter().map(|meta| meta.location.to_string()).collect();
    names.sort();
    names
}

/// A key service of its own: what it wraps is the key with a secret added.
fn command(dir: &std::path::Path, body: &str) -> KeySource {
    let path = dir.join(format!("kms-{}", VaultId::new()));
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    // Executed while another thread forks, a file just written would be busy: a shell reads it instead.
    KeySource::Command(format!("/bin/sh {}", path.display()).parse::<KeyCommand>().unwrap())
}
const GOOD: &str = r#"case "$1" in wrap) printf 'blob:'; cat;; unwrap) cut -d: -f2; echo;; esac"#;

#[test]
fn every_kind_opens_the_vault_and_no_other_does() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("passphrase");
        std::fs::write(&text, "a long enough passphrase\n").unwrap();
        std::fs::set_permissions(&text, std::fs::Permissions::from_mode(0o600)).unwrap();
        let sources = [
            (KeySource::File(dir.path().join("first.key")), WrappingKind::KeyFile),
            (phrase("correct horse battery"), WrappingKind::Passphrase),
            (KeySource::PassphraseFile(text), WrappingKind::Passphrase),
            (command(dir.path(), GOOD), WrappingKind::KeyCommand),
            (KeySource::Root(key()), WrappingKind::RootKeyFile),
        ];
        for (source, kind) in &sources {
            let store = memory();
            let ring = create(&store, source).await;
            assert_eq!(ring.wrappings().iter().map(Wrapping::kind).collect::<Vec<_>>(), [*kind]);
            assert_eq!(ring.wrappings()[0].label, "first");
            ring.vault().unwrap().register_machine(machine(), "web-1").await.unwrap();
            if *kind == WrappingKind::RootKeyFile {
                continue;
            }
            let again = open(&store, source).await.unwrap();
            assert_eq!((again.id(), again.number()), (ring.id(), 1));
            assert_eq!(again.opened_by(), Some(ring.wrappings()[0].id));
            assert_eq!(again.vault().unwrap().host_name(machine()).await.unwrap(), "web-1");
            let others = [
                KeySource::File(dir.path().join("other.key")),
                phrase("another passphrase"),
                command(dir.path(), "echo 00"),
                command(dir.path(), &format!("echo {}", "00".repeat(32))),
                KeySource::Root(key()),
            ];
            create(&memory(), &others[0]).await;
            for other in &others {
                let code = open(&store, other).await.unwrap_err().code();
                assert!([1204, 1226, 1227, 1230].contains(&code), "{other:?} with {kind:?}: {code}");
            }
        }
    });
}

#[test]
fn several_open_it_at_once_until_they_are_removed() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = memory();
        let file = |name: &str| KeySource::File(dir.path().join(name));
        let mut ring = create(&store, &file("a")).await;
        let first = ring.wrappings()[0].id;
        assert!(matches!(ring.remove(first).await, Err(VaultError::LastWrapping)));
        let by_phrase = ring.add(&phrase("correct horse battery"), "the safe").await.unwrap();
        let by_command = ring.add(&command(dir.path(), GOOD), "kms").await.unwrap();
        assert_eq!(documents(&store).await, ["keys/00000000000000000003"]);
        // A new secret for one of them; the others and the data stay.
        let rotated = ring.rotate(first, &file("b")).await.unwrap();
        assert_eq!(open(&store, &file("a")).await.unwrap_err().code(), 1226);
        for source in [file("b"), phrase("correct horse battery")] {
            open(&store, &source).await.unwrap();
        }
        let again = open(&store, &phrase("correct horse battery")).await.unwrap();
        assert_eq!(again.opened_by(), Some(by_phrase));
        let labels: Vec<&str> = again.wrappings().iter().map(|w| w.label.as_str()).collect();
        assert_eq!(labels, ["first", "the safe", "kms"]);
        assert_eq!(
            (ring.opened_by(), ring.older_documents()),
            (None, 0),
            "it was opened with what was replaced"
        );
        ring.remove(rotated).await.unwrap();
        ring.remove(by_phrase).await.unwrap();
        assert_eq!(open(&store, &phrase("correct horse battery")).await.unwrap_err().code(), 1227);
        assert!(matches!(ring.remove(by_phrase).await, Err(VaultError::UnknownWrapping(_))));
        assert!(matches!(ring.remove(by_command).await, Err(VaultError::LastWrapping)));
        assert_eq!(documents(&store).await, ["keys/00000000000000000006"]);
    });
}

#[test]
fn a_vault_of_the_first_release_gets_further_keys_and_loses_its_file() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (store, root) = (memory(), key());
        // As the first release made it.
        let id = VaultId::new();
        let check = crate::keys::to_hex(&root.check_value(id).unwrap());
        let text = format!(
            "{{\n  \"format\": 1,\n  \"vault\": \"{id}\",\n  \"key-check\": \"{}\"\n}}\n",
            check.as_str()
        );
        store.put(&Path::from("vault.json"), text.into()).await.unwrap();
        let path = dir.path().join("vault.key");
        root.save(&path).unwrap();
        let (raw, new) = (KeySource::File(path), KeySource::File(dir.path().join("new.key")));
        let mut ring = open(&store, &raw).await.unwrap();
        assert_eq!((ring.number(), ring.wrappings().len()), (0, 1));
        assert!(matches!(ring.remove(WrappingId::ROOT).await, Err(VaultError::LastWrapping)));
        assert_eq!(open(&store, &phrase("correct horse battery")).await.unwrap_err().code(), 1227);
        ring.add(&new, "").await.unwrap();
        for source in [&raw, &new] {
            open(&store, source).await.unwrap().vault().unwrap();
        }
        Vault::open(store.clone(), &root).await.unwrap().register_machine(machine(), "web-1").await.unwrap();
        ring.remove(WrappingId::ROOT).await.unwrap();
        assert_eq!(open(&store, &raw).await.unwrap_err().code(), 1226);
        let vault = Vault::unlock(store.clone(), &new).await.unwrap();
        assert_eq!(vault.host_name(machine()).await.unwrap(), "web-1");
        assert_eq!(open(&store, &KeySource::Root(key())).await.unwrap_err().code(), 1204);
    });
}

#[test]
fn of_two_operators_at_once_one_is_told() {
    runtime().block_on(async {
        let store = memory();
        let mut one = create(&store, &phrase("correct horse battery")).await;
        let mut two = open(&store, &phrase("correct horse battery")).await.unwrap();
        let mut late = open(&store, &phrase("correct horse battery")).await.unwrap();
        one.add(&phrase("the first operator"), "").await.unwrap();
        let lost = two.add(&phrase("the second operator"), "").await.unwrap_err();
        assert_eq!(lost.code(), 1225);
        assert_eq!(open(&store, &phrase("the second operator")).await.unwrap_err().code(), 1226);
        // It sees what the other did, and can go on.
        assert_eq!(two.wrappings().len(), 2);
        two.add(&phrase("the second operator"), "").await.unwrap();
        open(&store, &phrase("the second operator")).await.unwrap();
        // One that is behind by more finds its number free, for the document that had it is deleted.
        assert_eq!((late.number(), documents(&store).await.len()), (1, 1));
        assert_eq!(late.add(&phrase("the third operator"), "").await.unwrap_err().code(), 1225);
        assert_eq!(documents(&store).await, ["keys/00000000000000000003"]);
        assert_eq!(late.wrappings().len(), 3);
        late.add(&phrase("the third operator"), "").await.unwrap();
        // Both want the same one away: it is, and that is all that was wanted.
        let gone = late.wrappings()[1].id;
        let (mut a, mut b) = (
            open(&store, &phrase("the third operator")).await.unwrap(),
            open(&store, &phrase("the third operator")).await.unwrap(),
        );
        a.remove(gone).await.unwrap();
        b.remove(gone).await.unwrap();
        assert_eq!(b.wrappings().len(), 3);
    });
}

#[test]
fn every_flipped_bit_and_every_lost_byte_is_found() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = memory();
        let file = KeySource::File(dir.path().join("a"));
        let mut ring = create(&store, &file).await;
        ring.add(&phrase("correct horse battery"), "x").await.unwrap();
        let path = store::keys_path(2);
        let good = store.get(&path).await.unwrap().bytes().await.unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            store.put(&path, bad.into()).await.unwrap();
            for source in [&file, &phrase("correct horse battery")] {
                let error =
                    open(&store, source).await.err().unwrap_or_else(|| panic!("bit {bit} is not found"));
                assert!([1204, 1205, 1206, 1226, 1227].contains(&error.code()), "bit {bit}: {error}");
            }
        }
        for len in 0..good.len() {
            store.put(&path, good.slice(..len).into()).await.unwrap();
            assert!(open(&store, &file).await.is_err(), "{len} bytes");
        }
        store.put(&path, [&good[..], &[0]].concat().into()).await.unwrap();
        assert_eq!(open(&store, &file).await.unwrap_err().code(), 1206);
        // One of another number does not take its place, nor one of another vault.
        store.put(&path, good.clone().into()).await.unwrap();
        store.put(&store::keys_path(3), good.clone().into()).await.unwrap();
        assert_eq!(open(&store, &file).await.unwrap_err().code(), 1206);
        let other = memory();
        create(&other, &file).await;
        other.put(&store::keys_path(2), good.into()).await.unwrap();
        assert_eq!(open(&other, &file).await.unwrap_err().code(), 1206);
        // No document is no way in.
        let none = memory();
        create(&none, &file).await;
        none.delete(&store::keys_path(1)).await.unwrap();
        assert_eq!(open(&none, &file).await.unwrap_err().code(), 1207);
        assert_eq!(Vault::create(none, &key()).await.unwrap_err().code(), 1202);
    });
}

#[test]
fn what_was_altered_by_somebody_without_the_root_key_is_found_even_if_it_opens() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = memory();
        let file = KeySource::File(dir.path().join("a"));
        let mut ring = create(&store, &file).await;
        ring.add(&phrase("correct horse battery"), "").await.unwrap();
        // The passphrase is stripped; the key file would still open what is left.
        let path = store::keys_path(2);
        let good = store.get(&path).await.unwrap().bytes().await.unwrap();
        let mut read = crate::keys::Document::decode(ring.id(), 2, &good).unwrap().document;
        read.strip_for_test();
        let forged = read.encode(&key()).unwrap();
        let spliced = [&good[..64], &forged[64..]].concat();
        for bad in [forged, spliced] {
            store.put(&path, bad.into()).await.unwrap();
            let code = open(&store, &file).await.unwrap_err().code();
            assert!(code == 1204 || code == 1206, "{code}");
        }
    });
}

#[test]
fn what_is_not_authentic_yet_costs_no_more_than_it_may() {
    for (memory_kib, passes, lanes) in
        [(2 << 20, 1, 1), (1 << 20, 5, 1), (8, u32::MAX, 1), (1024, 1, 17), (8, 0, 1), (8, 1, 0), (8, 1, 2)]
    {
        assert!(!Cost { memory_kib, passes, lanes }.is_bounded());
    }
    assert!(Cost::DEFAULT.is_bounded() && CHEAP.is_bounded());
    runtime().block_on(async {
        let store = memory();
        let mut ring = create(&store, &phrase("correct horse battery")).await;
        for n in 1..8 {
            ring.add(&phrase(&format!("passphrase number {n}")), "").await.unwrap();
        }
        assert!(matches!(ring.add(&phrase("one too many of them"), "").await, Err(VaultError::Limit(_))));
        open(&store, &phrase("passphrase number 7")).await.unwrap();
        assert!(matches!(ring.add(&KeySource::Root(key()), &"x".repeat(65)).await, Err(VaultError::Name(_))));
        let huge = store::keys_path(99);
        store.put(&huge, vec![0; 300 << 10].into()).await.unwrap();
        assert_eq!(open(&store, &phrase("passphrase number 7")).await.unwrap_err().code(), 1206);
    });
}

#[test]
fn passphrases_are_checked() {
    for bad in ["", "\n", "two\nlines", &"x".repeat(1025)] {
        assert_eq!(Passphrase::new(bad.as_bytes()).unwrap_err().code(), 1231, "{bad:?}");
    }
    assert_eq!(Passphrase::new(b"short").unwrap().check_strength().unwrap_err().code(), 1231);
    Passphrase::new("zwölf Zeichen\r\n".as_bytes()).unwrap().check_strength().unwrap();
    assert_eq!(format!("{:?}", phrase("very secret text")), "Passphrase(Passphrase(…))");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    std::fs::write(&path, "correct horse battery").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = Passphrase::load(&path).unwrap_err();
    assert!(error.to_string().contains("mode 640"), "{error}");
}

#[test]
fn key_files_are_made_once_and_taken_again() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("a.key");
        let source = KeySource::File(path.clone());
        let (one, two) = (memory(), memory());
        create(&one, &source).await;
        let text = std::fs::read(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        // Whoever was interrupted does the same again.
        create(&two, &source).await;
        assert_eq!(std::fs::read(&path).unwrap(), text);
        open(&one, &source).await.unwrap();
        // Neither a root key nor anything else is taken for one, or replaced.
        let root = dir.path().join("root.key");
        key().save(&root).unwrap();
        let mut ring = open(&one, &source).await.unwrap();
        for bad in [&root, &dir.path().to_owned()] {
            assert_eq!(ring.add(&KeySource::File(bad.clone()), "").await.unwrap_err().code(), 1215);
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o604)).unwrap();
        assert_eq!(open(&one, &source).await.unwrap_err().code(), 1215);
        for text in ["", "highwater-key-file-2 00\n", "highwater-key-file-3 00\n", &"x".repeat(300)] {
            let bad = dir.path().join("bad.key");
            std::fs::write(&bad, text).unwrap();
            std::fs::set_permissions(&bad, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(open(&one, &KeySource::File(bad)).await.unwrap_err().code(), 1215, "{text}");
        }
    });
}

#[test]
fn a_command_that_misbehaves_is_an_error_and_leaves_nothing() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        for (body, cause) in [
            ("exit 3", "exit status: 3"),
            ("echo no access to the key >&2; exit 1", "no access to the key"),
            ("head -c 100000 /dev/zero >&2; exit 1", "exit status: 1"),
            ("cat > /dev/null", "it wrote nothing"),
            ("head -c 100000 /dev/zero", "more than 8192 bytes"),
            ("yes", "more than 8192 bytes"),
            ("printf '%064d' 0", "does not give back"),
            ("echo x", "64 hexadecimal digits"),
            ("kill -9 $$", "signal: 9"),
        ] {
            let store = memory();
            let source = command(dir.path(), body);
            let made = KeyRing::create(store.clone(), &source, "").await.unwrap_err();
            assert_eq!(made.code(), 1230, "{body}");
            assert!(made.to_string().contains(cause), "{body}: {made}");
            assert!(documents(&store).await.is_empty());
        }
        for bad in ["", "kms", "./kms"] {
            bad.parse::<KeyCommand>().unwrap_err();
        }
        let missing = KeySource::Command("/nowhere/kms".parse().unwrap());
        assert_eq!(KeyRing::create(memory(), &missing, "").await.unwrap_err().code(), 1230);
    });
}

#[test]
fn what_a_command_started_ends_with_it() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("pid");
        // It waits for what it has started, with the pipes open, and is not waited for.
        let body = format!("sleep 1000 & echo $! > {}; wait", mark.display());
        let source = command(dir.path(), &body);
        let store = memory();
        let begun = KeyRing::create(store, &source, "");
        let seen = async {
            loop {
                match std::fs::read_to_string(&mark) {
                    Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
                    _ => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        };
        let pid = tokio::select! {
            _ = begun => panic!("it does not end"),
            pid = seen => pid,
        };
        // The future was dropped: all of the group is killed. Only its end can be waited for.
        let stat = format!("/proc/{pid}/stat");
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
}

/// The n-th store call of a change fails: afterwards the vault opens with the old keys or with the new ones, as is told.
async fn one(change: usize, n: u64, when: When) -> bool {
    let inner = memory();
    let mut before = create(&inner, &phrase("correct horse battery")).await;
    let second = before.add(&phrase("the second passphrase"), "").await.unwrap();
    let faulty = Faulty::new(inner.clone());
    let shared: Arc<dyn ObjectStore> = faulty.clone();
    let mut ring = open(&shared, &phrase("correct horse battery")).await.unwrap();
    faulty.fail_call(Some((n, when)));
    let outcome = match change {
        0 => ring.add(&phrase("the third passphrase"), "").await.map(drop),
        1 => ring.remove(second).await,
        _ => ring.rotate(second, &phrase("the third passphrase")).await.map(drop),
    };
    let reached = faulty.calls() >= n;
    faulty.fail_call(None);
    let opens = async |text: &str| match open(&inner, &phrase(text)).await {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.code(), 1226, "{error}");
            false
        }
    };
    assert!(opens("correct horse battery").await, "call {n} of {change}");
    let now = [opens("the second passphrase").await, opens("the third passphrase").await];
    let (old, new) = ([true, false], [[true, true], [false, false], [false, true]][change]);
    match outcome {
        Ok(()) => assert_eq!(now, new, "call {n} of {change}"),
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            assert!(now == old || now == new, "call {n} of {change}: {now:?}");
        }
    }
    // Whatever was left is cleared away by the next change.
    let mut ring = open(&inner, &phrase("correct horse battery")).await.unwrap();
    ring.add(&phrase("afterwards another"), "").await.unwrap();
    assert_eq!((documents(&inner).await.len(), ring.older_documents()), (1, 0), "call {n} of {change}");
    reached
}

#[test]
fn a_failure_of_any_call_leaves_the_old_keys_or_the_new_ones() {
    runtime().block_on(async {
        for change in 0..3 {
            for when in [When::Before, When::After] {
                let mut n = 1;
                while one(change, n, when).await {
                    n += 1;
                    assert!(n < 50);
                }
                assert!(n > 3, "only {n} calls were tried");
            }
        }
    });
}

#[test]
fn a_creation_that_fails_leaves_a_vault_or_can_be_seen_to_be_unfinished() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            let mut n = 1;
            loop {
                let inner = memory();
                let faulty = Faulty::new(inner.clone());
                faulty.fail_call(Some((n, when)));
                let root = key();
                let made = Vault::create(faulty.clone(), &root).await;
                let reached = faulty.calls() >= n;
                let there = Vault::open(inner.clone(), &root).await;
                match (made, there) {
                    (Ok(made), Ok(there)) => assert_eq!(made.id(), there.id()),
                    (Ok(_), Err(error)) => panic!("call {n}: {error}"),
                    (Err(_), Ok(_)) => {}
                    (Err(_), Err(error)) => {
                        assert!([1203, 1232].contains(&error.code()), "call {n}: {error}");
                        let again = Vault::create(inner, &root).await;
                        assert!(matches!(again, Ok(_) | Err(VaultError::Unfinished)), "call {n}: {again:?}");
                    }
                }
                if !reached {
                    break;
                }
                n += 1;
            }
            assert!(n > 4, "only {n} calls were tried");
        }
    });
}
