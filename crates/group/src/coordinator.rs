//! A machine as coordinator: takes all members through the phases, or revokes.

use crate::{
    membership::Membership,
    message::{Kind, Life, Marker, Message, Refusal},
    step::{Failure, Output},
    timing::{Tick, Timing},
};
use highwater_delta::MachineId;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Whether all are there, before anybody's applications stand still.
    Asking,
    Preparing,
    Freezing,
    Marking,
}

#[derive(Debug)]
struct Running {
    marker: Marker,
    kind: Kind,
    membership: Membership,
    phase: Phase,
    waiting: BTreeSet<MachineId>,
    /// In which life each was when it said that it was ready.
    lives: BTreeMap<MachineId, Life>,
    until: Tick,
    again_at: Tick,
}

/// See the module.
#[derive(Debug)]
pub struct Coordinator {
    own: MachineId,
    life: Life,
    number: u64,
    running: Option<Running>,
}

impl Coordinator {
    pub fn new(own: MachineId, life: Life) -> Self {
        Self { own, life, number: 0, running: None }
    }
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// What it takes the members through now.
    pub fn running(&self) -> Option<Marker> {
        self.running.as_ref().map(|running| running.marker)
    }

    pub fn begin(
        &mut self,
        now: Tick,
        timing: &Timing,
        membership: &Membership,
        kind: Kind,
        out: &mut Vec<Output>,
    ) {
        self.number += 1;
        let marker = Marker { coordinator: self.own, life: self.life, number: self.number };
        let mut running = Running {
            marker,
            kind,
            membership: membership.clone(),
            phase: Phase::Asking,
            waiting: BTreeSet::new(),
            lives: BTreeMap::new(),
            until: 0,
            again_at: 0,
        };
        running.enter(Phase::Asking, now, timing, out);
        self.running = Some(running);
    }

    /// A member's word.
    pub fn told(
        &mut self,
        now: Tick,
        timing: &Timing,
        from: MachineId,
        message: &Message,
        out: &mut Vec<Output>,
    ) {
        if let Message::Refuse { marker, why: Refusal::Old { life } } = message
            && self
                .running
                .as_ref()
                .is_some_and(|running| running.marker == *marker && running.membership.contains(from))
            && *life >= self.life
            && let Some(since) = life.since.checked_add(1)
        {
            // An earlier life of this machine had a greater number: its clock was set back. No name comes twice: this life has not had it.
            (self.life.since, self.number) = (since, 0);
        }
        let Some(running) = self.running.as_mut().filter(|r| r.marker == message.marker()) else { return };
        let (phase, life) = match message {
            Message::Here { .. } => (Phase::Asking, None),
            Message::Ready { life, .. } => (Phase::Preparing, Some(*life)),
            Message::Frozen { life, .. } => (Phase::Freezing, Some(*life)),
            Message::Marked { life, .. } => (Phase::Marking, Some(*life)),
            Message::Refuse { why, .. } if running.membership.contains(from) => {
                return self.revoke(Failure::Refused(from, *why), out);
            }
            _ => return,
        };
        if running.phase != phase {
            return;
        }
        match (phase, life) {
            (Phase::Preparing, Some(life)) if running.waiting.contains(&from) => {
                running.lives.insert(from, life);
            }
            (Phase::Asking | Phase::Preparing, _) => {}
            (Phase::Freezing | Phase::Marking, life) if running.lives.get(&from).copied() != life => return,
            (Phase::Freezing | Phase::Marking, _) => {}
        }
        running.waiting.remove(&from);
        if !running.waiting.is_empty() {
            return;
        }
        match phase {
            Phase::Asking => running.enter(Phase::Preparing, now, timing, out),
            Phase::Preparing => running.enter(Phase::Freezing, now, timing, out),
            Phase::Freezing => running.enter(Phase::Marking, now, timing, out),
            Phase::Marking => {
                let (marker, kind) = (running.marker, running.kind);
                self.running = None;
                out.push(Output::Ended { marker, kind, result: Ok(()) });
            }
        }
    }

    pub fn tick(&mut self, now: Tick, timing: &Timing, out: &mut Vec<Output>) {
        let Some(running) = &mut self.running else { return };
        if now >= running.until {
            let silent = running.waiting.iter().copied().collect();
            let is_slow = running.phase == Phase::Freezing;
            let failure = if is_slow { Failure::Slow(silent) } else { Failure::Silent(silent) };
            return self.revoke(failure, out);
        }
        if now >= running.again_at {
            running.again_at = now + timing.resend;
            running.say(out);
        }
    }

    /// A member is gone. If it is waited for while the others' applications stand still or they are frozen, there is no use in waiting. Not so when all were
    /// told to keep the marker: it may have been the last word.
    pub fn gone(&mut self, machine: MachineId, out: &mut Vec<Output>) {
        let waits = |running: &Running| {
            matches!(running.phase, Phase::Preparing | Phase::Freezing) && running.waiting.contains(&machine)
        };
        if self.running.as_ref().is_some_and(waits) {
            self.revoke(Failure::Silent(vec![machine]), out);
        }
    }

    /// When something is to be done.
    pub fn next(&self) -> Option<Tick> {
        self.running.as_ref().map(|r| r.until.min(r.again_at))
    }

    /// What is under way comes to nothing.
    pub fn revoke(&mut self, failure: Failure, out: &mut Vec<Output>) {
        let Some(running) = self.running.take() else { return };
        let marker = running.marker;
        let all = running.membership.members().iter();
        out.extend(all.map(|to| Output::Send { to: *to, message: Message::Revoke { marker } }));
        out.push(Output::Ended { marker, kind: running.kind, result: Err(failure) });
    }
}

impl Running {
    fn enter(&mut self, phase: Phase, now: Tick, timing: &Timing, out: &mut Vec<Output>) {
        self.phase = phase;
        self.waiting = self.membership.members().iter().copied().collect();
        let most = match phase {
            Phase::Asking => timing.mark_max,
            // A member's own limit comes first, so that it is told who and why.
            Phase::Preparing => timing.prepare_max + timing.freeze_max,
            Phase::Freezing => timing.freeze_max,
            Phase::Marking => timing.mark_max,
        };
        (self.until, self.again_at) = (now + most, now + timing.resend);
        self.say(out);
    }

    /// To all of whom something is waited for.
    fn say(&self, out: &mut Vec<Output>) {
        let (marker, kind, epoch) = (self.marker, self.kind, self.membership.epoch());
        for to in &self.waiting {
            let life = self.lives.get(to).copied().unwrap_or_default();
            let message = match self.phase {
                Phase::Asking => Message::Ask { marker, kind, epoch },
                Phase::Preparing => Message::Prepare { marker, kind, epoch },
                Phase::Freezing => Message::Freeze { marker, life },
                Phase::Marking => Message::Mark { marker, life },
            };
            out.push(Output::Send { to: *to, message });
        }
    }
}
