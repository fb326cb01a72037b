//! Copying: initial replication and resynchronization, a bounded slice at a time, so that points of the other disks and
//! operators' requests come in between, and so that what was copied stays copied whatever happens (each slice is
//! committed as progress).

use super::{
    Awaited, Engine, Link, Outgoing, disk::Disk, send::SendError, state::DiskState, trouble::Trouble,
};
use crate::{error::Coded, source::SourceError};
use highwater_delta::{CommitKind, DeltaId, DiskId};
use highwater_wire::message::{AgentMessage, DeltaCommit};
use std::{sync::atomic::Ordering, time::Instant};
use tokio::sync::mpsc;

impl Engine {
    /// Copies a slice of the first disk that needs it; false if none does.
    pub(super) fn copy_slice(&mut self) -> bool {
        self.finish_copies();
        let wants = |d: &Disk| self.is_copying(d) && d.device.is_some();
        let Some(at) = self.disks.iter().position(|d| wants(d) && !d.ledger.to_send().is_empty()) else {
            return false;
        };
        let id = self.disks[at].id();
        match self.send_slice(id) {
            Ok(()) => {}
            Err(SendError::LinkDown) => self.wait_for_link_down(),
            Err(SendError::Source(id, error)) => self.unreadable(id, &error),
            Err(error) => self.on_send_error(id, &error),
        }
        true
    }

    /// A disk is known by its id alone here: while the collector's hashes are awaited, the session is heard, and any disk can
    /// change.
    fn send_slice(&mut self, id: DiskId) -> Result<(), SendError> {
        self.board.put(self.status());
        self.pulse.work();
        let delta = DeltaId::new();
        let slice_bytes = self.options.partial_commit_bytes;
        let Some(disk) = self.disk_mut(id) else { return Ok(()) };
        let asked_of = disk.device.clone();
        let compare = matches!(disk.state.state(), DiskState::Resynchronizing(_));
        let most = (slice_bytes >> (12 + disk.shift)).max(1);
        let taken = disk.ledger.take(delta, 0, most);
        let ranges = disk.blocks(&taken);
        let known = if compare { Some(self.known(id, &ranges).ok_or(SendError::LinkDown)?) } else { None };
        let open = self.open_delta(delta)?;
        let (readers, pool) = (self.options.readers, self.pool.clone());
        // What was taken from its ledger is pending still, if it is another disk now, or none.
        let Some(disk) = self.disk_mut(id).filter(|d| d.device == asked_of) else { return Ok(()) };
        let Some(reader) = disk.open(readers, &pool) else { return Ok(()) };
        let reader = reader.map_err(|e| SendError::Source(id, e))?;
        self.pulse.work();
        let blocks = ranges.clone();
        self.ordered.will_read(id, &blocks);
        let job = reader.read_ranges(ranges);
        open.expect(&blocks);
        open.begin()?;
        let sent = open.send(id, job, known.as_ref());
        drop(reader);
        self.ordered.was_read(id, &blocks);
        if let Err(SendError::Source(..)) = &sent {
            // In the order of the queue: after every chunk of it.
            let abort = Outgoing::Message(AgentMessage::DeltaAbort(delta));
            open.queue.blocking_send(abort).map_err(|_| SendError::LinkDown)?;
        }
        let different = sent?;
        open.check_complete()?;
        self.metrics.compared(known.as_ref().map_or(0, |k| k.len() as u64), different);
        let chunks = open.chunks.load(Ordering::Acquire);
        if chunks == 0 {
            // All of it was in the vault already.
            self.tell(AgentMessage::DeltaAbort(delta));
            if let Some(words) = self.disk_mut(id).and_then(|d| d.ledger.stored(delta)) {
                let _ = self.tracker.stored(id, &words);
            }
            return Ok(());
        }
        let queue = open.queue.clone();
        self.commit(&queue, delta, chunks, CommitKind::Partial)
    }

    /// Whether a disk is being read: for its first copy, to be compared, or to enter write-ordered mode.
    fn is_copying(&self, disk: &Disk) -> bool {
        match disk.state.state() {
            DiskState::InitialReplication | DiskState::Resynchronizing(_) => true,
            DiskState::Bitmap => self.ordered.captures(disk.id()),
            _ => false,
        }
    }

    /// Closes a delta, in the session in which it was opened, and awaits that it is stored.
    pub(super) fn commit(
        &mut self,
        queue: &mpsc::Sender<Outgoing>,
        delta: DeltaId,
        chunks: u64,
        kind: CommitKind,
    ) -> Result<(), SendError> {
        let point = match &kind {
            CommitKind::Point(info) => Some(info.clone()),
            CommitKind::Partial => None,
        };
        let message = AgentMessage::DeltaCommit(DeltaCommit { delta, chunks, kind });
        queue.blocking_send(Outgoing::Message(message)).map_err(|_| SendError::LinkDown)?;
        // Who asked for the applications to stand still is not answered by a point that comes in between.
        let answers = point.is_some() && !self.applications.hold_back();
        let waiting = if answers { std::mem::take(&mut self.point_wanted) } else { vec![] };
        let marker = if point.is_some() { self.group.committed() } else { None };
        self.awaited.push_back(Awaited { delta, since: Instant::now(), point, marker, waiting });
        Ok(())
    }

    /// A disk of which nothing is left to send or to be acknowledged has been copied.
    pub(super) fn finish_copies(&mut self) {
        let mut changed = false;
        let copying: Vec<bool> = self.disks.iter().map(|d| self.is_copying(d)).collect();
        for (disk, copying) in self.disks.iter_mut().zip(copying) {
            if !copying
                || !disk.ledger.to_send().is_empty()
                || disk.ledger.under_way() > 0
                || disk.device.is_none()
            {
                continue;
            }
            // What was under way and marked again is in the tracker's current or pending bits, and goes into the next point.
            let captured = self.ordered.captures(disk.id());
            let seconds = disk.copy_began.map_or(0.0, |(began, _)| began.elapsed().as_secs_f64());
            tracing::info!(
                disk = disk.protected.name,
                from = disk.state.state().kind().as_str(),
                seconds,
                captured,
                "copy complete"
            );
            disk.state.set(if captured { DiskState::WriteOrdered } else { DiskState::Bitmap });
            disk.copy_began = None;
            for known in &mut self.registry.disks {
                if known.disk == disk.protected.disk && !known.replicated {
                    known.replicated = true;
                    changed = true;
                }
            }
            disk.protected.replicated = true;
            self.doubts.settle(disk.protected.disk);
            // The first point follows at once.
            if captured {
                self.ordered.due = Instant::now();
            } else {
                self.point_due = Instant::now();
            }
        }
        if changed {
            self.save_registry();
        }
    }

    /// A disk could not be read. The delta that it was read for is aborted already; all that is marked stays so, and the disk is
    /// left out until it can be read again.
    pub(super) fn unreadable(&mut self, id: DiskId, error: &SourceError) {
        self.forget_taken();
        let code = format!("HW-{}", error.code());
        let Some(at) = self.disks.iter().position(|d| d.id() == id) else { return };
        if error.is_fatal() {
            // Perhaps it is away, or another size: that is told by its own name.
            let known = self.disks[at].device.clone();
            self.look_at(at, "its device had vanished");
            if self.disks[at].device != known {
                return;
            }
        }
        let disk = &mut self.disks[at];
        tracing::error!(code, disk = disk.protected.name, cause = %error.operator().cause,
            "the disk cannot be read; it is left out of recovery points until it can be");
        disk.trouble = Some(Trouble::new(error, disk.trouble.as_ref()));
        disk.state.set(DiskState::Unreadable(error.operator().to_string()));
    }

    pub(super) fn on_send_error(&mut self, id: DiskId, error: &SendError) {
        tracing::error!(code = "HW-1463", %error, "sending stopped; everything not stored is sent again");
        self.lose_order();
        self.forget_under_way();
        if let Some(disk) = self.disk_mut(id) {
            tracing::warn!(disk = disk.protected.name, "sending is tried again");
        }
        // The open delta of this session is spoilt: begin anew.
        self.tell(AgentMessage::Goodbye);
        self.link = Link::Down(None);
    }

    /// The queue was closed: the reason is under way.
    pub(super) fn wait_for_link_down(&mut self) {
        self.forget_under_way();
        if matches!(self.link, Link::Up(_)) {
            self.link = Link::Down(None);
        }
    }
}
