//! A vault written by the first release: it has to be read for ever. The fixture was made with
//! `HIGHWATER_WRITE_FIXTURE=1 cargo test -p highwater-vault golden`, which refuses to replace it.

use super::support::*;
use crate::{Vault, VaultKey, local_store, verify};
use highwater_delta::*;
use object_store::{ObjectStoreExt, path::Path};

fn fixture() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1")
}

async fn write() {
    let key = key();
    std::fs::create_dir_all(fixture()).unwrap();
    key.save(&fixture().join("key")).unwrap();
    let vault = Vault::create(local_store(&fixture().join("vault")).unwrap(), &key).await.unwrap();
    vault.register_machine(machine(), "golden").await.unwrap();
    vault.control_create("ca/1", b"a certificate authority").await.unwrap();
    let mut writer = vault.writer(machine()).await.unwrap();
    deliver(&mut writer, 5, &[1, 0, 3]).await.unwrap();
    deliver(&mut writer, 6, &[4]).await.unwrap();
}

#[test]
fn a_vault_of_the_first_release_is_read() {
    runtime().block_on(async {
        if std::env::var_os("HIGHWATER_WRITE_FIXTURE").is_some() {
            write().await;
        }
        // Read into memory: the fixture stays as it is, and version control keeps no modes.
        let store = memory();
        let mut dirs = vec![fixture().join("vault")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    let name = path.strip_prefix(fixture().join("vault")).unwrap().to_str().unwrap();
                    store.put(&Path::from(name), std::fs::read(&path).unwrap().into()).await.unwrap();
                }
            }
        }
        let text = std::fs::read(fixture().join("key")).unwrap();
        let private = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(private.path(), text).unwrap();
        let key = VaultKey::load(private.path()).unwrap();
        let vault = Vault::open(store, &key).await.unwrap();
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
        assert_eq!(vault.machine(machine()).await.unwrap().host_name, "golden");
        assert_eq!(vault.control_get("ca/1").await.unwrap().unwrap().as_slice(), b"a certificate authority");
        for (commit, middle) in [(1, content(0)), (2, content(4))] {
            let read = read_all(&vault, disk(10), CommitId(commit)).await.unwrap();
            assert_eq!(read[5 * B..8 * B], [content(1), middle, content(3)].concat());
        }
    });
}
