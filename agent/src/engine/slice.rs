//! Copying: initial replication and resynchronization, a bounded slice at a time, so that points of the other disks and
//! operators' requests come in between, and so that what was copied stays copied whatever happens (each slice is
//! committed as progress).

use super::{
    Awaited, Engine, Link, Outgoing,
    disk::Disk,
    send::{OpenDelta, SendError},
    state::DiskState,
};
use highwater_delta::{CommitKind, DeltaId, DiskId};
use highwater_wire::message::{AgentMessage, DeltaCommit};
use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::Instant,
};
use tokio::sync::mpsc;

impl Engine {
    /// Copies a slice of the first disk that needs it; false if none does.
    pub(super) fn copy_slice(&mut self) -> bool {
        let wants = |d: &Disk| {
            matches!(d.state.state(), DiskState::InitialReplication | DiskState::Resynchronizing(_))
                && d.reader.is_some()
        };
        self.finish_copies();
        let Some(at) = self.disks.iter().position(|d| wants(d) && !d.ledger.to_send().is_empty()) else {
            return false;
        };
        let id = self.disks[at].id();
        match self.send_slice(at) {
            Ok(()) => {}
            Err(SendError::LinkDown) => self.wait_for_link_down(),
            Err(error) => self.on_send_error(id, &error),
        }
        true
    }

    fn send_slice(&mut self, at: usize) -> Result<(), SendError> {
        let delta = DeltaId::new();
        let disk = &mut self.disks[at];
        let id = disk.id();
        let compare = matches!(disk.state.state(), DiskState::Resynchronizing(_));
        let most = (self.options.partial_commit_bytes >> (12 + disk.shift)).max(1);
        let taken = disk.ledger.take(delta, 0, most);
        let ranges = disk.blocks(&taken);
        let known = if compare { Some(self.known(id, &ranges).ok_or(SendError::LinkDown)?) } else { None };
        let Link::Up(session) = &self.link else { return Err(SendError::LinkDown) };
        let (queue, key) = (session.queue.clone(), session.key.clone());
        let Some(reader) = &self.disks[at].reader else { return Ok(()) };
        let blocks = ranges.clone();
        let job = reader.read_ranges(ranges);
        let open = OpenDelta {
            delta,
            queue,
            key: &key,
            level: self.options.compression_level,
            encoders: self.options.encoders,
            chunks: AtomicU64::new(0),
            unsent_blocks: AtomicI64::new(0),
            metrics: &self.metrics,
        };
        open.expect(&blocks);
        if open.queue.blocking_send(Outgoing::Message(AgentMessage::DeltaBegin(delta))).is_err() {
            return Err(SendError::LinkDown);
        }
        let different = open.send(id, job, known.as_ref())?;
        open.check_complete()?;
        self.metrics.compared(known.as_ref().map_or(0, |k| k.len() as u64), different);
        let chunks = open.chunks.load(Ordering::Acquire);
        if chunks == 0 {
            // All of it was in the vault already.
            self.tell(AgentMessage::DeltaAbort(delta));
            if let Some(words) = self.disks[at].ledger.stored(delta) {
                let _ = self.tracker.stored(id, &words);
            }
            return Ok(());
        }
        let queue = open.queue.clone();
        self.commit(&queue, delta, chunks, CommitKind::Partial)
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
        let waiting = if point.is_some() { std::mem::take(&mut self.point_wanted) } else { vec![] };
        self.awaited.push_back(Awaited { delta, since: Instant::now(), point, waiting });
        Ok(())
    }

    /// A disk of which nothing is left to send or to be acknowledged has been copied.
    pub(super) fn finish_copies(&mut self) {
        let mut changed = false;
        for disk in &mut self.disks {
            let copying =
                matches!(disk.state.state(), DiskState::InitialReplication | DiskState::Resynchronizing(_));
            if !copying
                || !disk.ledger.to_send().is_empty()
                || disk.ledger.under_way() > 0
                || disk.reader.is_none()
            {
                continue;
            }
            // What was under way and marked again is in the tracker's current or pending bits, and goes into the next point.
            let seconds = disk.copy_began.map_or(0.0, |(began, _)| began.elapsed().as_secs_f64());
            tracing::info!(
                disk = disk.protected.name,
                from = disk.state.state().kind().as_str(),
                seconds,
                "copy complete"
            );
            disk.state.set(DiskState::Bitmap);
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
            self.point_due = Instant::now();
        }
        if changed {
            self.save_registry();
        }
    }

    pub(super) fn on_send_error(&mut self, id: DiskId, error: &SendError) {
        tracing::error!(code = "HW-1463", %error, "sending stopped; everything not stored is sent again");
        self.metrics.error("HW-1463");
        self.forget_under_way();
        if let SendError::Source(disk, source) = error
            && let Some(disk) = self.disk_mut(*disk)
        {
            disk.state.set(DiskState::Error(source.to_string()));
            disk.reader = None;
        } else if let Some(disk) = self.disk_mut(id) {
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
