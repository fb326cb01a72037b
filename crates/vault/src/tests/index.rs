//! The local index: it makes reading cheap, and is never believed against the vault.

use super::support::*;
use crate::{Index, Vault, store::manifest_path};
use object_store::ObjectStoreExt;
use std::{fs, path::PathBuf};

struct Site {
    counted: std::sync::Arc<Faulty>,
    vault: Vault,
    dir: tempfile::TempDir,
}

impl Site {
    async fn new() -> (Self, crate::MachineWriter) {
        let counted = Faulty::new(memory());
        let (vault, _) = vault_on(counted.clone()).await;
        let dir = tempfile::tempdir().unwrap();
        let writer = vault.writer(machine()).await.unwrap();
        (Self { counted, vault: vault.with_index(Index::new(dir.path())), dir }, writer)
    }
    /// What it says, and how many requests that took.
    async fn read(&self) -> (crate::MachineState, u64) {
        self.counted.fail_call(None);
        let state = self.vault.machine(machine()).await.unwrap();
        (state, self.counted.calls())
    }
    fn file(&self) -> PathBuf {
        self.dir.path().join(self.vault.id().to_string()).join(machine().to_string())
    }
}

#[test]
fn what_was_read_once_costs_little() {
    runtime().block_on(async {
        let (site, mut writer) = Site::new().await;
        for n in 0..100 {
            deliver(&mut writer, n % 60, &[n as u32 + 1]).await.unwrap();
        }
        let (first, before) = site.read().await;
        assert_eq!(&first, writer.state());
        let (second, calls) = site.read().await;
        assert_eq!(second, first);
        assert!(calls <= 3 && calls < before, "{calls}, {before} before");
        // What comes after it is read, and it is kept up when that becomes much.
        for n in 0..40 {
            deliver(&mut writer, n, &[n as u32 + 7]).await.unwrap();
            assert_eq!(&site.read().await.0, writer.state());
        }
        let (_, calls) = site.read().await;
        assert!(calls <= 3 + 16, "{calls}");
    });
}

#[test]
fn a_bad_index_is_passed_over_and_written_anew() {
    runtime().block_on(async {
        let (site, mut writer) = Site::new().await;
        for n in 0..20 {
            deliver(&mut writer, n, &[n as u32 + 1]).await.unwrap();
        }
        site.read().await;
        let good = fs::read(site.file()).unwrap();
        let (_, few) = site.read().await;
        let other = {
            let (other, mut writer) = Site::new().await;
            deliver(&mut writer, 0, &[1]).await.unwrap();
            other.read().await;
            fs::read(other.file()).unwrap()
        };
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [vec![], good[..good.len() - 1].to_vec(), flipped, other, vec![0; 4096]] {
            fs::write(site.file(), &bad).unwrap();
            let (state, calls) = site.read().await;
            assert_eq!(&state, writer.state());
            assert!(calls > few);
            assert_eq!(site.read().await.1, few, "it was written anew");
        }
        // A directory where the file should be: nothing can be written.
        fs::remove_file(site.file()).unwrap();
        fs::create_dir(site.file()).unwrap();
        assert_eq!(&site.read().await.0, writer.state());
        assert_eq!(fs::read_dir(site.file().parent().unwrap()).unwrap().count(), 1, "nothing is left");
    });
}

/// The vault was put back to an earlier copy, and went on otherwise.
#[test]
fn an_index_of_a_history_that_is_no_more_is_not_believed() {
    runtime().block_on(async {
        for goes_on in [false, true] {
            let (site, mut writer) = Site::new().await;
            for n in 0..4 {
                deliver(&mut writer, n, &[n as u32 + 1]).await.unwrap();
            }
            site.read().await;
            let last = writer.state().last_record;
            site.vault.store().delete(&manifest_path(machine(), last)).await.unwrap();
            if goes_on {
                let mut other = site.vault.writer(machine()).await.unwrap();
                while other.state().last_record < last + 3 {
                    deliver(&mut other, 9, &[99]).await.unwrap();
                }
                assert_eq!(&site.read().await.0, other.state());
            } else {
                assert_eq!(site.read().await.0.last_record, last - 1);
            }
        }
    });
}

#[test]
fn of_an_erased_machine_it_tells_nothing() {
    runtime().block_on(async {
        let (site, mut writer) = Site::new().await;
        deliver(&mut writer, 1, &[1]).await.unwrap();
        site.read().await;
        crate::erase::erase(&site.vault, machine()).await.unwrap();
        assert_eq!(site.vault.machine(machine()).await.unwrap_err().code(), 1233);
        assert!(!String::from_utf8_lossy(&fs::read(site.file()).unwrap()).contains("web-1"));
    });
}
