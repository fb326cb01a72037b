//! A machine as a member: prepares, freezes, keeps or gives up.

use crate::{
    message::{Kind, Life, Marker, Message, Refusal},
    step::Output,
    timing::{Tick, Timing},
};
use highwater_delta::MachineId;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Hooks run, filesystems are written out.
    Preparing,
    /// Waits for the word.
    Ready,
    /// Filesystems are being frozen.
    Freezing,
    /// Everything stands still.
    Frozen,
    /// Thaws, and looks whether it was frozen until now.
    Keeping,
}

/// What it takes part in.
#[derive(Clone, Copy, Debug)]
struct Part {
    marker: Marker,
    epoch: u64,
    kind: Kind,
    stage: Stage,
    /// By then it gives up.
    until: Tick,
    /// When it began to prepare.
    prepared_from: Tick,
    /// When it began to freeze.
    frozen_from: Option<Tick>,
}

/// See the module.
#[derive(Debug)]
pub struct Member {
    life: Life,
    part: Option<Part>,
    /// The newest marker that it heard of, by coordinator, and whether it kept it.
    newest: BTreeMap<MachineId, (Life, u64, bool)>,
    /// Before that it takes part in nothing, by kind.
    rests_until: [Tick; 2],
}

/// After a marker a member stays thawed for so many times as long as it was frozen, and its applications run for so many times as long as
/// they were made to stand still: whatever a coordinator does, the machine has most of its time for itself.
const REST: Tick = 4;

/// And for so long at least.
const REST_MIN: Tick = 200;

impl Member {
    /// What it takes part in, and of what kind.
    pub fn part(&self) -> Option<(Marker, Kind)> {
        self.part.map(|part| (part.marker, part.kind))
    }

    /// It belongs to the group no longer.
    pub fn abandon(&mut self, now: Tick, out: &mut Vec<Output>) {
        self.give_up(now, None, out);
    }

    pub fn new(life: Life) -> Self {
        Self { life, part: None, newest: BTreeMap::new(), rests_until: [0; 2] }
    }
    /// Whether it takes part in something.
    pub fn is_busy(&self) -> bool {
        self.part.is_some()
    }

    /// Whether this marker is newer than all of its coordinator that were heard of; if not, what was the newest.
    fn is_new(&self, marker: Marker) -> Result<(), Life> {
        match self.newest.get(&marker.coordinator) {
            Some((life, number, _)) if (marker.life, marker.number) <= (*life, *number) => Err(*life),
            _ => Ok(()),
        }
    }

    /// Says whether it would take part now, and changes nothing.
    pub fn asked(&self, now: Tick, (marker, kind): (Marker, Kind), out: &mut Vec<Output>) {
        if self
            .newest
            .get(&marker.coordinator)
            .is_some_and(|(life, number, _)| (*life, *number) == (marker.life, marker.number))
        {
            // Said again, and overtaken by what came of it.
            return;
        }
        let answer = match self.objection(now, marker, kind) {
            Some(why) => Message::Refuse { marker, why },
            None => Message::Here { marker },
        };
        out.push(say(marker.coordinator, answer));
    }

    /// Why it would take no part in a marker that is new to it.
    fn objection(&self, now: Tick, marker: Marker, kind: Kind) -> Option<Refusal> {
        if self.part.is_some_and(|part| part.marker.coordinator != marker.coordinator) {
            return Some(Refusal::Busy);
        }
        if let Err(life) = self.is_new(marker) {
            return Some(Refusal::Old { life });
        }
        (self.is_resting(now, kind)).then_some(Refusal::Busy)
    }

    fn is_resting(&self, now: Tick, kind: Kind) -> bool {
        self.rests_until(now, kind).is_some()
    }

    /// Until when it takes part in nothing of this kind, if it does so now.
    pub fn rests_until(&self, now: Tick, kind: Kind) -> Option<Tick> {
        let until = self.rests_until[Kind::Crash as usize].max(self.rests_until[kind as usize]);
        (now < until).then_some(until)
    }

    /// Answers whether it takes part from now on.
    pub fn prepare(
        &mut self,
        now: Tick,
        timing: &Timing,
        (marker, kind, epoch): (Marker, Kind, u64),
        out: &mut Vec<Output>,
    ) -> bool {
        let to = marker.coordinator;
        if let Some(part) = self.part {
            if part.marker == marker {
                if part.stage == Stage::Ready {
                    out.push(say(to, Message::Ready { marker, life: self.life }));
                }
                return false;
            }
            if part.marker.coordinator != to {
                out.push(say(to, Message::Refuse { marker, why: Refusal::Busy }));
                return false;
            }
        }
        if let Err(life) = self.is_new(marker) {
            out.push(say(to, Message::Refuse { marker, why: Refusal::Old { life } }));
            return false;
        }
        // Its coordinator has given up the one before.
        self.give_up(now, None, out);
        self.newest.insert(to, (marker.life, marker.number, false));
        // Giving up may have begun a rest.
        if self.is_resting(now, kind) {
            out.push(say(to, Message::Refuse { marker, why: Refusal::Busy }));
            return false;
        }
        self.part = Some(Part {
            marker,
            epoch,
            kind,
            stage: Stage::Preparing,
            until: now + timing.prepare_max,
            prepared_from: now,
            frozen_from: None,
        });
        out.push(Output::Prepare { marker, kind });
        true
    }

    /// Everything is prepared, or could not be.
    pub fn prepared(
        &mut self,
        now: Tick,
        timing: &Timing,
        marker: Marker,
        done: bool,
        out: &mut Vec<Output>,
    ) {
        let Some(part) = self.at(marker, Stage::Preparing) else { return };
        if !done {
            return self.give_up(now, Some(Refusal::Unprepared), out);
        }
        part.stage = Stage::Ready;
        // Others may take longer, and what they say be said again.
        part.until = now + timing.prepare_max + timing.freeze_max;
        out.push(say(marker.coordinator, Message::Ready { marker, life: self.life }));
    }

    pub fn freeze(&mut self, now: Tick, timing: &Timing, marker: Marker, life: Life, out: &mut Vec<Output>) {
        let (own, has_kept) = (self.life, self.has_kept(marker));
        match self.part.as_mut().filter(|part| part.marker == marker && life == own) {
            Some(part) if part.stage == Stage::Ready => {
                part.stage = Stage::Freezing;
                part.frozen_from = Some(now);
                part.until = now + timing.hold_max;
                out.push(Output::Freeze { marker });
            }
            Some(part) if part.stage == Stage::Frozen => {
                out.push(say(marker.coordinator, Message::Frozen { marker, life }));
            }
            Some(_) => {}
            // Said again, and overtaken by the mark.
            None if has_kept => {}
            None => self.unknown(marker, out),
        }
    }

    /// Everything stands still, or could not be frozen.
    pub fn frozen(&mut self, now: Tick, marker: Marker, done: bool, out: &mut Vec<Output>) {
        let life = self.life;
        let Some(part) = self.at(marker, Stage::Freezing) else { return };
        if !done {
            return self.give_up(now, Some(Refusal::Unfrozen), out);
        }
        // For how long it may stay so was counted from when it began.
        part.stage = Stage::Frozen;
        out.push(say(marker.coordinator, Message::Frozen { marker, life }));
    }

    pub fn mark(&mut self, now: Tick, timing: &Timing, marker: Marker, life: Life, out: &mut Vec<Output>) {
        let (own, has_kept) = (self.life, self.has_kept(marker));
        match self.part.as_mut().filter(|part| part.marker == marker && life == own) {
            Some(part) if part.stage == Stage::Frozen => {
                part.stage = Stage::Keeping;
                part.until = now + timing.hold_max;
                out.push(Output::Keep { marker });
            }
            Some(_) => {}
            None if life == own && has_kept => {
                out.push(say(marker.coordinator, Message::Marked { marker, life }));
            }
            None => self.unknown(marker, out),
        }
    }

    /// It has thawed; `intact`: everything stood still until then.
    pub fn kept(&mut self, now: Tick, marker: Marker, intact: bool, out: &mut Vec<Output>) {
        let life = self.life;
        let Some(part) = self.at(marker, Stage::Keeping).copied() else { return };
        let (epoch, kind) = (part.epoch, part.kind);
        self.part = None;
        self.rest(now, &part);
        if !intact {
            out.push(say(marker.coordinator, Message::Refuse { marker, why: Refusal::Thawed }));
            return;
        }
        self.newest.insert(marker.coordinator, kept(marker));
        out.push(say(marker.coordinator, Message::Marked { marker, life }));
        out.push(Output::Report { marker, epoch, kind });
    }

    pub fn revoke(&mut self, now: Tick, marker: Marker, out: &mut Vec<Output>) {
        if self.part.is_some_and(|part| part.marker == marker) {
            self.give_up(now, None, out);
        } else if self.has_kept(marker) {
            self.newest.insert(marker.coordinator, (marker.life, marker.number, false));
            out.push(Output::Withdraw { marker });
        } else if self.is_new(marker).is_ok() {
            // What of it is still under way is not to be heard any more.
            self.newest.insert(marker.coordinator, (marker.life, marker.number, false));
        }
    }

    pub fn tick(&mut self, now: Tick, out: &mut Vec<Output>) {
        if let Some(part) = self.part.filter(|part| now >= part.until) {
            let why = if part.stage == Stage::Preparing { Refusal::Unready } else { Refusal::Late };
            self.give_up(now, Some(why), out);
        }
    }

    /// When something is to be done.
    pub fn next(&self) -> Option<Tick> {
        self.part.map(|part| part.until)
    }

    fn has_kept(&self, marker: Marker) -> bool {
        self.newest.get(&marker.coordinator) == Some(&kept(marker))
    }

    fn at(&mut self, marker: Marker, stage: Stage) -> Option<&mut Part> {
        self.part.as_mut().filter(|part| part.marker == marker && part.stage == stage)
    }

    fn rest(&mut self, now: Tick, part: &Part) {
        let busy = |since: Tick| now + REST * (now - since);
        self.rests_until[Kind::Crash as usize] = match part.frozen_from {
            Some(since) => busy(since).max(now + REST_MIN),
            // To prepare costs something, too.
            None => now + REST_MIN.max(now - part.prepared_from),
        };
        if part.kind == Kind::Application {
            self.rests_until[Kind::Application as usize] = busy(part.prepared_from);
        }
    }

    fn give_up(&mut self, now: Tick, why: Option<Refusal>, out: &mut Vec<Output>) {
        let Some(part) = self.part.take() else { return };
        let marker = part.marker;
        self.rest(now, &part);
        out.push(Output::Drop { marker });
        if let Some(why) = why {
            out.push(say(marker.coordinator, Message::Refuse { marker, why }));
        }
    }

    fn unknown(&self, marker: Marker, out: &mut Vec<Output>) {
        out.push(say(marker.coordinator, Message::Refuse { marker, why: Refusal::Unknown }));
    }
}

fn kept(marker: Marker) -> (Life, u64, bool) {
    (marker.life, marker.number, true)
}

fn say(to: MachineId, message: Message) -> Output {
    Output::Send { to, message }
}
