//! Beginning and ending protection; finding devices again; what a disk's state becomes when tracking begins.

use super::{
    Engine,
    disk::{Disk, granules},
    ledger::Ledger,
    registry::Protected,
    state::DiskState,
};
use crate::{
    device::{self, BlockDevice, Hook, StableIdentity},
    error::{Coded, OperatorError},
    mounts,
    tracker::TrackerError,
};
use highwater_delta::DiskId;
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// How long writes that were under way when tracking began are waited for, on devices where their completion is not seen.
const SETTLE_MAX: Duration = Duration::from_secs(30);

impl Engine {
    /// At start: takes up every protected disk. `fresh`: why the programs were not taken over.
    pub(super) fn adopt(&mut self, fresh: Option<&str>) {
        for protected in self.registry.disks.clone() {
            self.disks.push(Disk::new(protected, DiskState::Error("not looked for yet".into())));
        }
        let reason = fresh.map_or("its device was not tracked", |f| f).to_owned();
        for at in 0..self.disks.len() {
            self.look_at(at, &reason);
        }
    }

    /// Looks whether devices are still there and as they were.
    pub(super) fn look_at_devices(&mut self) {
        for at in 0..self.disks.len() {
            self.look_at(at, "its device had vanished");
        }
    }

    pub(super) fn look_at(&mut self, at: usize, reason: &str) {
        let disk = &self.disks[at];
        let id = disk.id();
        let found = match device::find(&disk.protected.identity) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(disk = disk.protected.name, %error, "looking for the device failed");
                return;
            }
        };
        let Some(found) = found else {
            if disk.device.is_some() || *disk.state.state() == DiskState::Error("not looked for yet".into()) {
                tracing::error!(code = "HW-1468", disk = disk.protected.name, "the device is not there");
                let _ = self.tracker.unprotect(id);
                let disk = &mut self.disks[at];
                // One that failed before it vanished is no reason to stop the points of the others now.
                if !failed_by_itself(disk) {
                    let gone = operator(
                        1468,
                        "its device is not there".into(),
                        "Attach it again, under any path, or unprotect the disk if it is gone for good",
                    );
                    disk.state.set(DiskState::Error(gone.to_string()));
                }
                disk.device = None;
            }
            return;
        };
        let disk = &self.disks[at];
        match &disk.device {
            Some(known) if same_device(known, &found) && known.size_bytes == found.size_bytes => {
                self.try_again(at);
            }
            Some(known) if same_device(known, &found) => {
                let reason =
                    format!("its size changed from {} to {} bytes", known.size_bytes, found.size_bytes);
                tracing::warn!(disk = disk.protected.name, reason, "the disk is tracked anew and compared");
                self.track_anew(at, found, &reason);
                self.announce();
            }
            Some(_) => self.track_anew(at, found, "its device was replaced"),
            None => self.take_up(at, found, reason),
        }
    }

    /// A disk was found for which this process has no device yet.
    fn take_up(&mut self, at: usize, found: BlockDevice, reason: &str) {
        let id = self.disks[at].id();
        let tracked =
            self.tracker.disks().find(|(record, _)| record.disk == id).is_some_and(|(record, diskseq)| {
                record.dev == found.whole_kernel_dev()
                    && record.start == found.start_sector
                    && record.sectors == found.sectors()
                    && diskseq == found.diskseq
            });
        if !tracked {
            return self.track_anew(at, found, reason);
        }
        let (Ok(shift), Ok(pending)) = (self.tracker.blocks_shift(id), self.tracker.pending(id)) else {
            return self.track_anew(at, found, reason);
        };
        let disk = &mut self.disks[at];
        disk.shift = shift;
        disk.ledger = Ledger::new(granules(found.size_bytes, shift), &pending);
        disk.device = Some(found);
        self.leave_out_swap_of(at);
        self.resume(at, "tracking taken over");
    }

    /// A disk whose bits are whole goes on where it was: a first copy or a comparison that was interrupted too, since its
    /// pending bits say what is missing.
    fn resume(&mut self, at: usize, why: &str) {
        let disk = &mut self.disks[at];
        let doubt = self.doubts.of(disk.id()).cloned();
        let state = match &doubt {
            _ if !disk.protected.replicated => DiskState::InitialReplication,
            None => DiskState::Bitmap,
            Some(doubt) if doubt.comparing => DiskState::Resynchronizing(doubt.reason.clone()),
            Some(doubt) => DiskState::Suspect(doubt.reason.clone()),
        };
        let (name, pending) = (&disk.protected.name, disk.ledger.to_send().count());
        tracing::info!(disk = name, state = state.kind().as_str(), pending, "{why}");
        disk.copy_began = Some((Instant::now(), pending));
        disk.state.set(state);
        if let Some(doubt) = doubt.filter(|d| !d.comparing) {
            self.suspect(at, doubt.reason);
        }
    }

    /// Whether a disk that could not be read can be read again.
    fn try_again(&mut self, at: usize) {
        let disk = &mut self.disks[at];
        let (DiskState::Unreadable(_), Some(device)) = (disk.state.state(), &disk.device) else { return };
        if disk.trouble.as_mut().is_none_or(|trouble| trouble.is_over(device)) {
            self.resume(at, "the disk can be read again");
        }
    }

    /// Nothing that happened to the disk before now is known.
    fn track_anew(&mut self, at: usize, found: BlockDevice, reason: &str) {
        let id = self.disks[at].id();
        let replicated = self.disks[at].protected.replicated;
        if let Err(error) = self.begin_tracking(at, found) {
            return self.untracked(at, &error);
        }
        if replicated {
            self.suspect(at, reason.to_owned());
        } else {
            self.start_initial(id);
        }
    }

    pub(super) fn untracked(&mut self, at: usize, error: &TrackerError) {
        let error = error.operator();
        let disk = &mut self.disks[at];
        tracing::error!(
            code = format!("HW-{}", error.code),
            disk = disk.protected.name,
            cause = error.cause,
            "the disk cannot be tracked"
        );
        disk.state.set(DiskState::Error(error.to_string()));
        // Looked for and tracked anew, as one that was away.
        disk.device = None;
    }

    pub(super) fn begin_tracking(&mut self, at: usize, found: BlockDevice) -> Result<(), TrackerError> {
        let id = self.disks[at].id();
        self.tracker.protect(id, &found)?;
        if found.hook == Hook::Bio {
            self.pulse.work();
            settle(&found);
        }
        let shift = self.tracker.blocks_shift(id)?;
        let disk = &mut self.disks[at];
        disk.shift = shift;
        disk.ledger = Ledger::new(granules(found.size_bytes, shift), &[]);
        disk.protected.size_bytes = found.size_bytes;
        disk.device = Some(found);
        Ok(())
    }

    /// Everything is to be sent, whatever the vault holds.
    pub(super) fn start_initial(&mut self, id: DiskId) {
        self.start_copy(id, DiskState::InitialReplication);
    }

    /// Everything is to be compared with the vault.
    pub(super) fn start_resync(&mut self, id: DiskId, reason: String) {
        let replicated = self.disks.iter().any(|d| d.id() == id && d.protected.replicated);
        if replicated {
            self.metrics.resync();
            self.start_copy(id, DiskState::Resynchronizing(reason));
        }
    }

    fn start_copy(&mut self, id: DiskId, state: DiskState) {
        let Some(at) = self.disks.iter().position(|d| d.id() == id) else { return };
        if self.disks[at].device.is_none() {
            return;
        }
        let marked = self.tracker.mark_all(id).and_then(|()| self.tracker.pending(id));
        match marked {
            Ok(pending) => {
                if let DiskState::Resynchronizing(reason) = &state {
                    self.doubts.comparing(id, reason.clone());
                }
                let disk = &mut self.disks[at];
                disk.ledger.reset(&pending);
                disk.state.set(state);
            }
            Err(error) => {
                // Its bits cannot be taken for whole: tracked anew, as one that was away.
                let _ = self.tracker.unprotect(id);
                return self.untracked(at, &error);
            }
        }
        self.leave_out_swap_of(at);
        let disk = &mut self.disks[at];
        disk.copy_began = Some((Instant::now(), disk.ledger.to_send().count()));
    }

    fn leave_out_swap_of(&mut self, at: usize) {
        let Some(device) = self.disks[at].device.clone() else { return };
        match mounts::survey(&[device]) {
            Ok(survey) => self.leave_out_swap(&[self.disks[at].id()], &survey),
            Err(error) => {
                tracing::warn!(%error, "what lies on the disk could not be found out; all of it is copied")
            }
        }
    }

    pub(super) fn protect(
        &mut self,
        path: &Path,
        name: Option<String>,
    ) -> Result<(usize, Vec<String>), OperatorError> {
        let device = device::inspect(path)?;
        device::admit(&device)?;
        let identity = StableIdentity::of(&device)?;
        if let Some(known) = self.disks.iter().find(|d| d.protected.identity == identity) {
            return Err(operator(
                1470,
                format!("{} is protected already, as disk {}", path.display(), known.id()),
                "see `highwater-agent status`",
            ));
        }
        let mut notes = vec![];
        if identity.is_weak() {
            notes.push(
                "this device has no identity of its own: after a reboot it may not be found again".to_owned(),
            );
        }
        let name = name.unwrap_or_else(|| device.name.clone());
        if name.is_empty()
            || name.len() > highwater_wire::message::MAX_NAME_BYTES
            || name.chars().any(char::is_control)
        {
            return Err(operator(
                1471,
                format!("{name:?} cannot be a disk's name"),
                "give 1 to 255 printable characters",
            ));
        }
        if self.disks.iter().any(|d| d.protected.name == name) {
            return Err(operator(
                1471,
                format!("another disk has the name {name}"),
                "give another with --name",
            ));
        }
        let protected = Protected {
            disk: DiskId::new(),
            name,
            identity,
            size_bytes: device.size_bytes,
            replicated: false,
        };
        self.registry.disks.push(protected.clone());
        if let Err(error) = self.registry.save(&self.options.state_dir) {
            self.registry.disks.pop();
            return Err(operator(
                1461,
                format!("cannot write the list of protected disks: {error}"),
                "check the state directory",
            ));
        }
        self.disks.push(Disk::new(protected, DiskState::InitialReplication));
        let at = self.disks.len() - 1;
        if let Err(error) = self.begin_tracking(at, device) {
            self.disks.pop();
            self.registry.disks.pop();
            self.save_registry();
            return Err(error.operator());
        }
        self.start_initial(self.disks[at].id());
        if !self.disks[at].has_filesystem {
            notes.push("no mounted filesystem lies on it: its points are crash-consistent, and in bitmap mode they are possible only when nothing writes while a round ends, or with a freeze hook".into());
        }
        tracing::info!(disk = self.disks[at].protected.name, id = %self.disks[at].id(), path = %path.display(), "protected");
        self.announce();
        Ok((at, notes))
    }

    pub(super) fn unprotect(&mut self, which: &str) -> Result<String, OperatorError> {
        let at = self.find_disk(which)?;
        let disk = self.disks.remove(at);
        self.doubts.settle(disk.id());
        self.registry.disks.retain(|d| d.disk != disk.id());
        self.save_registry();
        if let Err(error) = self.tracker.unprotect(disk.id())
            && !matches!(error, TrackerError::Unknown(_))
        {
            return Err(error.operator());
        }
        tracing::info!(disk = disk.protected.name, id = %disk.id(), "unprotected");
        Ok(format!(
            "Disk {} ({}) is no longer protected. Its recovery points stay in the vault.",
            disk.protected.name,
            disk.id()
        ))
    }

    /// By id, name or path.
    pub(super) fn find_disk(&self, which: &str) -> Result<usize, OperatorError> {
        let by_path = device::inspect(Path::new(which)).ok();
        self.disks
            .iter()
            .position(|d| {
                d.id().to_string() == which
                    || d.protected.name == which
                    || by_path
                        .as_ref()
                        .is_some_and(|p| d.device.as_ref().is_some_and(|have| have.dev == p.dev))
            })
            .ok_or_else(|| {
                operator(1472, format!("no protected disk is called {which}"), "see `highwater-agent status`")
            })
    }
}

pub(super) fn operator(code: u16, cause: String, action: &str) -> OperatorError {
    OperatorError { code, cause, action: action.to_owned() }
}

/// Whether a disk could not be read, the last time it was known.
fn failed_by_itself(disk: &Disk) -> bool {
    matches!(disk.state.state(), DiskState::Unreadable(_))
}

fn same_device(a: &BlockDevice, b: &BlockDevice) -> bool {
    a.dev == b.dev && a.diskseq == b.diskseq && a.start_sector == b.start_sector
}

/// Writes to a bio-based device that were submitted before tracking began complete unseen; copying must not begin before
/// they are over.
fn settle(device: &BlockDevice) {
    let until = Instant::now() + SETTLE_MAX;
    while Instant::now() < until {
        match device::inflight(device.whole) {
            Ok((_, 0)) | Err(_) => return,
            Ok(_) => std::thread::park_timeout(Duration::from_micros(200)),
        }
    }
    tracing::warn!(device = %device.path.display(), seconds = SETTLE_MAX.as_secs(),
        "writes were in flight all the time; those older than this wait are taken to be over");
}
