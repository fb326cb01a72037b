//! The end of an epoch while the stream is kept: the same barrier closes the tracker's epoch and the stream's window, and each
//! bit that was marked is either explained by a record, or its granule is read.
//!
//! A bit is set when a write completes, and a write is in the stream before it is issued. So the records that explain the bits of
//! an epoch lie before the position that the stream has after the barrier; records of earlier epochs explain writes that
//! took long. What nothing explains is a change that the stream lacks.

use super::super::{Engine, point::PointError};
use crate::{
    capture::{CaptureError, Loss, StreamPosition, Tap, assemble::Captured},
    tracker::{Beside, EpochEnd},
};
use highwater_delta::DiskId;
use std::time::{Duration, Instant};

/// How long the reader may take to come to a position that the stream has reached.
pub(super) const EXPLAIN_MAX: Duration = Duration::from_secs(3);

struct Window<'t> {
    tap: &'t mut Tap,
    begun: Result<(), CaptureError>,
    ended: Option<Result<Option<Loss>, CaptureError>>,
}

impl Beside for Window<'_> {
    fn before(&mut self) {
        self.begun = self.tap.before();
    }
    fn after(&mut self) {
        self.ended = Some(self.tap.after());
    }
}

/// A window that was closed, and proved; its bits are yet to be explained.
pub(super) struct Ended {
    pub(super) bits: Vec<(DiskId, usize, u64)>,
    epoch: EpochEnd,
    position: StreamPosition,
    started: Instant,
}

impl Engine {
    /// Ends the epoch and the window. An error says that the stream is not to be believed: nothing explains the bits then.
    pub(super) fn end_window(&mut self) -> Result<Ended, PointError> {
        let started = Instant::now();
        let Some(live) = self.ordered.live.as_mut() else { return Err(PointError::Disordered("gone")) };
        let mut window = Window { tap: &mut live.tap, begun: Ok(()), ended: None };
        let mut bits = vec![];
        let ended =
            self.tracker.end_epoch_beside(|id, index, word| bits.push((id, index, word)), &mut window);
        let (begun, lost) = (window.begun, window.ended);
        let position = live.reader.position();
        let ended =
            ended.map_err(PointError::from).and_then(|epoch| begun.map(|()| epoch).map_err(PointError::from));
        let proved = match lost {
            Some(Ok(None)) => Ok(()),
            Some(Ok(Some(loss))) => Err(PointError::Lost(loss)),
            Some(Err(error)) => Err(PointError::Capture(error)),
            None => Err(PointError::Disordered("the window was not closed")),
        };
        match ended.and_then(|epoch| proved.map(|()| epoch)) {
            Ok(epoch) => Ok(Ended { bits, epoch, position, started }),
            Err(error) => {
                self.unexplained(&bits);
                Err(error)
            }
        }
    }

    /// Nothing explains these bits. They lie in what is pending, but there they may have been before: of a delta that is being stored
    /// only the ledger can take them out.
    pub(super) fn unexplained(&mut self, bits: &[(DiskId, usize, u64)]) {
        for (id, index, word) in bits {
            if let Some(disk) = self.disks.iter_mut().find(|d| d.id() == *id) {
                disk.ledger.marked(*index, *word);
            }
        }
    }

    /// Tells the ledgers of the bits: those that a record explains are covered, the others are to be read.
    pub(super) fn explain_window(&mut self, ended: Ended) -> Result<(), PointError> {
        let explained = match self.explanation(ended.position) {
            Ok(explained) => explained,
            Err(error) => {
                self.unexplained(&ended.bits);
                return Err(error);
            }
        };
        // Writes that were submitted before capture began are in no record, and what is captured may hide them: whatever completed in
        // the first window is read.
        let first = self.ordered.streaming.as_mut().is_some_and(|s| {
            let first = s.first_window;
            s.first_window &= s.since.elapsed() < super::ENTRY_GRACE;
            first
        });
        if first {
            self.unexplained(&ended.bits);
        }
        for (id, index, word) in ended.bits {
            let Some(disk) = self.disks.iter_mut().find(|d| d.id() == id) else { continue };
            let known = explained.iter().find(|(of, _)| *of == id);
            let covered = known.map_or(0, |(_, captured)| captured.granules(index, disk.shift)) & word;
            if covered != 0 {
                disk.ledger.marked_covered(index, covered);
            }
            if covered != word {
                disk.ledger.marked(index, word & !covered);
            }
        }
        self.epoch_ended(ended.epoch, ended.started)?;
        if let Some(streaming) = &mut self.ordered.streaming {
            streaming.covered_to = ended.position;
        }
        Ok(())
    }

    /// What the stream has up to this position.
    fn explanation(&mut self, position: StreamPosition) -> Result<Vec<(DiskId, Captured)>, PointError> {
        let Some(live) = self.ordered.live.as_mut() else { return Err(PointError::Disordered("gone")) };
        match live.reader.explain(position, EXPLAIN_MAX) {
            Some(explained) => Ok(explained),
            None => match live.tap.lost_so_far()? {
                Some(loss) => Err(PointError::Lost(loss)),
                None => Err(PointError::Disordered("the stream is not read")),
            },
        }
    }
}
