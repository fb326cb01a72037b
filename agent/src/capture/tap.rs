//! The kernel's side of capture: which devices are captured, and the proof that nothing of them is missing in the stream.
//!
//! **The proof.** Stretches of the stream are told apart by windows. A window is closed by [`Tap::before`], a barrier that
//! outlasts every running tracing program, and [`Tap::after`]. It is whole if one copy of the program was not skipped since the
//! `before` of the window before it (`tracker::proof`; the windows overlap, or an event that straddles an end could
//! defeat a witness in each), and if no record was dropped or unreadable. Then the stream is complete up to every position that
//! it had reached when `before` was called. The slots are emptied after the barrier: what an event left in one can mislead
//! later events only as long as the window's own misses tell of it.
//!
//! The longer a window, the more copies were skipped in it: [`Tap::look`] closes it when half of them were.

use super::{CaptureError, Layout, Ring, StreamReader, bases, bases::Found, object::Object, page};
use crate::{
    device::BlockDevice,
    tracker::{
        barrier::Barrier,
        proof::{Misses, Prover, Verdict},
    },
};
use highwater_abi::stream::CaptureCounters;
use std::time::Duration;

/// How long a page that was captured may take to come out of the ring.
const VERIFY_MAX: Duration = Duration::from_secs(5);

/// Why a stretch of the stream is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Every copy of the program was skipped by the kernel at some time.
    Skipped,
    /// The ring was full: so many records were dropped.
    Overflow(u64),
    /// So many pages could not be read.
    Unreadable(u64),
    /// Changes of which submission does not tell the range.
    Unsupported(u64),
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Skipped => f.write_str("the kernel skipped every copy of the capture program"),
            Self::Overflow(records) => write!(f, "the ring overflowed ({records} records)"),
            Self::Unreadable(pages) => write!(f, "{pages} pages could not be read"),
            Self::Unsupported(writes) => {
                write!(f, "{writes} writes cannot be captured (zone operations, or encrypted below)")
            }
        }
    }
}

impl Loss {
    /// A word for metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Skipped => "skipped",
            Self::Overflow(_) => "overflow",
            Self::Unreadable(_) => "unreadable",
            Self::Unsupported(_) => "unsupported",
        }
    }
}

/// See the module. Dropped, it captures nothing any more.
pub struct Tap {
    object: Object,
    layout: Layout,
    prover: Prover,
    /// Read by `before`.
    closing: Misses,
    counted: CaptureCounters,
    found: Option<Found>,
    active: bool,
}

impl Tap {
    /// Loads the programs, with a ring of `ring_bytes` (a power of two); captures nothing yet.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn load(
        layout: Layout,
        copies: Option<usize>,
        ring_bytes: usize,
    ) -> Result<(Self, Ring), CaptureError> {
        let object = Object::load(&layout, copies.unwrap_or(layout.copies), ring_bytes)?;
        let (map, bytes) = object.stream();
        let ring = Ring::new(map, bytes)?;
        let misses = object.misses()?;
        let tap = Self {
            prover: Prover::new(misses.clone()),
            closing: misses,
            object,
            layout,
            counted: CaptureCounters::default(),
            found: None,
            active: false,
        };
        Ok((tap, ring))
    }

    /// Finds the kernel's memory, and reads a known page back through the way of capture. Reads blocks of `device`; nobody else
    /// may read the ring meanwhile.
    ///
    /// # Errors
    /// [`CaptureError::Bases`]: nothing is to be captured then.
    pub fn prepare(&mut self, ring: &mut Ring, device: &BlockDevice) -> Result<Found, CaptureError> {
        let (bases, found) =
            bases::find(&mut self.object, device, self.layout.offsets.page_struct_bytes.into())?;
        self.object.set_bases(bases)?;
        let verified = page::read_back(&mut self.object, ring, device);
        if let Err(error) = verified {
            self.object.set_bases(Default::default())?;
            return Err(error);
        }
        self.found = Some(found);
        Ok(found)
    }

    /// Reads a known page back through the way of capture, while the stream is kept: what was right when capture began is to be right
    /// still.
    ///
    /// # Errors
    /// [`CaptureError::Bases`]: what was captured is not to be believed. Others: it could not be tried.
    pub fn verify(&mut self, reader: &StreamReader, device: &BlockDevice) -> Result<(), CaptureError> {
        let mut known = page::KnownPage::new().map_err(|e| CaptureError::kernel("lock a page", &e))?;
        self.object.attach_probe()?;
        let captured = known.capture(&mut self.object, device);
        self.object.detach_probe();
        captured?;
        match reader.probed(VERIFY_MAX) {
            Some(content) if known.is(&content) => Ok(()),
            Some(_) => Err(CaptureError::Bases("a known page was read back with another content".into())),
            None => Err(CaptureError::Kernel {
                what: "read a known page back".into(),
                cause: "it did not come out of the ring in time".into(),
            }),
        }
    }

    /// How the kernel's memory was found.
    #[must_use]
    pub fn found(&self) -> Option<Found> {
        self.found
    }
    /// How many copies of the program run.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.object.copies()
    }
    /// Whether something is captured.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Begins to capture these whole devices, and opens the first window. Whatever is submitted after the return is captured;
    /// what was submitted before may be.
    ///
    /// # Errors
    /// The kernel refuses; nothing is captured then.
    pub fn begin(
        &mut self,
        devices: impl IntoIterator<Item = u32>,
        barrier: &Barrier,
    ) -> Result<(), CaptureError> {
        let begun = self.try_begin(devices, barrier);
        if begun.is_err() {
            self.end();
        }
        begun
    }

    fn try_begin(
        &mut self,
        devices: impl IntoIterator<Item = u32>,
        barrier: &Barrier,
    ) -> Result<(), CaptureError> {
        for dev in devices {
            self.object.capture(dev)?;
        }
        self.object.attach()?;
        barrier.wait().map_err(|e| CaptureError::kernel("wait for running programs", &e))?;
        self.object.clear_slots();
        let misses = self.object.misses()?;
        self.prover = Prover::new(misses.clone());
        self.closing = misses;
        self.counted = self.object.counters()?;
        self.active = true;
        Ok(())
    }

    /// Captures no device any more, and detaches the programs.
    pub fn end(&mut self) {
        self.active = false;
        if let Err(error) = self.object.capture_none() {
            tracing::debug!(%error, "devices stay in the map of captured ones");
        }
        self.object.detach();
    }

    /// Begins to close the window: before the barrier.
    ///
    /// # Errors
    /// The kernel refuses to tell: the window goes on.
    pub fn before(&mut self) -> Result<(), CaptureError> {
        self.closing = self.object.misses()?;
        Ok(())
    }

    /// Closes the window: after the barrier. `Some`: the stream lacks something since the window before.
    ///
    /// # Errors
    /// The kernel refuses to tell: what came since the window before is not to be believed.
    pub fn after(&mut self) -> Result<Option<Loss>, CaptureError> {
        self.object.clear_slots();
        let after = self.object.misses()?;
        let now = self.object.counters()?;
        let before = std::mem::replace(&mut self.counted, now);
        let verdict = self.prover.end(self.closing.clone(), &after);
        Ok(counted_loss(&before, &now).or_else(|| (verdict == Verdict::Unproved).then_some(Loss::Skipped)))
    }

    /// Closes the window in between, while some copy still saw everything, if that may not be so for long any more. Otherwise as
    /// [`Tap::lost_so_far`].
    ///
    /// # Errors
    /// As for [`Tap::after`].
    pub fn look(&mut self, barrier: &Barrier) -> Result<Option<Loss>, CaptureError> {
        let now = self.object.misses()?;
        if self.prover.clean(&now) * 2 > self.copies() {
            return self.lost_so_far();
        }
        self.closing = now;
        barrier.wait().map_err(|e| CaptureError::kernel("wait for running programs", &e))?;
        self.after()
    }

    /// What the stream is known to lack before the window is closed: there is no use in waiting for its end.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn lost_so_far(&self) -> Result<Option<Loss>, CaptureError> {
        Ok(counted_loss(&self.counted, &self.object.counters()?))
    }

    /// What was captured since the programs were loaded.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn counters(&self) -> Result<CaptureCounters, CaptureError> {
        self.object.counters()
    }

    /// Times a copy was skipped, of all copies.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub fn misses(&self) -> Result<u64, CaptureError> {
        Ok(self.object.misses()?.total())
    }
}

fn counted_loss(before: &CaptureCounters, now: &CaptureCounters) -> Option<Loss> {
    let grown = |of: fn(&CaptureCounters) -> u64| Some(of(now) - of(before)).filter(|n| *n > 0);
    None.or_else(|| grown(|c| c.dropped).map(Loss::Overflow))
        .or_else(|| grown(|c| c.faults).map(Loss::Unreadable))
        .or_else(|| grown(|c| c.unsupported).map(Loss::Unsupported))
}
