//! What groups there are, and were: the documents of definitions, one after the other. Pure.

use crate::{Result, VaultError};
use highwater_delta::{GroupId, MachineId};
use highwater_group::Membership;
use highwater_wire::printable::printable;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Most characters of a group's name.
pub const NAME_CHARS_MAX: usize = 64;
/// Most often that markers are made, and the least that a member may be frozen for.
const EVERY_MIN: Duration = Duration::from_secs(1);
const EVERY_MAX: Duration = Duration::from_secs(366 * 86_400);
const HOLD_MIN: Duration = Duration::from_millis(100);
const HOLD_MAX: Duration = Duration::from_secs(60);
const PREPARE_MIN: Duration = Duration::from_secs(1);
const PREPARE_MAX: Duration = Duration::from_secs(3600);

/// How often a group's points are made, and how long its members may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Times {
    /// Between crash-consistent points; none: none by themselves.
    #[serde(with = "humantime_serde")]
    pub crash_every: Option<Duration>,
    /// Between application-consistent points.
    #[serde(with = "humantime_serde")]
    pub application_every: Option<Duration>,
    /// How long a member's hooks may take to prepare.
    #[serde(with = "humantime_serde")]
    pub prepare_max: Duration,
    /// How long a member may be frozen.
    #[serde(with = "humantime_serde")]
    pub hold_max: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            crash_every: Some(Duration::from_secs(300)),
            application_every: Some(Duration::from_secs(3600)),
            prepare_max: Duration::from_secs(60),
            hold_max: Duration::from_secs(5),
        }
    }
}

/// A group, as one of its documents says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Group {
    /// Which.
    pub id: GroupId,
    /// For people; no two groups that there are have the same.
    pub name: String,
    /// Of its members: raised whenever they change.
    pub epoch: u64,
    /// Ascending.
    pub members: Vec<MachineId>,
    /// See [`Times`].
    pub times: Times,
    /// Whether it is no more; what points it had stay.
    pub deleted: bool,
    /// Since when it is so, in milliseconds since 1970.
    pub since_ms: u64,
}

impl Group {
    /// One that there was not before.
    #[must_use]
    pub fn new(name: &str, members: Vec<MachineId>, times: Times) -> Self {
        let (id, name) = (GroupId::new(), name.to_owned());
        Self { id, name, epoch: 0, members, times, deleted: false, since_ms: 0 }
    }

    /// What is wrong with it by itself.
    fn fault(&self) -> Option<String> {
        let name = &self.name;
        let chars = name.chars().count();
        if chars == 0 || chars > NAME_CHARS_MAX || printable(name, usize::MAX) != *name || name.trim() != name
        {
            return Some(format!("a name has 1 to {NAME_CHARS_MAX} characters that can be seen"));
        }
        // Of eight digits, the begin of an id is taken for one.
        let is_begin = name.len() >= 8 && name.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
        if name.parse::<GroupId>().is_ok() || is_begin {
            return Some("its name looks like an id".to_owned());
        }
        if self.deleted {
            return None;
        }
        let Times { crash_every, application_every, prepare_max, hold_max } = self.times;
        let every = [crash_every, application_every].into_iter().flatten();
        if every.into_iter().any(|every| !(EVERY_MIN..=EVERY_MAX).contains(&every)) {
            return Some("between two points lies a second at least, and a year at most".to_owned());
        }
        if !(HOLD_MIN..=HOLD_MAX).contains(&hold_max) {
            return Some("a member may be held for 100 ms at least, and for a minute at most".to_owned());
        }
        if !(PREPARE_MIN..=PREPARE_MAX).contains(&prepare_max) {
            return Some("a member may prepare for a second at least, and for an hour at most".to_owned());
        }
        Membership::new(self.epoch, self.members.clone()).err().map(|error| error.to_string())
    }
}

/// All groups, with what was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// The documents that it is made of.
    numbers: BTreeSet<u64>,
    groups: BTreeMap<GroupId, Group>,
    epochs: BTreeMap<(GroupId, u64), Vec<MachineId>>,
    /// When epochs that are over ended, in milliseconds since 1970.
    ended: BTreeMap<(GroupId, u64), u64>,
    /// When each was made.
    made: BTreeMap<GroupId, u64>,
}

impl Groups {
    /// Those that there are, by name.
    #[must_use]
    pub fn living(&self) -> Vec<&Group> {
        let mut living: Vec<&Group> = self.groups.values().filter(|group| !group.deleted).collect();
        living.sort_by(|a, b| a.name.cmp(&b.name));
        living
    }
    /// One, also if it was deleted.
    #[must_use]
    pub fn get(&self, group: GroupId) -> Option<&Group> {
        self.groups.get(&group)
    }
    /// All that there ever were.
    pub fn ever(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }
    /// The one that a machine belongs to.
    #[must_use]
    pub fn of_machine(&self, machine: MachineId) -> Option<&Group> {
        let mut living = self.groups.values().filter(|group| !group.deleted);
        living.find(|group| group.members.binary_search(&machine).is_ok())
    }
    /// The members in an epoch, ascending.
    #[must_use]
    pub fn membership(&self, group: GroupId, epoch: u64) -> Option<&[MachineId]> {
        self.epochs.get(&(group, epoch)).map(Vec::as_slice)
    }
    /// When an epoch ended, in milliseconds since 1970; none: it is the newest of a group that there is, or there was none such.
    #[must_use]
    pub fn ended_ms(&self, group: GroupId, epoch: u64) -> Option<u64> {
        self.ended.get(&(group, epoch)).copied()
    }
    /// When a group was made, in milliseconds since 1970.
    #[must_use]
    pub fn made_ms(&self, group: GroupId) -> Option<u64> {
        self.made.get(&group).copied()
    }
    /// Whether a machine belongs to a group now.
    #[must_use]
    pub fn is_member(&self, group: GroupId, machine: MachineId) -> bool {
        self.get(group).is_some_and(|group| !group.deleted && group.members.binary_search(&machine).is_ok())
    }
    /// The groups that a machine belongs to, or did.
    #[must_use]
    pub fn ever_of(&self, machine: MachineId) -> Vec<GroupId> {
        let has = self.epochs.iter().filter(|(_, members)| members.binary_search(&machine).is_ok());
        let all: BTreeSet<GroupId> = has.map(|((group, _), _)| *group).collect();
        all.into_iter().collect()
    }

    pub(super) fn numbers(&self) -> &BTreeSet<u64> {
        &self.numbers
    }
    pub(super) fn next_number(&self) -> u64 {
        self.numbers.last().map_or(1, |last| last + 1)
    }

    /// A group as it would be after this one, if it may be so.
    ///
    /// # Errors
    /// [`VaultError::Group`].
    pub(super) fn next(&self, group: Group) -> Result<Group> {
        let mut members = group.members;
        members.sort_unstable();
        let before = self.groups.get(&group.id);
        let changes =
            before.is_none_or(|before| before.members != members || before.deleted != group.deleted);
        let epoch = before.map_or(0, |before| before.epoch) + u64::from(changes);
        let group = Group { epoch, members, ..group };
        match self.conflict(&group) {
            Some(cause) => Err(VaultError::Group(cause)),
            None => Ok(group),
        }
    }

    /// Takes the next document in. One that contradicts those before it says nothing: the older claim holds.
    pub(super) fn apply(&mut self, number: u64, group: Group) {
        self.numbers.insert(number);
        if self.next(group.clone()).ok().as_ref() != Some(&group) {
            return;
        }
        if let Some(before) = self.groups.get(&group.id).filter(|before| before.epoch < group.epoch) {
            self.ended.insert((group.id, before.epoch), group.since_ms);
        }
        self.made.entry(group.id).or_insert(group.since_ms);
        if !group.deleted {
            self.epochs.insert((group.id, group.epoch), group.members.clone());
        }
        self.groups.insert(group.id, group);
    }

    /// What keeps a group from being so.
    fn conflict(&self, group: &Group) -> Option<String> {
        if let Some(fault) = group.fault() {
            return Some(fault);
        }
        if self.groups.get(&group.id).is_some_and(|before| before.deleted) {
            return Some("it was deleted".to_owned());
        }
        if group.deleted {
            return None;
        }
        let others = self.groups.values().filter(|other| !other.deleted && other.id != group.id);
        for other in others {
            if other.name == group.name {
                return Some(format!("there is a group {:?} already", other.name));
            }
            if let Some(both) = group.members.iter().find(|m| other.members.binary_search(m).is_ok()) {
                return Some(format!("machine {both} belongs to group {:?}", other.name));
            }
        }
        None
    }
}
