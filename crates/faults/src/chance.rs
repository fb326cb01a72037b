//! What happens to a call, drawn from a seed: the same calls in the same order meet the same luck.

use crate::When;
use std::time::Duration;

/// How often each misfortune comes, in a thousand calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// It fails before it had any effect.
    pub before: u32,
    /// It fails after all of it.
    pub after: u32,
    /// It takes up to [`DELAY_MAX`].
    pub delay: u32,
    /// Its answer is held back until another call was answered.
    pub held: u32,
    /// A put is done twice.
    pub twice: u32,
    /// What a get brings ends early, without an error.
    pub cut: u32,
    /// A list does not show the last changes.
    pub stale: u32,
}

/// The longest delay.
pub const DELAY_MAX: Duration = Duration::from_millis(8);

impl Rates {
    /// Of everything, so that about every tenth call fails.
    pub const HARSH: Self =
        Self { before: 40, after: 40, delay: 150, held: 150, twice: 60, cut: 30, stale: 100 };
}

/// What happens to one call; by default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Luck {
    pub(crate) fails: Option<When>,
    pub(crate) delay: Option<Duration>,
    pub(crate) held: bool,
    pub(crate) twice: bool,
    /// What is left of the answer, in 1/65536.
    pub(crate) cut: Option<u16>,
    /// So many changes are not seen, and at least one.
    pub(crate) stale: Option<usize>,
}

pub(crate) struct Chance {
    state: u64,
    rates: Rates,
}

impl Chance {
    pub(crate) const fn new(seed: u64, rates: Rates) -> Self {
        Self { state: seed, rates }
    }

    /// Splitmix64.
    const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    const fn once_in(&mut self, rate: u32) -> bool {
        self.next() % 1000 < rate as u64
    }

    /// Takes as many numbers whatever comes, so that calls stay comparable between runs.
    pub(crate) fn draw(&mut self) -> Luck {
        let rates = self.rates;
        let fails = match (self.once_in(rates.before), self.once_in(rates.after)) {
            (true, _) => Some(When::Before),
            (_, true) => Some(When::After),
            _ => None,
        };
        let micros = self.next() % DELAY_MAX.as_micros() as u64;
        let part = self.next() as u16;
        let changes = 1 + (self.next() % 4) as usize;
        Luck {
            fails,
            delay: self.once_in(rates.delay).then_some(Duration::from_micros(micros)),
            held: self.once_in(rates.held),
            twice: self.once_in(rates.twice),
            cut: self.once_in(rates.cut).then_some(part),
            stale: self.once_in(rates.stale).then_some(changes),
        }
    }
}
