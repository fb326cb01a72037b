//! `vault key` and `vault erase-machine` against vaults made here.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod console;

use console::{Outcome, Typed, call};
use highwater_cli::Exit;
use highwater_delta::MachineId;
use highwater_vault::{KeyRing, KeySource, Vault, VaultKey, local_store};
use std::{os::unix::fs::PermissionsExt, path::PathBuf};

const PHRASE: &str = "correct horse battery";

struct Place(tempfile::TempDir);
impl Place {
    /// A vault that the key file `a.key` opens.
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let source = KeySource::File(place.path("a.key"));
        let made = async {
            let store = local_store(&place.path("vault")).unwrap();
            let vault = KeyRing::create(store, &source, "init").await.unwrap().vault().unwrap();
            vault.register_machine(MachineId::from_bytes([0xab; 16]), "web-1").await.unwrap();
        };
        tokio::runtime::Runtime::new().unwrap().block_on(made);
        place
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
    fn secret(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        self.text(name)
    }
    /// With what is typed, secret or not.
    fn typed(&self, args: &[&str], typed: &str, secrets: &[&str]) -> Outcome {
        let vault = self.text("vault");
        let all: Vec<&str> = ["highwater", "--config", "/nonexistent", "--vault", &vault]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        call(&all, Typed { lines: typed, secrets, can_ask: true })
    }
    fn run(&self, args: &[&str]) -> Outcome {
        self.typed(args, "", &[])
    }
    /// With the key file `a.key`, in JSON.
    fn key(&self, args: &[&str]) -> Outcome {
        let file = self.text("a.key");
        let all: Vec<&str> =
            ["--json", "--key-file", &file, "vault", "key"].into_iter().chain(args.iter().copied()).collect();
        self.run(&all)
    }
    fn ids(&self) -> Vec<String> {
        let listed = self.key(&["list"]).json();
        listed["keys"].as_array().unwrap().iter().map(|key| key["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn keys_are_listed_added_rotated_and_removed() {
    let place = Place::new();
    let listed = place.key(&["list"]).json();
    assert_eq!((&listed["document"], &listed["older-documents"]), (&1.into(), &0.into()));
    let first = &listed["keys"][0];
    assert_eq!(
        (&first["kind"], &first["label"], &first["used"]),
        (&"key-file".into(), &"init".into(), &true.into())
    );
    let first = first["id"].as_str().unwrap().to_owned();

    let last = place.key(&["remove", &first, "--yes"]);
    assert_eq!((last.exit, last.code()), (Exit::Failure, "HW-1228".to_owned()));
    let phrase = place.secret("phrase", PHRASE);
    let added = place.key(&["add", "--new-passphrase-file", &phrase, "--label", "the safe"]);
    assert_eq!(added.exit, Exit::Success, "{}", added.out);
    let by_phrase = added.json()["added"].as_str().unwrap().to_owned();
    assert_eq!(added.json()["keys"][1]["label"], "the safe");
    let read = place.run(&["--passphrase-file", &phrase, "machines"]);
    assert!(read.out.contains("web-1"), "{}", read.err);
    // What was said counts more than what the environment may say.
    let both = place.run(&["--key", "/nonexistent", "--passphrase-file", &phrase, "machines"]);
    assert_eq!(both.exit, Exit::Success, "{}", both.err);

    let new = place.text("b.key");
    let unsure = place.key(&["rotate", &first, "--new-key-file", &new]);
    assert_eq!((unsure.exit, unsure.code()), (Exit::NotConfirmed, "HW-1508".to_owned()));
    assert!(!place.path("b.key").exists(), "nothing was made");
    let file = place.text("a.key");
    let typed = ["--key-file", &file, "vault", "key", "rotate", &first, "--new-key-file", &new];
    let slip = place.typed(&typed, "y\n", &[]);
    assert_eq!(slip.exit, Exit::NotConfirmed);
    let rotated = place.typed(&typed, &format!("{first}\n"), &[]);
    assert_eq!(rotated.exit, Exit::Success, "{}", rotated.err);
    assert!(rotated.err.contains("the vault was opened with now"), "{}", rotated.err);
    assert!(rotated.out.contains("keep a copy elsewhere"), "{}", rotated.out);
    assert_eq!(place.key(&["list"]).code(), "HW-1226", "the old file is void");
    assert_eq!(place.path("b.key").metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let removed = place.run(&["--key-file", &new, "vault", "key", "remove", &by_phrase, "--yes"]);
    assert!(removed.out.contains(&format!("removed key {by_phrase}")), "{} {}", removed.out, removed.err);
    assert!(removed.err.contains("the safe") && removed.err.contains("key file \"init\""), "{}", removed.err);
    let refused = place.run(&["--json", "--passphrase-file", &phrase, "machines"]);
    assert_eq!(refused.code(), "HW-1227");
    assert!(place.run(&["--key-file", &new, "vault", "key", "list"]).out.starts_with("ID "));
}

#[test]
fn passphrases_are_asked_for_where_nobody_sees_them() {
    let place = Place::new();
    let file = place.text("a.key");
    let add = ["--json", "--key-file", &file, "vault", "key", "add", "--new-passphrase"];
    for (typed, code) in [
        (&["short"][..], "HW-1231"),
        (&[PHRASE, "correct horse batterie"], "HW-1231"),
        (&[PHRASE], "HW-1509"),
        (&[""], "HW-1231"),
    ] {
        assert_eq!(place.typed(&add, "", typed).code(), code, "{typed:?}");
    }
    assert_eq!(place.ids().len(), 1);
    assert_eq!(place.typed(&add, "", &[PHRASE, PHRASE]).exit, Exit::Success);
    let read = place.typed(&["--passphrase", "machines"], "", &[PHRASE]);
    assert!(read.out.contains("web-1"), "{}", read.err);
    let wrong = place.typed(&["--json", "--passphrase", "machines"], "", &["another passphrase"]);
    assert_eq!(wrong.code(), "HW-1226");
    assert!(!wrong.out.contains("another passphrase"));
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let place = Place::new();
    let id = place.ids().remove(0);
    let phrase = place.secret("phrase", PHRASE);
    let open = place.secret("open", PHRASE);
    std::fs::set_permissions(place.path("open"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let short = place.secret("short", "short\n");
    let (dir, none) = (place.text(""), place.text("none/x"));
    for (args, code) in [
        (&["add"][..], "HW-1501"),
        (&["add", "--new-passphrase", "--new-key-file", "/x"], "HW-1501"),
        (&["add", "--new-key-command", "kms"], "HW-1501"),
        (&["add", "--new-key-command", "/bin/false"], "HW-1230"),
        (&["add", "--new-key-command", &none], "HW-1230"),
        (&["add", "--new-key-file", &none], "HW-1215"),
        (&["add", "--new-key-file", &dir], "HW-1215"),
        (&["add", "--new-passphrase-file", &open], "HW-1231"),
        (&["add", "--new-passphrase-file", &short], "HW-1231"),
        (&["add", "--new-passphrase-file", &none], "HW-1231"),
        (&["add", "--new-passphrase-file", &phrase, "--label", "a\nb"], "HW-1219"),
        (&["remove", "00000001", "--yes"], "HW-1229"),
        (&["remove", "x", "--yes"], "HW-1501"),
        (&["remove", &id], "HW-1228"),
        (&["rotate", &id], "HW-1501"),
        (&["rotate", "00000001", "--new-passphrase-file", &phrase, "--yes"], "HW-1229"),
    ] {
        let outcome = place.key(args);
        assert_eq!(outcome.code(), code, "{args:?}: {}", outcome.out);
    }
    let listed = place.key(&["list"]).json();
    assert_eq!((&listed["document"], listed["keys"].as_array().unwrap().len()), (&1.into(), 1));
    let two = ["--json", "--passphrase-file", &phrase, "--key-command", "/bin/false", "machines"];
    assert_eq!(place.run(&two).code(), "HW-1501");
    assert_eq!(place.run(&["--json", "machines"]).code(), "HW-1504");
}

#[test]
fn the_collectors_configuration_says_what_opens_it() {
    let place = Place::new();
    let phrase = place.secret("phrase", PHRASE);
    place.key(&["add", "--new-passphrase-file", &phrase]);
    let kms = place.secret("kms", r#"case "$1" in wrap) printf 'blob:'; cat;; unwrap) cut -d: -f2;; esac"#);
    let command = format!("/bin/sh {kms}");
    let added = place.key(&["add", "--new-key-command", &command]);
    assert_eq!(added.exit, Exit::Success, "{}", added.out);
    let config = place.text("collector.toml");
    for (setting, exit) in [
        (format!("key-file = {:?}", place.text("a.key")), Exit::Success),
        (format!("passphrase-file = {phrase:?}"), Exit::Success),
        (format!("key-command = [\"/bin/sh\", {kms:?}]"), Exit::Success),
        ("key-command = [\"sh\"]".to_owned(), Exit::Failure),
        ("key-command = []".to_owned(), Exit::Failure),
    ] {
        std::fs::write(&config, &setting).unwrap();
        let outcome = place.run(&["machines", "--config", &config]);
        assert_eq!(outcome.exit, exit, "{setting}: {}", outcome.err);
    }
}

#[test]
fn a_vault_of_the_first_kind_of_key_gets_another() {
    let place = Place(tempfile::tempdir().unwrap());
    let root = VaultKey::generate().unwrap();
    root.save(&place.path("a.key")).unwrap();
    let made = Vault::create(local_store(&place.path("vault")).unwrap(), &root);
    tokio::runtime::Runtime::new().unwrap().block_on(made).unwrap();
    let listed = place.key(&["list"]).json();
    assert_eq!(listed["keys"][0]["kind"], "root-key-file");
    let id = place.ids().remove(0);
    let new = place.text("b.key");
    assert_eq!(place.key(&["rotate", &id, "--new-key-file", &new, "--yes"]).exit, Exit::Success);
    assert_eq!(place.key(&["list"]).code(), "HW-1226");
    assert_eq!(place.run(&["--key-file", &new, "machines"]).exit, Exit::Success);
}

#[test]
fn a_machine_is_erased_when_that_is_confirmed() {
    let place = Place::new();
    let file = place.text("a.key");
    let id = MachineId::from_bytes([0xab; 16]).to_string();
    let erase = |more: &[&str], typed: &str| {
        let all = [&["--key-file", &file, "vault", "erase-machine"], more].concat();
        place.typed(&all, typed, &[])
    };
    for (more, code) in [
        (&["web-1", "--json"][..], "HW-1508"),
        (&["nobody", "--json", "--yes"], "HW-1505"),
        (&["00000000-0000-0000-0000-000000000000", "--json", "--yes"], "HW-1505"),
    ] {
        assert_eq!(erase(more, "").code(), code, "{more:?}");
    }
    let slip = erase(&["web-1"], "yes\n");
    assert_eq!(slip.exit, Exit::NotConfirmed);
    assert!(slip.err.contains("web-1") && slip.err.contains("NOBODY can read"), "{}", slip.err);
    assert!(place.run(&["--key-file", &file, "machines"]).out.contains("web-1"));

    let done = erase(&["abab"], "web-1\n");
    assert_eq!(done.exit, Exit::Success, "{}", done.err);
    assert!(done.out.contains(&format!("erased machine {id}: 1 objects deleted")), "{}", done.out);
    assert!(!place.run(&["--key-file", &file, "machines"]).out.contains("web-1"));
    assert_eq!(erase(&["web-1", "--json", "--yes"], "").code(), "HW-1505");
    let again = erase(&[&id, "--json", "--yes"], "").json();
    assert_eq!((&again["plan"]["begun"], &again["erased"]["deleted"]), (&true.into(), &0.into()));
}
