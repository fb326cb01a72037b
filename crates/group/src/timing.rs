//! How long things may take.

/// A moment, or a time, in milliseconds of a machine's own steady clock.
pub type Tick = u64;

/// The same for all members of a group, but for what a member's own clock makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between crash-consistent markers; none: none by itself.
    pub crash_every: Option<Tick>,
    /// Between application-consistent markers.
    pub application_every: Option<Tick>,
    /// A member may take so long to prepare.
    pub prepare_max: Tick,
    /// All members together may take so long from the word to freeze until the coordinator knows of it.
    pub freeze_max: Tick,
    /// A member stays frozen for so long at most, from when it begins to freeze.
    pub hold_max: Tick,
    /// All members together may take so long to answer the mark.
    pub mark_max: Tick,
    /// What was not answered is said again after so long.
    pub resend: Tick,
    /// The next member in line waits for so long before it takes a silent coordinator's place.
    pub patience: Tick,
    /// After a marker that came to nothing, so long until the next.
    pub retry: Tick,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            crash_every: Some(5 * 60_000),
            application_every: Some(60 * 60_000),
            prepare_max: 60_000,
            freeze_max: 2_000,
            hold_max: 5_000,
            mark_max: 5_000,
            resend: 200,
            patience: 10_000,
            retry: 60_000,
        }
    }
}
