//! One suite for every kind of store that a vault can lie in.

use anyhow::{Context, Result, bail, ensure};
use highwater_delta::{
    Block, BlockRange, CHUNK_BLOCKS_MAX, CommitKind, Consistency, DeltaId, DiskId, Extent, Fill, HashKey,
    MachineId, PointDisk, PointInfo, encode_chunk,
};
use highwater_tests::{Random, S3Server};
use highwater_vault::{DiskRecord, Location, MachineWriter, Store, Vault, VaultError, VaultKey, verify};
use std::fs;

const BLOCK: usize = 4096;
const DISK_BLOCKS: u64 = 8192;

/// What every store must do for a vault.
async fn conforms(open: impl Fn() -> Result<Store>) -> Result<()> {
    let key = VaultKey::generate()?;
    match Vault::open(open()?, &key).await {
        Err(VaultError::NotAVault) => {}
        other => bail!("there is a vault: {other:?}"),
    }
    let vault = Vault::create(open()?, &key).await?;
    let Err(VaultError::Exists) = Vault::create(open()?, &key).await else { bail!("created twice") };
    vault.probe().await?;
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
    for chunk in chunks(&hash, disk, 0, 4000, &mut model.clone())? {
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
    for chunk in chunks(hash, disk, first, blocks, model)? {
        writer.push(chunk.into()).await?;
    }
    let disks = vec![PointDisk { disk, size_bytes: DISK_BLOCKS * BLOCK as u64 }];
    let point = PointInfo { consistency: Consistency::Filesystem, taken_at_ms: 1, freeze_us: 1, disks };
    Ok(writer.commit(CommitKind::Point(point)).await?)
}

/// Incompressible content, so that much of it is stored.
fn chunks(hash: &HashKey, disk: DiskId, first: u64, blocks: u64, model: &mut [u8]) -> Result<Vec<Vec<u8>>> {
    let mut random = Random::new(first * 31 + blocks);
    let mut chunks = Vec::new();
    for start in (first..first + blocks).step_by(CHUNK_BLOCKS_MAX) {
        let count = (first + blocks - start).min(CHUNK_BLOCKS_MAX as u64);
        let content = &mut model[start as usize * BLOCK..(start + count) as usize * BLOCK];
        random.fill(content);
        let extent = Extent { start: Block(start), count: count as u32, fill: Fill::Data };
        let mut chunk = Vec::new();
        encode_chunk(disk, &[extent], content, hash, 1, &mut chunk)?;
        chunks.push(chunk);
    }
    Ok(chunks)
}

async fn read_back(
    vault: &Vault,
    machine: MachineId,
    disk: DiskId,
    at: highwater_delta::CommitId,
    model: &[u8],
) -> Result<()> {
    let map = vault.block_map(machine, disk, at).await?;
    let mut content = vec![0; model.len()];
    map.read(BlockRange { start: Block(0), count: DISK_BLOCKS }, &mut content).await?;
    ensure!(content == model, "other content at {at:?}");
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// One test: it changes the environment.
#[test]
fn every_store_conforms() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let profiles = dir.path().join("credentials");
    let (id, secret) = S3Server::KEY;
    fs::write(&profiles, format!("[dr]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))?;
    // SAFETY: no other thread of this program looks at the environment.
    unsafe {
        std::env::set_var("AWS_SHARED_CREDENTIALS_FILE", &profiles);
        // Not these: the profile is named.
        std::env::set_var("AWS_ACCESS_KEY_ID", "somebody");
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "else");
        std::env::set_var("AWS_SESSION_TOKEN", "at another place");
    }
    let buckets = dir.path().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    let server = S3Server::start(&buckets)?;
    let s3 = format!("region=us-east-1&endpoint=http://{}&profile=dr", server.address());
    for text in [
        dir.path().join("vault").to_string_lossy().into_owned(),
        format!("s3://vaults/site/a?{s3}"),
        format!("s3://vaults?{s3}"),
    ] {
        println!("{text}");
        let location: Location = text.parse()?;
        runtime()?.block_on(conforms(|| Ok(Store::open(&location)?))).with_context(|| text)?;
    }
    Ok(())
}
