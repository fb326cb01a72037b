//! What the collector says, and what follows from it.

use super::{
    Engine, LastPoint, Link, Session,
    link::{LinkDown, LinkEvent, Outgoing},
    registry::Acknowledged,
    state::DiskState,
};
use highwater_delta::{BlockRange, CommitId, Consistency, DeltaId, DiskId, StoredBlock};
use highwater_wire::{
    Version,
    message::{AgentMessage, CollectorMessage, DiskInfo, MAX_HASH_BLOCKS, Welcome},
};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// How long an answer to a question about hashes is waited for.
const HASHES_MAX: Duration = Duration::from_secs(60);

/// The same, where there is no need for it.
const HASHES_IDLE_MAX: Duration = Duration::from_secs(2);

/// How an answer is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It is needed.
    Long,
    /// Only as long as there is nothing else to do.
    Idle,
}

/// How consistent a point is, for who waits for it.
fn rank(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Crash => "It is crash-consistent: not all disks have a mounted filesystem.",
        Consistency::Filesystem => "It is filesystem-consistent.",
        Consistency::Application => "It is application-consistent.",
    }
}

impl Engine {
    pub(super) fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(welcome, queue) => self.on_up(*welcome, queue),
            LinkEvent::Message(message) => self.on_message(*message),
            LinkEvent::Down(down) => self.on_down(down),
        }
    }

    fn on_up(&mut self, welcome: Welcome, queue: mpsc::Sender<Outgoing>) {
        tracing::info!(vault = %welcome.vault, last_commit = %welcome.last_commit, "connected to the collector");
        // What an earlier session left unacknowledged is sent again; if it was stored after all, that is harmless.
        self.forget_under_way();
        if let Some(known) = self.acknowledged {
            let reason = if known.vault != welcome.vault {
                Some("another vault stands behind the collector")
            } else if welcome.last_commit < known.commit {
                Some("the vault lacks what it had acknowledged as stored")
            } else {
                None
            };
            if let Some(reason) = reason {
                tracing::error!(code = "HW-1462", reason, "all disks are compared with the vault");
                for at in 0..self.disks.len() {
                    let id = self.disks[at].id();
                    if self.disks[at].protected.replicated {
                        self.start_resync(id, reason.to_owned());
                    } else {
                        // What was copied so far may be lost.
                        self.start_initial(id);
                    }
                }
            }
        }
        if self.last_point.as_ref().is_some_and(|p| !p.is_in(welcome.vault, welcome.last_commit)) {
            self.last_point = None;
            self.kept.forget(&self.options.run_dir, &self.options.state_dir);
        }
        self.link = Link::Up(Session {
            queue,
            key: welcome.hash_key,
            vault: welcome.vault,
            since: Instant::now(),
            knows_groups: welcome.version >= Version::V3.number(),
        });
        self.remember(welcome.vault, welcome.last_commit);
        let unknown: Vec<DiskId> = (self.disks.iter().filter(|d| !welcome.disks.contains(&d.id())))
            .filter(|d| {
                matches!(
                    d.state.state(),
                    DiskState::Bitmap | DiskState::WriteOrdered | DiskState::Unreadable(_)
                )
            })
            .map(super::disk::Disk::id)
            .collect();
        for id in unknown {
            self.start_initial(id);
        }
        self.announce();
        for waiting in std::mem::take(&mut self.attempt_wanted) {
            self.want_point(waiting);
        }
    }

    /// Tells the collector what the machine's disks are.
    pub(super) fn announce(&mut self) {
        let disks = (self.disks.iter())
            .map(|d| DiskInfo { disk: d.id(), name: d.protected.name.clone(), size_bytes: d.size_bytes() })
            .collect();
        self.tell(AgentMessage::Disks(disks));
    }

    pub(super) fn tell(&mut self, message: AgentMessage) -> bool {
        // The queue may be full.
        self.pulse.work();
        match &self.link {
            Link::Up(session) => session.queue.blocking_send(Outgoing::Message(message)).is_ok(),
            Link::Down(_) => false,
        }
    }

    fn on_message(&mut self, message: CollectorMessage) {
        match message {
            CollectorMessage::Stored { delta, commit } => self.on_stored(delta, commit),
            // Only what was asked for is kept, or a collector could fill the memory.
            CollectorMessage::Hashes { disk, range, blocks } if self.asked == Some((disk, range)) => {
                self.hashes = Some(blocks);
            }
            CollectorMessage::PointWanted { request, group: None, application } => {
                self.point_asked(request, application);
            }
            CollectorMessage::Refused(refusal) => {
                tracing::error!(
                    code = format!("HW-{}", refusal.code),
                    cause = refusal.cause,
                    action = refusal.action,
                    "the collector refused"
                );
                // Which delta it was does not matter: everything not stored is sent again, in a new session.
                let down = LinkDown::refusal(&refusal);
                self.refused(&down);
                self.link = Link::Down(Some(down));
            }
            _ => {}
        }
    }

    fn on_stored(&mut self, delta: DeltaId, commit: CommitId) {
        for disk in &mut self.disks {
            let id = disk.id();
            if let Some(words) = disk.ledger.stored(delta)
                && let Err(error) = self.tracker.stored(id, &words)
            {
                tracing::warn!(%error, "a stored delta's bits could not be cleared; they are sent again");
            }
        }
        if let Link::Up(session) = &self.link {
            let vault = session.vault;
            self.remember(vault, commit);
        }
        let Some(at) = self.awaited.iter().position(|a| a.delta == delta) else { return };
        if let Some(awaited) = self.awaited.remove(at)
            && let Some(info) = awaited.point
        {
            let at = UNIX_EPOCH + Duration::from_millis(info.taken_at_ms);
            let age = SystemTime::now().duration_since(at).unwrap_or_default();
            tracing::info!(point = %commit, consistency = ?info.consistency, freeze_us = info.freeze_us,
                stored_after_ms = age.as_millis() as u64, "recovery point stored");
            self.metrics.point(&info, age);
            if let Some(marker) = awaited.marker {
                self.group.stored(marker, commit, info.taken_at_ms);
            }
            let answer = crate::control::Response::Done {
                message: format!("Recovery point {commit} is stored. {}", rank(info.consistency)),
                point: Some(commit),
            };
            // Known since the first welcome. Before it is told: who was told may count on its being remembered.
            if let Some(Acknowledged { vault, .. }) = self.acknowledged {
                self.note_point(LastPoint { vault, commit, info });
            }
            for waiting in awaited.waiting {
                let _ = waiting.send(answer.clone());
            }
        }
        self.refusal = None;
        self.finish_copies();
    }

    fn note_point(&mut self, point: LastPoint) {
        if let Err(error) = self.kept.note(&point, &self.options.run_dir, &self.options.state_dir) {
            tracing::warn!(%error, "cannot note the last recovery point; after a restart its age is not known");
        }
        self.last_point = Some(point);
    }

    fn on_down(&mut self, down: LinkDown) {
        let was_up = matches!(self.link, Link::Up(_));
        let retry = format!("{:.1} s", down.retry_in.as_secs_f64());
        if down.critical {
            tracing::error!(
                code = format!("HW-{}", down.code),
                cause = down.cause,
                action = down.action,
                retry,
                "the collector cannot be used"
            );
        } else if was_up {
            tracing::warn!(
                code = format!("HW-{}", down.code),
                cause = down.cause,
                retry,
                "disconnected from the collector"
            );
        } else {
            tracing::warn!(
                code = format!("HW-{}", down.code),
                cause = down.cause,
                retry,
                "no connection to the collector"
            );
        }
        self.metrics.down(down.code);
        if down.refused {
            self.refused(&down);
        } else {
            self.forget_under_way();
        }
        // A session that ended is no attempt: the one that was asked for follows at once.
        if down.attempt || down.critical {
            for waiting in std::mem::take(&mut self.attempt_wanted) {
                let _ = waiting.send(crate::control::Response::Error(down.operator()));
            }
        }
        self.link = Link::Down(Some(down));
    }

    /// Trying again may be refused again for as long as nobody acts: whoever waits is told now.
    fn refused(&mut self, down: &LinkDown) {
        self.forget_under_way();
        for waiting in std::mem::take(&mut self.point_wanted) {
            let _ = waiting.send(crate::control::Response::Error(down.operator()));
        }
        self.refusal = Some(down.operator());
    }

    /// Nothing under way will be acknowledged any more.
    pub(super) fn forget_under_way(&mut self) {
        self.lose_order();
        // Whoever waits for a point waits for the next one.
        for awaited in std::mem::take(&mut self.awaited) {
            self.point_wanted.extend(awaited.waiting);
            if let Some(marker) = awaited.marker {
                self.group.lost(marker);
            }
        }
        self.hashes = None;
        for disk in &mut self.disks {
            match self.tracker.pending(disk.protected.disk) {
                Ok(pending) => disk.ledger.reset(&pending),
                // Not tracked now: its device is gone, and it will be compared when it is back.
                Err(_) => disk.ledger.reset(&[]),
            }
        }
    }

    fn remember(&mut self, vault: highwater_delta::VaultId, commit: CommitId) {
        let now = Acknowledged { vault, commit };
        if self.acknowledged != Some(now) {
            self.acknowledged = Some(now);
            if let Err(error) = now.save(&self.options.run_dir) {
                tracing::warn!(%error, "cannot note what the vault has acknowledged");
            }
        }
    }

    /// Asks the vault what it holds of these ranges.
    pub(super) fn known(&mut self, disk: DiskId, ranges: &[BlockRange]) -> Option<super::send::Known> {
        self.known_within(disk, ranges, Patience::Long)
    }

    /// The same, with patience or without.
    pub(super) fn known_within(
        &mut self,
        disk: DiskId,
        ranges: &[BlockRange],
        patience: Patience,
    ) -> Option<super::send::Known> {
        let mut known = super::send::Known::new();
        for span in spans(ranges) {
            (self.asked, self.hashes) = (Some((disk, span)), None);
            let told = self.tell(AgentMessage::Hashes { disk, range: span });
            let blocks = if told { self.await_hashes(span, patience) } else { None };
            self.asked = None;
            let blocks = blocks?;
            known.extend((span.start.0..span.end()).zip(blocks));
        }
        Some(known)
    }

    fn await_hashes(&mut self, range: BlockRange, patience: Patience) -> Option<Vec<StoredBlock>> {
        let until = Instant::now() + if patience == Patience::Long { HASHES_MAX } else { HASHES_IDLE_MAX };
        while Instant::now() < until
            && (patience == Patience::Long || !self.has_work())
            && matches!(self.link, Link::Up(_))
            && !self.stopping()
        {
            if let Some(blocks) = self.hashes.take() {
                return Some(blocks).filter(|b| b.len() as u64 == range.count);
            }
            self.wait(Duration::from_millis(100));
        }
        None
    }
}

/// Covers ascending ranges by questions that are not too long.
fn spans(ranges: &[BlockRange]) -> Vec<BlockRange> {
    let mut spans: Vec<BlockRange> = vec![];
    for range in ranges {
        let mut at = range.start.0;
        while at < range.end() {
            match spans.last_mut() {
                Some(last) if at < last.start.0 + MAX_HASH_BLOCKS && at <= last.end() + 64 => {
                    let end = range.end().min(last.start.0 + MAX_HASH_BLOCKS);
                    last.count = last.count.max(end - last.start.0);
                    at = end;
                }
                _ => spans.push(BlockRange::new(at, 0)),
            }
        }
    }
    spans.retain(|s| s.count > 0);
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn spans_cover_and_are_bounded(gaps in proptest::collection::vec((1u64..20_000, 1u64..30_000), 1..20)) {
            let mut at = 0;
            let ranges: Vec<BlockRange> = gaps.iter().map(|(gap, count)| {
                let range = BlockRange::new(at + gap, *count);
                at = range.end();
                range
            }).collect();
            let spans = spans(&ranges);
            for span in &spans { prop_assert!(span.count > 0 && span.count <= MAX_HASH_BLOCKS); }
            for range in &ranges {
                for block in [range.start.0, range.start.0 + range.count / 2, range.end() - 1] {
                    prop_assert!(spans.iter().any(|s| s.start.0 <= block && block < s.end()));
                }
            }
        }
    }
}
