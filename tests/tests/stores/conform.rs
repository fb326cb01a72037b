//! One suite for every kind of store that a vault can lie in.

use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{
    Block, BlockRange, CHUNK_BLOCKS_MAX, CommitKind, Consistency, DeltaId, DiskId, Extent, Fill, HashKey,
    MachineId, PointDisk, PointInfo, encode_chunk,
};
use highwater_faults::Faulty;
use highwater_tests::Random;
use highwater_vault::{BlockMap, DiskRecord, MachineWriter, Store, Vault, VaultError, VaultKey, verify};

pub const BLOCK: usize = 4096;
pub const DISK_BLOCKS: u64 = 8192;

/// What every store must do for a vault.
pub async fn conforms(open: impl Fn() -> Result<Store>) -> Result<()> {
    let key = VaultKey::generate()?;
    match Vault::open(open()?, &key).await {
        Err(VaultError::NotAVault) => {}
        other => bail!("there is a vault: {other:?}"),
    }
    let vault = Vault::create(open()?, &key).await?;
    let Err(VaultError::Exists) = Vault::create(open()?, &key).await else { bail!("created twice") };
    vault.probe().await?;
    // The same without the one promise that commits rest on.
    let careless = open()?.layered(|objects| {
        let layer = Faulty::new(objects);
        layer.create_overwrites(true);
        layer
    });
    let Err(VaultError::NoCreateIfAbsent(_)) = Vault::open(careless, &key).await?.probe().await else {
        bail!("a store that overwrites is not noticed")
    };
    ensure!(vault.control_create("one", b"first").await?);
    ensure!(!vault.control_create("one", b"second").await?);
    ensure!(vault.control_get("one").await?.context("it is there")?.as_slice() == b"first");
    ensure!(vault.control_get("two").await?.is_none());
    ensure!(vault.control_list("").await? == ["one"]);

    let machine = MachineId::new();
    vault.register_machine(machine, "here").await?;
    let disk = DiskId::new();
    let hash = vault.hash_key(machine).await?;
    let mut model = vec![0; DISK_BLOCKS as usize * BLOCK];
    let mut writer = vault.writer(machine).await?;
    writer.set_disks(vec![DiskRecord {
        disk,
        name: "sda".into(),
        size_bytes: DISK_BLOCKS * BLOCK as u64,
    }])?;
    // Several parts of an upload; and one that is put at once.
    for (first, blocks) in [(0, 6000), (100, 40), (7000, 1)] {
        let point = write(&mut writer, &hash, disk, first, blocks, &mut model).await?;
        let state = vault.machine(machine).await?;
        ensure!(state.points.last().map(|p| p.id) == Some(point));
        read_back(&vault, machine, disk, point, &model).await?;
    }
    // One that is thrown away leaves nothing.
    writer.begin(DeltaId::new()).await?;
    for chunk in chunks(&hash, disk, (0, 4000), 1, None)? {
        writer.push(chunk.into()).await?;
    }
    writer.abort().await?;
    ensure!(verify::verify_vault(&vault).await?.is_clean());

    // Another writer: who comes second with a record is fenced.
    let mut other = Vault::open(open()?, &key).await?.writer(machine).await?;
    let before = model.clone();
    write(&mut other, &hash, disk, 10, 3, &mut model).await?;
    match write(&mut writer, &hash, disk, 20, 3, &mut before.clone()).await {
        Err(error) if matches!(error.downcast_ref(), Some(VaultError::Fenced(_))) => {}
        other => bail!("not fenced: {other:?}"),
    }
    let again = Vault::open(open()?, &key).await?;
    let state = again.machine(machine).await?;
    let last = state.points.last().context("a point")?.id;
    read_back(&again, machine, disk, last, &model).await?;
    ensure!(verify::verify_vault(&again).await?.is_clean());
    ensure!(again.machines().await? == [machine]);
    Ok(())
}

async fn write(
    writer: &mut MachineWriter,
    hash: &HashKey,
    disk: DiskId,
    first: u64,
    blocks: u64,
    model: &mut [u8],
) -> Result<highwater_delta::CommitId> {
    writer.begin(DeltaId::new()).await?;
    for chunk in chunks(hash, disk, (first, blocks), first * 31 + blocks, Some(model))? {
        writer.push(chunk.into()).await?;
    }
    Ok(writer.commit(point(disk)).await?)
}

/// Incompressible content, so that much of it is stored; put into a model too.
pub fn chunks(
    hash: &HashKey,
    disk: DiskId,
    (first, blocks): (u64, u64),
    seed: u64,
    model: Option<&mut [u8]>,
) -> Result<Vec<Vec<u8>>> {
    let mut content = vec![0; blocks as usize * BLOCK];
    Random::new(seed).fill(&mut content);
    if let Some(model) = model {
        model[first as usize * BLOCK..][..content.len()].copy_from_slice(&content);
    }
    let mut chunks = Vec::new();
    for (n, content) in content.chunks(CHUNK_BLOCKS_MAX * BLOCK).enumerate() {
        let start = Block(first + (n * CHUNK_BLOCKS_MAX) as u64);
        let extent = Extent { start, count: (content.len() / BLOCK) as u32, fill: Fill::Data };
        let mut chunk = Vec::new();
        encode_chunk(disk, &[extent], content, hash, 1, &mut chunk)?;
        chunks.push(chunk);
    }
    Ok(chunks)
}

/// A point of the one disk.
pub fn point(disk: DiskId) -> CommitKind {
    let disks = vec![PointDisk { disk, size_bytes: DISK_BLOCKS * BLOCK as u64 }];
    CommitKind::Point(PointInfo { consistency: Consistency::Filesystem, taken_at_ms: 1, freeze_us: 1, disks })
}

/// All of a disk.
pub async fn content(map: &BlockMap) -> Result<Vec<u8>, VaultError> {
    let mut content = vec![0; DISK_BLOCKS as usize * BLOCK];
    map.read(BlockRange { start: Block(0), count: DISK_BLOCKS }, &mut content).await?;
    Ok(content)
}

async fn read_back(
    vault: &Vault,
    machine: MachineId,
    disk: DiskId,
    at: highwater_delta::CommitId,
    model: &[u8],
) -> Result<()> {
    let map = vault.block_map(machine, disk, at).await?;
    ensure!(content(&map).await? == model, "other content at {at:?}");
    Ok(())
}
