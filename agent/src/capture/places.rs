//! Where captured devices lie in the programs' table (pure): see [`CAPTURED_SLOTS`](highwater_abi::stream::CAPTURED_SLOTS).

use highwater_abi::stream::{CAPTURED_PROBES, captured_slot};
use std::collections::BTreeMap;

/// Which places are taken, and by which `dev_t`.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<u32, u32>);

impl Places {
    /// The place of a device, its own or a new one. None: there is none left where the programs would look for it.
    pub fn take(&mut self, dev: u32) -> Option<u32> {
        let mut possible = (0..CAPTURED_PROBES).map(|probe| captured_slot(dev, probe));
        let own = possible.clone().find(|place| self.0.get(place) == Some(&dev));
        let place = own.or_else(|| possible.find(|place| !self.0.contains_key(place)))?;
        self.0.insert(place, dev);
        Some(place)
    }
    /// A place is empty again.
    pub fn give_back(&mut self, place: u32) {
        self.0.remove(&place);
    }
    /// All that are taken.
    #[must_use]
    pub fn all(&self) -> Vec<u32> {
        self.0.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_abi::stream::CAPTURED_SLOTS;

    #[test]
    fn a_machines_usual_devices_all_find_a_place() {
        let mut places = Places::default();
        // Kernel's encoding: 12 bits of major, 20 of minor. 16 minors a disk of sd, one of loop, dm and nvme.
        let of = |major: u32, step: u32| (0..64).map(move |n| major << 20 | (n * step));
        for dev in of(8, 16).chain(of(7, 1)).chain(of(252, 1)).chain(of(259, 1)) {
            let place = places.take(dev).unwrap_or_else(|| panic!("no place for {dev:x}"));
            assert!(place < CAPTURED_SLOTS);
            assert_eq!(places.take(dev), Some(place), "the same once more");
            assert!((0..CAPTURED_PROBES).any(|probe| captured_slot(dev, probe) == place));
        }
        assert_eq!(places.all().len(), 256);
    }

    #[test]
    fn where_none_is_left_there_is_none() {
        let mut places = Places::default();
        let alike: Vec<u32> = (1..).filter(|dev| captured_slot(*dev, 0) == 5).take(5).collect();
        assert!(alike[..4].iter().all(|dev| places.take(*dev).is_some()));
        assert_eq!(places.take(alike[4]), None);
        places.give_back(places.all()[2]);
        assert!(places.take(alike[4]).is_some());
    }
}
