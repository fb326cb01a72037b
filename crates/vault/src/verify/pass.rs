//! One verification from begin to end, over any number of processes.

use super::{Place, Report, Sample, entries::Indexes, machine, strangers};
use crate::{Pace, Result, Vault, VaultError, runs::Kind, store};
use async_trait::async_trait;
use futures::TryStreamExt;
use highwater_delta::{MachineId, SegmentId, VaultId};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};

/// How it is to be done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How fast it may read.
    pub pace: Arc<Pace>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { pace: Arc::new(Pace::new(None)) }
    }
}

/// Is told how far it is.
#[async_trait]
pub trait Watch: Send + Sync {
    /// So many bytes were read, of so many that there were at the begin of this process.
    fn at(&self, read: u64, of: u64) {
        let _ = (read, of);
    }
    /// Something more is done: what to go on with after an interruption. Called after each object.
    ///
    /// # Errors
    /// End the verification.
    async fn done(&self, pass: &Pass) -> Result<()> {
        let _ = pass;
        Ok(())
    }
}
impl Watch for () {}

/// See [`crate::verify`]. Whatever happens to [`Pass::run`], it is as of the last object that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Pass {
    vault: VaultId,
    /// One machine only.
    machine: Option<MachineId>,
    sample: Option<Sample>,
    begun_ms: u64,
    documents: bool,
    /// Machines up to this one, in the order of their ids.
    machines_through: Option<MachineId>,
    current: Option<Current>,
    report: Report,
}

/// The machine that it is at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Current {
    pub(super) machine: MachineId,
    /// Its records were counted.
    pub(super) counted: bool,
    /// Objects of each kind up to this one, in the order of their ids. What was written since the begin comes behind, but for what
    /// clocks that differ do to ids.
    pub(super) through: BTreeMap<Kind, SegmentId>,
}

impl Pass {
    /// One that has done nothing yet, over one machine or all, in full or by a sample.
    #[must_use]
    pub fn new(vault: &Vault, machine: Option<MachineId>, sample: Option<Sample>) -> Self {
        Self {
            vault: vault.id(),
            machine,
            sample,
            begun_ms: vault.now_ms(),
            documents: false,
            machines_through: None,
            current: None,
            report: Report::default(),
        }
    }

    /// Whether it can be gone on with for this; else what differs.
    pub fn fits(
        &self,
        vault: &Vault,
        machine: Option<MachineId>,
        sample: Option<Sample>,
    ) -> Result<(), &'static str> {
        if self.vault != vault.id() {
            return Err("its vault is another one");
        }
        if self.machine != machine {
            return Err("it is of another machine, or of all");
        }
        if self.sample != sample {
            return Err("its sample is another one");
        }
        Ok(())
    }

    /// When it was begun, in milliseconds since 1970.
    #[must_use]
    pub const fn begun_ms(&self) -> u64 {
        self.begun_ms
    }
    /// The sample that it reads, if not all.
    #[must_use]
    pub const fn sample(&self) -> Option<Sample> {
        self.sample
    }
    /// What was found so far.
    #[must_use]
    pub const fn report(&self) -> &Report {
        &self.report
    }

    /// Does what is left to do.
    ///
    /// # Errors
    /// The store failed, or whoever watches; both can be tried again with what is done then.
    pub async fn run(&mut self, vault: &Vault, settings: &Settings, watch: &dyn Watch) -> Result<Report> {
        if let Err(cause) = self.fits(vault, self.machine, self.sample) {
            return Err(VaultError::Order(cause));
        }
        if self.machine.is_none() && !self.documents {
            let mut own = Report::default();
            for name in vault.control_list("").await? {
                own.control_documents += 1;
                let read = vault.control_get(&name).await;
                own.keep(None, read)?;
            }
            strangers::note(vault, &mut own).await?;
            self.report.absorb(own);
            self.documents = true;
            watch.done(self).await?;
        }
        let machines = match self.machine {
            Some(machine) => vec![machine],
            None => vault.machines().await?,
        };
        let mut all = 0;
        for machine in &machines {
            all += bytes_of(vault, *machine, self.sample).await?;
        }
        let mut indexes = Indexes::default();
        for machine in machines {
            if self.machines_through.is_some_and(|through| machine <= through) {
                continue;
            }
            self.one(vault, machine, settings, &Told { watch, all }, &mut indexes).await?;
            self.machines_through = Some(machine);
            self.current = None;
            watch.done(self).await?;
        }
        Ok(self.report.clone())
    }

    async fn one(
        &mut self,
        vault: &Vault,
        machine: MachineId,
        settings: &Settings,
        told: &Told<'_>,
        indexes: &mut Indexes,
    ) -> Result<()> {
        let mut own = Report { machines: 1, ..Report::default() };
        let keys = match vault.machine_keys(machine).await {
            // Meanwhile: there is nothing to be read, and nothing is lost that should be there.
            Err(VaultError::Erased(_)) => return Ok(()),
            // There is a folder of it.
            Err(VaultError::UnknownMachine(_)) => {
                let object = store::key_path(machine).to_string();
                own.keep(Some(machine), Err(VaultError::Missing { object }))?
            }
            other => own.keep(Some(machine), other)?,
        };
        let Some((keys, host_name)) = keys else {
            self.report.absorb(own);
            return Ok(());
        };
        let place = Place { vault, machine, keys: &keys, pace: &settings.pace };
        if self.current.as_ref().is_none_or(|current| current.machine != machine) {
            self.current = Some(Current { machine, counted: false, through: BTreeMap::new() });
        }
        machine::verify(&place, host_name, own, self, told, indexes).await
    }

    pub(super) fn current(&mut self) -> Option<&mut Current> {
        self.current.as_mut()
    }
    pub(super) fn absorb(&mut self, own: Report) {
        self.report.absorb(own);
    }
}

/// Whoever watches, and how much there is.
pub(super) struct Told<'a> {
    watch: &'a dyn Watch,
    all: u64,
}

impl Told<'_> {
    pub(super) async fn done(&self, pass: &Pass) -> Result<()> {
        self.watch.at(pass.report.bytes, self.all.max(pass.report.bytes));
        self.watch.done(pass).await
    }
}

/// Bytes of a machine's segments and maps, as far as they are read.
async fn bytes_of(vault: &Vault, machine: MachineId, sample: Option<Sample>) -> Result<u64> {
    let listed = vault.store().list(Some(&crate::store::machine_dir(machine)));
    let all = listed.try_fold(0_u64, async |sum, meta| {
        let id = crate::store::segment_of(&meta.location);
        let is_read = id.is_some_and(|id| sample.is_none_or(|sample| sample.takes(id)));
        Ok(if is_read { sum.saturating_add(meta.size) } else { sum })
    });
    Ok(all.await?)
}
