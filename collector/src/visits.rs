//! Connections of machines that have no seat: those that have yet to say hello or wait for the seat, and those that are turned away.
//!
//! Each holds a socket and its buffers, and a seat holds back only what comes after it. So each machine has at most
//! [`VISITS_MAX`] of them, whoever else has how many; one beyond that is closed at once.

use crate::lock::locked;
use highwater_delta::MachineId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Of one machine at once: one that comes, one that it replaces, and as many left over from a network that broke off.
pub const VISITS_MAX: u8 = 4;

/// The visits of all machines. The table has no entry for a machine without one.
#[derive(Clone, Default)]
pub struct Visits(Arc<Mutex<HashMap<MachineId, u8>>>);

/// One of a machine's visits. Given back when dropped.
pub struct Visit {
    all: Visits,
    machine: MachineId,
}

impl Visits {
    /// A visit, if the machine may have another one.
    #[must_use]
    pub fn begin(&self, machine: MachineId) -> Option<Visit> {
        let mut all = locked(&self.0);
        let count = all.entry(machine).or_default();
        if *count >= VISITS_MAX {
            return None;
        }
        *count += 1;
        Some(Visit { all: self.clone(), machine })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut all = locked(&self.all.0);
        if let Some(count) = all.get_mut(&self.machine) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.machine);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_has_some_and_leaves_nothing_behind() {
        let (visits, one, two) = (Visits::default(), MachineId::new(), MachineId::new());
        let mut held: Vec<_> = (0..VISITS_MAX).map(|_| visits.begin(one).unwrap()).collect();
        assert!(visits.begin(one).is_none());
        let other = visits.begin(two).unwrap();
        held.pop();
        held.push(visits.begin(one).unwrap());
        assert!(visits.begin(one).is_none());
        drop((held, other));
        assert!(locked(&visits.0).is_empty());
    }
}
