//! The vault against a model: random deltas, commits, aborts and reopenings; every point reads back as the model.

use super::support::*;
use crate::{MachineWriter, Vault, verify};
use highwater_delta::*;
use object_store::ObjectStoreExt;
use proptest::prelude::*;
use std::collections::BTreeMap;

const BLOCKS: u64 = 48;

#[derive(Clone, Debug)]
enum Step {
    /// A delta of runs (disk, start, versions), and how it ends: partial, point, abort, or dropped with a reopening.
    Delta(Vec<(u8, u64, Vec<u32>)>, Vec<(u8, u64, u32)>, End),
    Reopen,
    SendAgain,
}
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Partial,
    Point,
    Abort,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let versions = prop::collection::vec(0_u32..5000, 1..12);
    let runs = prop::collection::vec((0_u8..2, 0..BLOCKS, versions), 0..6);
    let zeros = prop::collection::vec((0_u8..2, 0..BLOCKS, 1_u32..20), 0..2);
    let end = prop_oneof![
        2 => Just(End::Partial), 5 => Just(End::Point), 1 => Just(End::Abort), 1 => Just(End::Crash)
    ];
    prop_oneof![
        8 => (runs, zeros, end).prop_map(|(r, z, e)| Step::Delta(r, z, e)),
        1 => Just(Step::Reopen),
        1 => Just(Step::SendAgain),
    ]
}

type Disks = BTreeMap<(u8, u64), u32>;

fn zero_chunk(disk: DiskId, start: u64, count: u32, key: &HashKey) -> bytes::Bytes {
    let mut out = Vec::new();
    let extent = Extent { start: Block(start), count, fill: Fill::Zero };
    encode_chunk(disk, &[extent], &[], key, 1, &mut out).unwrap();
    out.into()
}

async fn run(steps: Vec<Step>) {
    let store = memory();
    let (mut vault, key) = vault_on(store.clone()).await;
    let mut writer: MachineWriter = vault.writer(machine()).await.unwrap();
    let hash = writer.hash_key();
    let mut now = Disks::new();
    let mut points: Vec<(CommitId, Disks)> = Vec::new();
    let mut last: Option<(DeltaId, CommitId)> = None;
    for step in steps {
        match step {
            Step::Reopen => {
                vault = Vault::open(store.clone(), &key).await.unwrap();
                writer = vault.writer(machine()).await.unwrap();
            }
            Step::SendAgain => {
                let Some((delta, commit)) = last else { continue };
                let before = writer.state().clone();
                writer.begin(delta).await.unwrap();
                writer.push(chunk(disk(10), 0, &[9999], &hash)).await.unwrap();
                assert_eq!(writer.commit(CommitKind::Partial).await.unwrap(), commit);
                assert_eq!(writer.state(), &before);
            }
            Step::Delta(runs, zeros, end) => {
                writer.set_disks(records(BLOCKS)).unwrap();
                let delta = DeltaId::new();
                writer.begin(delta).await.unwrap();
                let mut next = now.clone();
                for (d, start, mut versions) in runs {
                    versions.truncate((BLOCKS - start) as usize);
                    writer.push(chunk(disk(10 + d), start, &versions, &hash)).await.unwrap();
                    next.extend((start..).zip(versions).map(|(block, version)| ((d, block), version)));
                }
                for (d, start, count) in zeros {
                    let count = count.min((BLOCKS - start) as u32);
                    writer.push(zero_chunk(disk(10 + d), start, count, &hash)).await.unwrap();
                    next.extend((start..start + u64::from(count)).map(|block| ((d, block), 0)));
                }
                match end {
                    End::Abort => writer.abort().await.unwrap(),
                    End::Crash => writer = vault.writer(machine()).await.unwrap(),
                    End::Partial | End::Point => {
                        let kind = if end == End::Point { point(BLOCKS) } else { CommitKind::Partial };
                        let commit = writer.commit(kind).await.unwrap();
                        now = next;
                        last = Some((delta, commit));
                        if end == End::Point {
                            points.push((commit, now.clone()));
                        }
                    }
                }
            }
        }
    }
    let state = vault.machine(machine()).await.unwrap();
    assert_eq!(&state, writer.state());
    if let Ok(map) = writer.block_map(disk(10)).await {
        let stored = map.hashes(BlockRange::new(0, BLOCKS)).await.unwrap();
        for (block, stored) in stored.iter().enumerate() {
            assert_eq!(*stored != StoredBlock::Absent, now.contains_key(&(0, block as u64)));
        }
    }
    assert_eq!(
        state.points.iter().map(|p| p.id).collect::<Vec<_>>(),
        points.iter().map(|p| p.0).collect::<Vec<_>>()
    );
    for (commit, model) in &points {
        for d in 0..2_u8 {
            let got = read_all(&vault, disk(10 + d), *commit).await.unwrap();
            let map = vault.block_map(machine(), disk(10 + d), *commit).await.unwrap();
            let hashes = map.hashes(BlockRange::new(0, BLOCKS + 3)).await.unwrap();
            for block in 0..BLOCKS {
                let version = model.get(&(d, block)).copied();
                let expected = content(version.unwrap_or(0));
                assert_eq!(
                    &got[block as usize * B..][..B],
                    &expected[..],
                    "disk {d} block {block} at {commit}"
                );
                let stored = match version {
                    None => StoredBlock::Absent,
                    Some(0) => StoredBlock::Zero,
                    Some(_) => StoredBlock::Data(hash.hash(&expected)),
                };
                assert_eq!(hashes[block as usize], stored);
            }
            assert_eq!(hashes[BLOCKS as usize..], [StoredBlock::Absent; 3]);
        }
    }
    let report = verify::verify_vault(&vault).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    assert_eq!(report.orphans, Vec::<String>::new());
    assert_eq!(report.points, points.len() as u64);
}

proptest! {
    #![proptest_config(cases(60))]
    #[test]
    fn every_point_reads_back(steps in prop::collection::vec(step(), 1..25)) {
        runtime().block_on(run(steps));
    }
}

/// Enough commits that checkpoints are made and used.
#[test]
fn long_histories_are_replayed_from_a_checkpoint() {
    runtime().block_on(async {
        let store = memory();
        let (vault, key) = vault_on(store.clone()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        for n in 0..150_u32 {
            deliver(&mut writer, u64::from(n) % 60, &[n + 1]).await.unwrap();
        }
        let fives: Vec<u64> = (1..=30).map(|n| n * 5).collect();
        assert_eq!(vault.checkpoint_numbers(machine()).await.unwrap(), fives);
        for number in &fives[26..] {
            vault.store().delete(&crate::store::checkpoint_path(machine(), *number)).await.unwrap();
        }
        let vault = Vault::open(store, &key).await.unwrap();
        let counted = Faulty::new(vault.store().clone());
        let same = Vault::open(counted.clone(), &key).await.unwrap();
        counted.fail_call(None);
        assert_eq!(&same.machine(machine()).await.unwrap(), writer.state());
        let calls = counted.calls();
        assert!(calls < 30, "{calls} calls for 20 records after a checkpoint");
        let report = verify::verify_vault(&vault).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.problems);
        assert_eq!((report.records, report.checkpoints, report.points), (150, 26, 150));
        let old = read_all(&vault, disk(10), CommitId(3)).await.unwrap();
        assert_eq!(old[2 * B..3 * B], content(3));
        assert_eq!(old[3 * B..4 * B], content(0));
    });
}

/// Large enough for several parts and segments.
#[test]
fn large_deltas_stream_through_parts_and_segments() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let (vault, _) = vault_on(crate::local_store(dir.path()).unwrap()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let hash = writer.hash_key();
        let blocks = 640 * 32;
        writer.set_disks(records(blocks)).unwrap();
        writer.begin(DeltaId::new()).await.unwrap();
        let noise = |chunk: u64| {
            let mut state = chunk | 1 << 40;
            let mut payload = vec![0; 32 * B];
            payload.as_chunks_mut::<8>().0.iter_mut().for_each(|word| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *word = state.to_le_bytes();
            });
            payload
        };
        let mut encoder = ChunkEncoder::new(1).unwrap();
        let mut out = Vec::new();
        for n in 0..640 {
            let extent = Extent { start: Block(n * 32), count: 32, fill: Fill::Data };
            encoder.encode(disk(10), &[extent], &noise(n), &hash, &mut out).unwrap();
            writer.push(out.clone().into()).await.unwrap();
        }
        let commit = writer.commit(point(blocks)).await.unwrap();
        assert_eq!(writer.state().segments().count(), 2);
        let map = vault.block_map(machine(), disk(10), commit).await.unwrap();
        let mut got = vec![0; 2000 * B];
        for start in (0..blocks).step_by(2000) {
            let count = 2000.min(blocks - start);
            let got = &mut got[..count as usize * B];
            map.read(BlockRange::new(start, count), got).await.unwrap();
            for (block, have) in (start..).zip(got.chunks(B)) {
                let expected = noise(block / 32);
                assert!(expected[(block % 32) as usize * B..][..B] == *have, "{block}");
            }
        }
        assert!(verify::verify_vault(&vault).await.unwrap().is_clean());
    });
}

/// What small reads fetched serves others nearby; large ones pass it by; nothing is kept where nothing may be.
#[test]
fn small_reads_nearby_fetch_content_once() {
    runtime().block_on(async {
        let faulty = Faulty::new(memory());
        let (vault, _) = vault_on(faulty.clone()).await;
        let mut writer = vault.writer(machine()).await.unwrap();
        let versions: Vec<u32> = (1..=20).collect();
        let commit = deliver(&mut writer, 3, &versions).await.unwrap();
        for (kept, wanted) in [(1 << 20, 1), (0, 20)] {
            let vault = vault.clone().with_page_cache(1 << 20).with_chunk_cache(kept);
            let map = vault.block_map(machine(), disk(10), commit).await.unwrap();
            let mut whole = vec![0; 64 * B];
            map.read(BlockRange::new(0, 64), &mut whole).await.unwrap();
            faulty.fail_call(None);
            for block in 3..23 {
                let mut one = vec![9; B];
                map.read(BlockRange::new(block, 1), &mut one).await.unwrap();
                assert_eq!(one[..], whole[block as usize * B..][..B]);
                assert_eq!(one[..], content(block as u32 - 2));
            }
            assert_eq!(faulty.calls(), wanted, "with {kept} bytes of chunks kept");
        }
    });
}
