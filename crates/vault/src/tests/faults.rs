//! Every call to the store fails once: the vault is as before or as after, never between.

use super::support::*;
use crate::{Vault, VaultError, verify};
use highwater_delta::*;

/// The second delta of a machine, while the store's n-th call fails; answers whether the call was reached.
async fn one(n: u64, when: When) -> bool {
    let inner = memory();
    let (vault, key) = vault_on(inner.clone()).await;
    let before = deliver(&mut vault.writer(machine()).await.unwrap(), 0, &[1, 2, 3]).await.unwrap();

    let faulty = Faulty::new(inner.clone());
    let handle = Vault::open(faulty.clone(), &key).await.unwrap();
    faulty.fail_call(Some((n, when)));
    let delta = DeltaId::new();
    let attempt = async {
        let mut writer = handle.writer(machine()).await?;
        let hash = writer.hash_key();
        writer.begin(delta).await?;
        let pushed = async {
            writer.push(chunk(disk(10), 1, &[7, 8], &hash)).await?;
            writer.push(chunk(disk(11), 5, &[9], &hash)).await
        };
        pushed.await?;
        let done = writer.commit(point(64)).await;
        if done.is_err() {
            let _ = writer.abort().await;
        }
        done
    };
    let outcome = attempt.await;
    let reached = faulty.calls() >= n;
    faulty.fail_call(None);

    let vault = Vault::open(inner, &key).await.unwrap();
    let state = vault.machine(machine()).await.unwrap();
    let first = [content(1), content(2), content(3)].concat();
    let second = [content(1), content(7), content(8)].concat();
    let head = |all: Vec<u8>| all[..3 * B].to_vec();
    match state.commit_of(delta) {
        None => {
            assert!(outcome.is_err(), "call {n}: acknowledged, and not stored");
            assert_eq!(state.last_commit, before);
        }
        Some(commit) => {
            assert_eq!(head(read_all(&vault, disk(10), commit).await.unwrap()), second);
            let other = read_all(&vault, disk(11), commit).await.unwrap();
            assert_eq!(other[5 * B..6 * B], content(9));
        }
    }
    assert_eq!(head(read_all(&vault, disk(10), before).await.unwrap()), first);
    assert!(verify::verify_vault(&vault).await.unwrap().is_clean());

    // Sent again, as an agent does: once in the vault, and nothing is left over.
    let mut writer = vault.writer(machine()).await.unwrap();
    let hash = writer.hash_key();
    writer.begin(delta).await.unwrap();
    writer.push(chunk(disk(10), 1, &[7, 8], &hash)).await.unwrap();
    writer.push(chunk(disk(11), 5, &[9], &hash)).await.unwrap();
    let commit = writer.commit(point(64)).await.unwrap();
    assert_eq!(head(read_all(&vault, disk(10), commit).await.unwrap()), second);
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean(), "call {n}: {:?}", report.problems);
    assert_eq!((report.points, report.orphans.len()), (2, 0), "call {n}");
    reached
}

#[test]
fn a_failure_of_any_call_leaves_before_or_after() {
    runtime().block_on(async {
        for when in [When::Before, When::After] {
            let mut n = 1;
            while one(n, when).await {
                n += 1;
                assert!(n < 100);
            }
            assert!(n > 5, "only {n} calls were tried");
        }
    });
}

#[test]
fn a_writer_whose_commit_is_unclear_is_dead() {
    runtime().block_on(async {
        let inner = memory();
        let (vault, key) = vault_on(inner.clone()).await;
        deliver(&mut vault.writer(machine()).await.unwrap(), 0, &[1]).await.unwrap();
        let faulty = Faulty::new(inner);
        let handle = Vault::open(faulty.clone(), &key).await.unwrap();
        let mut writer = handle.writer(machine()).await.unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        faulty.fail_call(Some((1, When::After)));
        assert!(matches!(writer.commit(point(64)).await, Err(VaultError::Store(_))));
        assert!(matches!(writer.abort().await, Err(VaultError::Dead)));
        assert!(matches!(writer.begin(DeltaId::new()).await, Err(VaultError::Dead)));
        assert_eq!(vault.machine(machine()).await.unwrap().last_commit, CommitId(2));
    });
}

/// A small filesystem of its own, unmounted when dropped.
struct Small(tempfile::TempDir);
impl Small {
    /// `None` where one may not mount: there is nothing to work on then.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=12m", "tmpfs"])
            .arg(dir.path())
            .status();
        mount.is_ok_and(|status| status.success()).then(|| Self(dir))
    }
}
impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_refuses_a_delta_and_loses_nothing() {
    let Some(small) = Small::new() else {
        eprintln!("no mounts here: not tested");
        return;
    };
    runtime().block_on(async {
        let (vault, _) = vault_on(crate::local_store(small.0.path()).unwrap()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let before = deliver(&mut writer, 0, &[1]).await.unwrap();
        let hash = writer.hash_key();
        let noise = |seed: u64| {
            let mut state = seed | 1 << 40;
            let mut payload = vec![0; 32 * B];
            payload.as_chunks_mut::<8>().0.iter_mut().for_each(|word| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *word = (state ^ state >> 29).to_le_bytes();
            });
            let extent = Extent { start: Block(0), count: 32, fill: Fill::Data };
            let mut out = Vec::new();
            encode_chunk(disk(10), &[extent], &payload, &hash, 1, &mut out).unwrap();
            bytes::Bytes::from(out)
        };
        writer.begin(DeltaId::new()).await.unwrap();
        let mut failed = None;
        for n in 0..200 {
            if let Err(error) = writer.push(noise(n)).await {
                failed = Some(error);
                break;
            }
        }
        let failed = failed.expect("25 MiB do not fit into 12");
        assert!(matches!(failed, VaultError::Store(_)) && failed.is_retryable(), "{failed:?}");
        assert!(matches!(writer.commit(point(64)).await, Err(VaultError::Order(_))));
        writer.abort().await.unwrap();
        // The space is back, the writer goes on, and what was there is there.
        let after = deliver(&mut writer, 1, &[2]).await.unwrap();
        let read = read_all(&vault, disk(10), before).await.unwrap();
        assert_eq!(read[..B], content(1));
        let read = read_all(&vault, disk(10), after).await.unwrap();
        assert_eq!(read[..2 * B], [content(1), content(2)].concat());
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean() && report.orphans.is_empty(), "{report:?}");
        let segments = small.0.path().join(format!("machines/{}/segments", machine()));
        assert_eq!(std::fs::read_dir(segments).unwrap().count(), 2, "nothing half-uploaded stays");
    });
}
