//! The agent's side of flow control. Pure.

use crate::WireError;
use highwater_delta::DeltaId;
use std::collections::VecDeque;

/// What is under way: sent, and not yet acknowledged as received.
///
/// A chunk costs the bytes of its encoded form. The window is a multiple of the largest chunk, so that one always fits
/// when nothing is under way.
#[derive(Clone, Debug)]
pub struct SendWindow {
    bytes_max: u64,
    bytes: u64,
    /// The delta last sent from, and how many of its chunks were sent.
    sent: Option<(DeltaId, u64)>,
    /// In the order sent: delta, number within the delta from 1, bytes.
    under_way: VecDeque<(DeltaId, u64, u64)>,
}

impl SendWindow {
    /// A window of so many bytes, as the welcome granted it.
    #[must_use]
    pub const fn new(bytes_max: u64) -> Self {
        Self { bytes_max, bytes: 0, sent: None, under_way: VecDeque::new() }
    }

    /// Whether a chunk of so many bytes may be sent now.
    #[must_use]
    pub const fn fits(&self, bytes: usize) -> bool {
        self.bytes + bytes as u64 <= self.bytes_max
    }

    /// Bytes under way.
    #[must_use]
    pub const fn under_way_bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes a chunk that was sent. Answers how many of its delta were sent by now.
    pub fn sent(&mut self, delta: DeltaId, bytes: usize) -> u64 {
        let number = match self.sent {
            Some((last, chunks)) if last == delta => chunks + 1,
            _ => 1,
        };
        self.sent = Some((delta, number));
        self.bytes += bytes as u64;
        self.under_way.push_back((delta, number, bytes as u64));
        number
    }

    /// Takes in a `Received`. One that repeats an older one changes nothing; one for chunks never sent is an error.
    pub fn received(&mut self, delta: DeltaId, chunks: u64) -> Result<(), WireError> {
        if let Some((last, sent)) = self.sent
            && last == delta
            && chunks > sent
        {
            return Err(WireError::Unexpected("more chunks acknowledged than sent"));
        }
        while let Some((_, _, bytes)) =
            self.under_way.pop_front_if(|(id, number, _)| *id == delta && *number <= chunks)
        {
            self.bytes -= bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_fills_and_empties() {
        let (a, b) = (DeltaId::new(), DeltaId::new());
        let mut window = SendWindow::new(100);
        assert_eq!(window.sent(a, 60), 1);
        assert!(window.fits(40) && !window.fits(41));
        assert_eq!(window.sent(a, 40), 2);
        assert_eq!(window.sent(b, 0), 1);
        window.received(a, 1).unwrap();
        assert_eq!(window.under_way_bytes(), 40);
        window.received(a, 1).unwrap();
        window.received(a, 2).unwrap();
        assert_eq!(window.under_way_bytes(), 0);
        assert_eq!(window.received(b, 2).unwrap_err().code(), 1109);
    }
}
