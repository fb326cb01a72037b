//! One machine of a group: a member always, and a coordinator when it is its turn.

use crate::{
    coordinator::Coordinator,
    member::Member,
    membership::Membership,
    message::{Kind, Life, Marker, Message, Refusal},
    step::{Failure, Input, Output},
    timing::{Tick, Timing},
};
use highwater_delta::MachineId;

/// See the module.
#[derive(Debug)]
pub struct Machine {
    own: MachineId,
    timing: Timing,
    membership: Option<Membership>,
    member: Member,
    coordinator: Coordinator,
    /// When this machine would coordinate, by kind.
    due: [Option<Tick>; 2],
    /// How many markers in a row came to nothing, by kind: that it coordinated, or took part in.
    failures: [u32; 2],
}

/// After so many failures in a row the pause until the next marker grows no more: by then it is 16 times the first.
const FAILURES_MAX: u32 = 5;

impl Machine {
    /// In a new life; a member of nothing yet.
    #[must_use]
    pub fn new(own: MachineId, life: Life, timing: Timing) -> Self {
        Self {
            own,
            timing,
            membership: None,
            member: Member::new(life),
            coordinator: Coordinator::new(own, life),
            due: [None, None],
            failures: [0; 2],
        }
    }

    /// How long things take from now on. What is under way goes on as it began. Markers come at their new times: no later than an interval from now, at once
    /// if there were none before.
    pub fn set_timing(&mut self, now: Tick, timing: Timing) {
        let before = std::mem::replace(&mut self.timing, timing);
        if timing == before || !self.membership.as_ref().is_some_and(|m| m.contains(self.own)) {
            return;
        }
        let behind = self.behind();
        for kind in [Kind::Crash, Kind::Application] {
            let every = self.every(kind);
            let due = &mut self.due[kind as usize];
            *due = every.map(|every| due.map_or(now + behind, |due| due.min(now + every + behind)));
        }
    }

    /// Takes in what happened; answers what is to be done, in this order.
    pub fn on(&mut self, now: Tick, input: Input) -> Vec<Output> {
        let mut out = vec![];
        self.take(now, input, &mut out);
        // What it says to itself is not sent.
        let mut all = vec![];
        let mut pending = std::collections::VecDeque::from(out);
        while let Some(output) = pending.pop_front() {
            match output {
                Output::Send { to, message } if to == self.own => {
                    let mut more = vec![];
                    self.told(now, self.own, &message, &mut more);
                    pending.extend(more);
                }
                other => all.push(other),
            }
        }
        all
    }

    /// The marker that it takes the members through now.
    #[must_use]
    pub fn coordinates(&self) -> Option<Marker> {
        self.coordinator.running()
    }

    /// When [`Input::Tick`] is due at the latest.
    #[must_use]
    pub fn next(&self) -> Option<Tick> {
        let due = self.due.into_iter().flatten();
        due.chain(self.member.next()).chain(self.coordinator.next()).min()
    }

    fn take(&mut self, now: Tick, input: Input, out: &mut Vec<Output>) {
        let (part, before) = (self.member.part(), out.len());
        self.act(now, input, out);
        self.unless_kept(now, part, &out[before..]);
    }

    /// If what it took part in came to nothing, this machine may be the better one to coordinate: the other may not reach all.
    fn unless_kept(&mut self, now: Tick, part: Option<(Marker, Kind)>, out: &[Output]) {
        let Some((marker, kind)) = part.filter(|part| self.member.part() != Some(*part)) else { return };
        let kept = |output: &Output| matches!(output, Output::Report { marker: of, .. } if *of == marker);
        let failures = &mut self.failures[kind as usize];
        if out.iter().any(kept) {
            *failures = 0;
            if marker.coordinator != self.own {
                self.heard(now, kind);
            }
            return;
        }
        if marker.coordinator == self.own || self.every(kind).is_none() {
            return;
        }
        // All in line pause longer, or each of them would keep the others busy.
        let failures = &mut self.failures[kind as usize];
        *failures = (*failures + 1).min(FAILURES_MAX);
        let next = now + self.pause(kind) + self.behind();
        let due = &mut self.due[kind as usize];
        *due = due.map(|due| due.min(next));
    }

    fn act(&mut self, now: Tick, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Tick => self.tick(now, out),
            Input::Message { from, message } => self.told(now, from, &message, out),
            Input::Prepared { marker, done } => self.member.prepared(now, &self.timing, marker, done, out),
            Input::Frozen { marker, done } => self.member.frozen(now, marker, done, out),
            Input::Kept { marker, intact } => self.member.kept(now, marker, intact, out),
            Input::Membership(membership) => self.change(now, membership, out),
            Input::Wanted(kind) => self.begin(now, kind, out),
            Input::Gone(machine) => {
                let before = out.len();
                self.coordinator.gone(machine, out);
                self.after(now, before, out);
            }
        }
    }

    fn told(&mut self, now: Tick, from: MachineId, message: &Message, out: &mut Vec<Output>) {
        let Some(membership) = &self.membership else { return };
        if !membership.contains(from) || !membership.contains(self.own) {
            return;
        }
        let (epoch, marker) = (membership.epoch(), message.marker());
        let for_member = matches!(
            message,
            Message::Ask { .. }
                | Message::Prepare { .. }
                | Message::Freeze { .. }
                | Message::Mark { .. }
                | Message::Revoke { .. }
        );
        // Nobody speaks for another coordinator.
        if for_member && marker.coordinator != from {
            return;
        }
        match *message {
            Message::Ask { epoch: theirs, .. } | Message::Prepare { epoch: theirs, .. }
                if theirs != epoch =>
            {
                let why = Refusal::OtherMembership { epoch };
                out.push(Output::Send { to: from, message: Message::Refuse { marker, why } });
            }
            Message::Ask { kind, .. } => self.member.asked(now, (marker, kind), out),
            Message::Prepare { kind, .. } => {
                // Its own turn comes later when this one is kept: one that comes to nothing must not put off who may do better.
                self.member.prepare(now, &self.timing, (marker, kind, epoch), out);
            }
            Message::Freeze { life, .. } => self.member.freeze(now, &self.timing, marker, life, out),
            Message::Mark { life, .. } => self.member.mark(now, &self.timing, marker, life, out),
            Message::Revoke { .. } => self.member.revoke(now, marker, out),
            _ => {
                let before = out.len();
                self.coordinator.told(now, &self.timing, from, message, out);
                self.after(now, before, out);
            }
        }
    }

    fn tick(&mut self, now: Tick, out: &mut Vec<Output>) {
        self.member.tick(now, out);
        let before = out.len();
        self.coordinator.tick(now, &self.timing, out);
        self.after(now, before, out);
        for kind in [Kind::Application, Kind::Crash] {
            if self.due[kind as usize].is_some_and(|due| now >= due) {
                self.begin(now, kind, out);
            }
        }
    }

    /// If a marker has come to nothing, the next comes sooner: but not ever again at once, while a member is away or cannot do its part.
    fn after(&mut self, now: Tick, before: usize, out: &[Output]) {
        for output in &out[before..] {
            let Output::Ended { kind, result, .. } = output else { continue };
            let failures = &mut self.failures[*kind as usize];
            match result {
                Ok(()) => *failures = 0,
                // Soon over.
                Err(
                    Failure::Refused(
                        _,
                        Refusal::Busy | Refusal::OtherMembership { .. } | Refusal::Old { .. },
                    )
                    | Failure::Changed,
                ) => {}
                Err(Failure::Silent(_) | Failure::Slow(_) | Failure::Refused(..)) => {
                    *failures = (*failures + 1).min(FAILURES_MAX);
                }
            }
            if result.is_err() {
                let next = now + self.pause(*kind) + self.behind();
                let due = &mut self.due[*kind as usize];
                *due = due.map(|due| due.min(next));
            }
        }
    }

    /// After a marker that came to nothing, so long until the next.
    fn pause(&self, kind: Kind) -> Tick {
        let pause = self.timing.retry << self.failures[kind as usize].saturating_sub(1);
        self.every(kind).map_or(pause, |every| pause.min(every))
    }

    fn begin(&mut self, now: Tick, kind: Kind, out: &mut Vec<Output>) {
        let Some(membership) = self.membership.clone().filter(|m| m.contains(self.own)) else { return };
        if self.member.is_busy() || self.coordinator.is_busy() {
            // It is looked again when that is over.
            self.due[kind as usize] = Some(now + self.timing.resend);
            return;
        }
        if let Some(until) = self.member.rests_until(now, kind) {
            // It would refuse itself.
            self.due[kind as usize] = Some(until);
            return;
        }
        self.heard(now, kind);
        self.coordinator.begin(now, &self.timing, &membership, kind, out);
    }

    /// A marker of this kind has begun here, or was kept.
    fn heard(&mut self, now: Tick, kind: Kind) {
        let behind = self.behind();
        let next = |every: Option<Tick>| every.map(|every| now + every + behind);
        self.due[Kind::Crash as usize] = next(self.timing.crash_every);
        if kind == Kind::Application {
            self.due[Kind::Application as usize] = next(self.timing.application_every);
        }
    }

    fn every(&self, kind: Kind) -> Option<Tick> {
        match kind {
            Kind::Crash => self.timing.crash_every,
            Kind::Application => self.timing.application_every,
        }
    }

    /// How long it waits for those before it in line.
    fn behind(&self) -> Tick {
        let rank = self.membership.as_ref().and_then(|m| m.rank(self.own)).unwrap_or_default();
        rank as Tick * self.timing.patience
    }

    fn change(&mut self, now: Tick, membership: Membership, out: &mut Vec<Output>) {
        // Which of two holds is for the caller to know: a vault that was restored may have gone back to an earlier one.
        if self.membership.as_ref() == Some(&membership) {
            return;
        }
        self.coordinator.revoke(Failure::Changed, out);
        let belongs = membership.contains(self.own);
        self.membership = Some(membership);
        if !belongs {
            self.due = [None, None];
            self.member.abandon(now, out);
            return;
        }
        let behind = self.behind();
        for kind in [Kind::Crash, Kind::Application] {
            self.due[kind as usize] = self.every(kind).map(|_| now + behind);
        }
    }
}
