//! Deltas of several segments, which are finished while the next one is filled.

use super::support::*;
use crate::{MachineWriter, VaultError, verify};
use bytes::Bytes;
use highwater_delta::*;

const BLOCKS: u64 = 512;
/// So many of the chunks below fill a segment's index.
const CHUNKS_A_SEGMENT: u32 = 48;

/// A chunk of as many extents as there may be: block 0 in a version, and zeros in every other block.
fn scattered(version: u32, key: &HashKey) -> Bytes {
    let extents: Vec<Extent> = (0..EXTENTS_MAX as u64)
        .map(|at| Extent {
            start: Block(at * 2),
            count: 1,
            fill: if at == 0 { Fill::Data } else { Fill::Zero },
        })
        .collect();
    let mut out = Vec::new();
    encode_chunk(disk(10), &extents, &content(version), key, 1, &mut out).unwrap();
    out.into()
}

async fn push_segments(writer: &mut MachineWriter, segments: u32) -> crate::Result<()> {
    let key = writer.hash_key();
    writer.set_disks(records(BLOCKS))?;
    writer.begin(DeltaId::new()).await?;
    for n in 1..=segments * CHUNKS_A_SEGMENT {
        writer.push(scattered(n, &key)).await?;
    }
    Ok(())
}

#[test]
fn the_last_of_several_segments_wins() {
    runtime().block_on(async {
        let (vault, _) = vault_on(memory()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        push_segments(&mut writer, 4).await.unwrap();
        let commit = writer.commit(point(BLOCKS)).await.unwrap();
        assert_eq!(writer.state().segments().count(), 4);
        let read = read_all(&vault, disk(10), commit).await.unwrap();
        assert_eq!(read[..B], content(4 * CHUNKS_A_SEGMENT));
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    });
}

#[test]
fn a_segment_that_cannot_be_stored_fails_its_delta() {
    runtime().block_on(async {
        // The n-th segment of four, before or after it came into the store.
        use When::{After, Before};
        for (n, when) in [(1, Before), (1, After), (2, Before), (4, Before), (4, After)] {
            let inner = memory();
            let faulty = Faulty::new(inner.clone());
            let (vault, _) = vault_on(faulty.clone()).await;
            let mut writer = vault.writer(machine()).await.unwrap();
            let before = deliver(&mut writer, 1, &[7]).await.unwrap();
            // Each small segment is one put, and nothing else is called.
            faulty.fail_call(Some((n, when)));
            let failed = match push_segments(&mut writer, 4).await {
                Err(failed) => failed,
                Ok(()) => writer.commit(point(BLOCKS)).await.unwrap_err(),
            };
            assert!(matches!(failed, VaultError::Store(_)), "{n} {when:?}: {failed:?}");
            assert!(matches!(writer.commit(point(BLOCKS)).await, Err(VaultError::Order(_))), "{n} {when:?}");
            faulty.fail_call(None);
            writer.abort().await.unwrap();
            let report = verify::verify_vault(&vault).await.unwrap();
            assert!(report.is_clean() && report.orphans.is_empty(), "{n} {when:?}: {report:?}");
            let after = deliver(&mut writer, 2, &[8]).await.unwrap();
            assert_eq!((before, after), (CommitId(1), CommitId(2)));
        }
    });
}

#[test]
fn a_segment_under_way_does_not_outlive_its_aborted_delta() {
    runtime().block_on(async {
        let faulty = Faulty::new(memory());
        let (vault, _) = vault_on(faulty.clone()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        faulty.slow_puts(true);
        push_segments(&mut writer, 1).await.unwrap();
        writer.abort().await.unwrap();
        tokio::time::sleep(SLOW * 3).await;
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean() && report.orphans.is_empty(), "{report:?}");
    });
}
