//! What writers were promised: records, numbered from 1, each written only when the one before it was acknowledged as durable.
//!
//! A state of the disks is one that a crash could have left, if each column of records is there from the first to some `k`th
//! without a gap, and if whatever was acknowledged before a record was begun is there where that record is ([`Promises::check`]). It is
//! the state of a time or a later one, if no record is lacking that had been acknowledged before ([`Promises::overdue_ms`]). All
//! times are of one clock, the one that points are dated by.

use anyhow::{Context, Result, ensure};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Somebody who writes numbered records.
pub trait Writer: Send {
    /// In how many places, one after the other, each record is written: as many columns.
    fn places(&self) -> usize {
        1
    }

    /// Writes a record to a place; it is durable on return.
    ///
    /// # Errors
    /// It could not be written.
    fn write(&mut self, place: usize, number: u64) -> Result<()>;
}

/// When a record was begun and when it was acknowledged, in µs since 1970.
type Times = (u64, u64);

/// Writers at work, each in a thread. Dropped: stopped and waited for.
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Vec<Times>>>>>,
}

impl Writers {
    /// Starts them; each rests for so long after each record.
    #[must_use]
    pub fn start(writers: Vec<Box<dyn Writer>>, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = writers
            .into_iter()
            .map(|writer| {
                let stop = stop.clone();
                thread::spawn(move || run(writer, pause, &stop))
            })
            .collect();
        Self { stop, threads }
    }

    /// Ends them.
    ///
    /// # Errors
    /// One of them has failed.
    pub fn stop(mut self) -> Result<Promises> {
        self.stop.store(true, Ordering::Release);
        let mut columns = vec![];
        for thread in self.threads.drain(..) {
            columns.extend(thread.join().ok().context("a writer panicked")??);
        }
        Ok(Promises { columns })
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

fn run(mut writer: Box<dyn Writer>, pause: Duration, stop: &AtomicBool) -> Result<Vec<Vec<Times>>> {
    let mut columns = vec![vec![]; writer.places()];
    for number in 1.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        for (place, column) in columns.iter_mut().enumerate() {
            let began = now_us();
            writer.write(place, number).with_context(|| format!("record {number}"))?;
            column.push((began, now_us()));
        }
        thread::sleep(pause);
    }
    Ok(columns)
}

/// Since 1970.
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// What was promised, until the writers ended.
pub struct Promises {
    columns: Vec<Vec<Times>>,
}

impl Promises {
    /// How many records there are in all.
    #[must_use]
    pub fn records(&self) -> usize {
        self.columns.iter().map(Vec::len).sum()
    }

    /// A state that has the first so many records of each column is one that a crash could have left.
    ///
    /// # Errors
    /// It is not: something is there that was begun only when something had been acknowledged that is not.
    pub fn check(&self, present: &[u64]) -> Result<()> {
        ensure!(present.len() == self.columns.len(), "{} columns of {}", present.len(), self.columns.len());
        for (at, (has, column)) in present.iter().zip(&self.columns).enumerate() {
            // The last one may have been under way when all ended.
            ensure!(*has <= column.len() as u64 + 1, "column {at}: record {has} was never written");
            let last = (*has as usize).min(column.len());
            let Some(began) = last.checked_sub(1).map(|last| column[last].0) else { continue };
            for (other, (has, column)) in present.iter().zip(&self.columns).enumerate() {
                let before = column.partition_point(|(_, acknowledged)| *acknowledged < began);
                ensure!(
                    *has >= before as u64,
                    "record {last} of column {at} is there, but not record {before} of column {other}, which had been \
                     acknowledged before: only {has} are"
                );
            }
        }
        Ok(())
    }

    /// How many ms before this time, in ms since 1970, the first record was acknowledged that the state lacks; 0 if it has all that
    /// were. Of the millisecond that the time names itself, nothing is known.
    #[must_use]
    pub fn overdue_ms(&self, present: &[u64], taken_at_ms: u64) -> u64 {
        let lacking = present.iter().zip(&self.columns).filter_map(|(has, column)| column.get(*has as usize));
        lacking.map(|(_, acknowledged)| taken_at_ms.saturating_sub(acknowledged / 1000)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two columns of one writer: record `n` of the second is begun when that of the first is acknowledged.
    fn promises() -> Promises {
        Promises {
            columns: vec![
                vec![(10_000, 11_000), (20_000, 21_000), (30_000, 31_000)],
                vec![(12_000, 13_000), (22_000, 23_000), (32_000, 33_000)],
            ],
        }
    }

    #[test]
    fn what_a_crash_could_leave_is_accepted() {
        // The last: a record written, and never acknowledged.
        for present in [[0, 0], [1, 0], [1, 1], [2, 1], [3, 3], [4, 3]] {
            promises().check(&present).unwrap();
        }
    }

    #[test]
    fn what_no_crash_could_leave_is_found() {
        // Out of order: the later one is there, the earlier one is not.
        promises().check(&[1, 2]).unwrap_err();
        promises().check(&[0, 1]).unwrap_err();
        // Never written.
        promises().check(&[5, 3]).unwrap_err();
        promises().check(&[3]).unwrap_err();
    }

    #[test]
    fn what_was_acknowledged_before_is_due() {
        for (present, taken_at_ms, overdue) in [
            ([0, 0], 11, 0),
            ([0, 0], 12, 1),
            ([1, 0], 13, 0),
            ([3, 2], 33, 0),
            ([3, 2], 40, 7),
            ([3, 3], 99, 0),
        ] {
            assert_eq!(promises().overdue_ms(&present, taken_at_ms), overdue, "{present:?} at {taken_at_ms}");
        }
    }

    #[test]
    fn writers_are_held_to_what_they_did() {
        struct Nothing;
        impl Writer for Nothing {
            fn places(&self) -> usize {
                2
            }
            fn write(&mut self, _: usize, _: u64) -> Result<()> {
                Ok(())
            }
        }
        let writers = Writers::start(vec![Box::new(Nothing), Box::new(Nothing)], Duration::from_micros(50));
        thread::sleep(Duration::from_millis(20));
        let promises = writers.stop().unwrap();
        assert_eq!(promises.columns.len(), 4);
        assert!(promises.records() > 8);
        let all: Vec<u64> = promises.columns.iter().map(|column| column.len() as u64).collect();
        promises.check(&all).unwrap();
        assert_eq!(promises.overdue_ms(&all, u64::MAX), 0);
    }
}
