//! Markers that came to nothing one after the other, as the coordinators say that have their sessions here: of each group, and of each kind, since hooks
//! that fail let the crash-consistent points be.

use crate::lock::locked;
use highwater_delta::GroupId;
use highwater_group::Kind;
use std::collections::HashMap;
use std::sync::Mutex;

/// So many in a row are no accident any more.
pub const IN_A_ROW: u32 = 5;
/// Afterwards each of so many is told.
const THEN_EACH: u32 = 60;

/// See the module.
#[derive(Default)]
pub struct Failures {
    groups: Mutex<HashMap<(GroupId, Kind), Row>>,
}

/// What failed last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Failures since the last marker that all members keep.
    pub count: u32,
    /// Why the last one came to nothing.
    pub why: String,
}

impl Failures {
    /// A marker came to nothing; answers how many have in a row, and whether somebody has to know.
    pub fn failed(&self, group: GroupId, kind: Kind, why: &str) -> (u32, bool) {
        let mut groups = locked(&self.groups);
        let row = groups.entry((group, kind)).or_insert_with(|| Row { count: 0, why: String::new() });
        row.count = row.count.saturating_add(1);
        why.clone_into(&mut row.why);
        (row.count, row.count == IN_A_ROW || row.count.is_multiple_of(THEN_EACH))
    }

    /// All members keep one.
    pub fn kept(&self, group: GroupId, kind: Kind) -> Option<Row> {
        locked(&self.groups).remove(&(group, kind))
    }

    /// What failed last, if nothing was kept since.
    #[must_use]
    pub fn last(&self, group: GroupId, kind: Kind) -> Option<Row> {
        locked(&self.groups).get(&(group, kind)).cloned()
    }

    /// There are only such groups.
    pub fn only(&self, is_there: impl Fn(GroupId) -> bool) {
        locked(&self.groups).retain(|(group, _), _| is_there(*group));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fifth_in_a_row_is_told_and_then_few() {
        let (failures, group) = (Failures::default(), GroupId::new());
        for round in 0..2 {
            let told = (1..=130).filter(|_| failures.failed(group, Kind::Crash, "why").1).count();
            assert_eq!(told, 3, "{round}");
            failures.failed(group, Kind::Application, "hooks");
            assert_eq!(failures.kept(group, Kind::Crash).unwrap(), Row { count: 130, why: "why".into() });
            assert_eq!(failures.kept(group, Kind::Crash), None);
        }
        assert_eq!(failures.last(group, Kind::Application).unwrap().count, 2);
        failures.only(|_| false);
        assert_eq!(failures.last(group, Kind::Application), None);
    }
}
