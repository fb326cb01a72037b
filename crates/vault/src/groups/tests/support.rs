//! A vault with some machines, each with points.

use crate::groups::{Group, Report, Times};
use crate::tests::support::{content, memory};
use crate::{Clock, DiskRecord, Result, Vault, VaultKey};
use highwater_delta::*;
use highwater_group::{Kind, Life, Marker};
use object_store::ObjectStore;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// When all points of the tests were taken, by their machines' clocks.
pub const TAKEN_MS: u64 = 1_790_000_000_000;

/// When the tests begin, in milliseconds since 1970: now, since erasing asks the store's clock too.
pub fn start() -> u64 {
    Clock::default().now_ms()
}

pub fn machine(n: u8) -> MachineId {
    MachineId::from_bytes([n; 16])
}

pub struct Site {
    pub vault: Vault,
    pub store: Arc<dyn ObjectStore>,
    pub key: VaultKey,
    pub now_ms: Arc<AtomicU64>,
}

impl Site {
    /// With machines 1 to `machines`.
    pub async fn new(machines: u8) -> Self {
        Self::on(memory(), machines).await
    }

    pub async fn on(store: Arc<dyn ObjectStore>, machines: u8) -> Self {
        let key = VaultKey::generate().unwrap();
        let now_ms = Arc::new(AtomicU64::new(start()));
        let vault = Vault::create(store.clone(), &key).await.unwrap();
        let site = Self { vault, store, key, now_ms };
        let site = Self { vault: site.another().await, ..site };
        for n in 1..=machines {
            site.vault.register_machine(machine(n), &format!("host-{n}")).await.unwrap();
        }
        site
    }

    /// The vault as another collector sees it.
    pub async fn another(&self) -> Vault {
        let now_ms = self.now_ms.clone();
        let vault = Vault::open(self.store.clone(), &self.key).await.unwrap();
        vault.with_clock(Clock::new(move || now_ms.load(Ordering::SeqCst)))
    }

    pub fn later(&self, ms: u64) {
        self.now_ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// A point of a machine.
    pub async fn point(&self, n: u8, consistency: Consistency) -> CommitId {
        point_at(&self.vault, n, consistency, TAKEN_MS).await.unwrap()
    }

    pub async fn group(&self, name: &str, members: &[u8]) -> Group {
        let group = Group::new(name, members.iter().map(|n| machine(*n)).collect(), Times::default());
        self.vault.change_groups(|_| Ok(group.clone())).await.unwrap()
    }

    /// All members of a group make a point and report it; answers the marker.
    pub async fn made(&self, group: &Group, members: &[u8], number: u64) -> Marker {
        let marker = marker(members[0], number);
        for n in members {
            let commit = self.point(*n, Consistency::Filesystem).await;
            let state = self.vault.machine(machine(*n)).await.unwrap();
            self.vault.keep_marker(&state, report(group, marker, commit)).await.unwrap();
        }
        marker
    }
}

pub async fn point_at(vault: &Vault, n: u8, consistency: Consistency, taken_at_ms: u64) -> Result<CommitId> {
    let mut writer = vault.writer(machine(n)).await?;
    let size_bytes = 8 * BLOCK_BYTES as u64;
    let disk = DiskId::from_bytes([n + 100; 16]);
    writer.set_disks(vec![DiskRecord { disk, name: "vda".to_owned(), size_bytes }])?;
    writer.begin(DeltaId::new()).await?;
    let extent = Extent { start: Block(0), count: 1, fill: Fill::Data };
    let mut out = Vec::new();
    encode_chunk(disk, &[extent], &content(1), &writer.hash_key(), 1, &mut out).unwrap();
    writer.push(out.into()).await?;
    let disks = vec![PointDisk { disk, size_bytes }];
    let info = PointInfo { consistency, taken_at_ms, freeze_us: 1, disks };
    writer.commit(CommitKind::Point(info)).await
}

pub fn marker(coordinator: u8, number: u64) -> Marker {
    Marker { coordinator: machine(coordinator), life: Life { since: 7, nonce: 9 }, number }
}

pub fn report(group: &Group, marker: Marker, commit: CommitId) -> Report {
    Report { group: group.id, epoch: group.epoch, marker, kind: Kind::Crash, commit, taken_at_ms: TAKEN_MS }
}
