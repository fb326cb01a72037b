//! The vault's maintenance, now and then: [`highwater_vault::maintain`] for each machine, one after the other.
//!
//! It takes no seat, and its memory is not of `memory`'s budget ([`highwater_vault::maintain`] says how much): it works beside sessions, and beside other collectors of the vault. Of several that
//! find the same to do, one does it, and the others leave the machine to it while it is at it. What a shutdown interrupts is as safe as after a kill.

use crate::rounds::{self, Rounds};
use crate::shared::Shared;
use highwater_delta::{Code, MachineId};
use highwater_vault::maintain::{self, Report, Settings};
use highwater_vault::{Pace, VaultError};
use std::sync::Arc;
use std::time::Duration;

/// Until the first round at most: time to set a policy after an upgrade.
const FIRST_AFTER: Duration = Duration::from_secs(600);

/// How long a machine is left to another collector that was seen at its maintenance: several times what passes between two signs of it.
/// A collector is known by its `state-dir`, over its starts.
const PATIENCE: Duration = Duration::from_secs(900);

/// Runs until the collector ends.
pub async fn run(shared: Arc<Shared>) {
    let every = shared.config.maintenance_every;
    if every.is_zero() {
        return;
    }
    let rate = Some(shared.config.maintenance_rate).filter(|rate| *rate > 0);
    let settings = Settings {
        grace: shared.config.trash_grace,
        pace: Arc::new(Pace::new(rate)),
        state_bytes_max: shared.memory.machine_bytes_max(),
        owner: shared.state.owner(),
        patience: Some(PATIENCE),
        ..Settings::default()
    };
    let mut maintenance = Maintenance { shared: shared.clone(), settings };
    rounds::run(&shared.shutdown, FIRST_AFTER.min(every), &mut maintenance).await;
}

struct Maintenance {
    shared: Arc<Shared>,
    settings: Settings,
}

impl Rounds for Maintenance {
    async fn round(&mut self) -> Duration {
        round(&self.shared, &self.settings).await;
        self.shared.config.maintenance_every
    }
}

/// All machines once. One that fails keeps none of the others from theirs.
async fn round(shared: &Shared, settings: &Settings) {
    let machines = match shared.vault.machines().await {
        Ok(machines) => machines,
        Err(error) => return failed(shared, None, &error),
    };
    for machine in machines {
        match maintain::machine(&shared.vault, machine, settings, &()).await {
            Ok(report) => done(shared, machine, &report),
            // Another collector, or an operator's command, is at it.
            Err(VaultError::Maintained(_)) => {}
            Err(error) => failed(shared, Some(machine), &error),
        }
    }
}

fn done(shared: &Shared, machine: MachineId, report: &Report) {
    shared.metrics.maintenance.done(report);
    if report.is_empty() {
        return;
    }
    tracing::info!(
        %machine,
        expired = report.expired,
        merged_runs = report.merged_runs,
        shortcuts = report.shortcuts,
        written_bytes = report.written_bytes,
        deleted_bytes = report.deleted_bytes,
        records_deleted = report.pruned,
        locked = report.locked,
        "maintained"
    );
}

fn failed(shared: &Shared, machine: Option<MachineId>, error: &VaultError) {
    shared.metrics.maintenance.failed();
    let machine = machine.map(|machine| machine.to_string()).unwrap_or_default();
    let action = error.action();
    tracing::warn!(machine, code = %Code(error.code()), %error, action, "maintenance failed; it is tried again");
}
