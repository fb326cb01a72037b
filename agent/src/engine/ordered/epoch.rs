//! The end of an epoch while the stream is kept: the same barrier closes the tracker's epoch and the stream's window, and each
//! bit that was marked is either explained by a record, or its granule is read.
//!
//! A bit is set when a write completes, and a write is in the stream before it is issued. So the records that explain the bits of
//! an epoch lie before the position that the stream has after the barrier; records of earlier epochs explain writes that
//! took long. What nothing explains is a change that the stream lacks.

use super::super::{Engine, point::PointError};
use crate::{
    capture::{CaptureError, Loss, Tap},
    tracker::Beside,
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

impl Engine {
    /// Ends the epoch and the window. An error says that the stream is not to be believed, or cannot be told.
    pub(super) fn ordered_epoch(&mut self) -> Result<(), PointError> {
        let started = Instant::now();
        let Some(live) = self.ordered.live.as_mut() else { return Err(PointError::Disordered("gone")) };
        let mut window = Window { tap: &mut live.tap, begun: Ok(()), ended: None };
        let mut bits: Vec<(DiskId, usize, u64)> = vec![];
        let ended =
            self.tracker.end_epoch_beside(|id, index, word| bits.push((id, index, word)), &mut window);
        let (begun, lost) = (window.begun, window.ended);
        // Whatever happened, no bit that was told may get lost: first as if nothing explained them.
        let judged = match (&ended, begun, lost) {
            (Ok(_), Ok(()), Some(Ok(None))) => {
                let position = live.reader.position();
                match live.reader.explain(position, EXPLAIN_MAX) {
                    Some(explained) => Ok((position, explained)),
                    None => Err(match live.tap.lost_so_far() {
                        Ok(Some(loss)) => PointError::Lost(loss),
                        _ => PointError::Disordered("the stream is not read"),
                    }),
                }
            }
            (_, _, Some(Ok(Some(loss)))) => Err(PointError::Lost(loss)),
            (_, Err(error), _) | (_, _, Some(Err(error))) => Err(PointError::Capture(error)),
            (_, _, None) | (Err(_), _, _) => Err(PointError::Disordered("the epoch could not be ended")),
        };
        let explained = judged.as_ref().map(|(_, explained)| explained.as_slice()).unwrap_or_default();
        for (id, index, word) in bits {
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
        self.epoch_ended(ended?, started)?;
        let (position, _) = judged?;
        if let Some(streaming) = &mut self.ordered.streaming {
            streaming.covered_to = position;
        }
        Ok(())
    }
}
