//! See `simulation`.

#![allow(clippy::unwrap_used, missing_docs)]

use highwater_delta::MachineId;
use highwater_group::{
    Failure, Input, Kind, Life, Machine, Marker, Membership, Message, Output, Tick, Timing,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

/// How bad the world is. Chances are in 10,000.
#[derive(Clone, Copy, Debug)]
pub struct Worldly {
    /// Clocks are this much faster or slower at most, in parts of 1000.
    pub skew: u64,
    /// Of a message to be lost.
    pub loss: u64,
    /// Of a message to come twice.
    pub twice: u64,
    /// Of an old message to come again, at each message.
    pub replay: u64,
    /// A message's delay, at most.
    pub delay: Tick,
    /// Of a crash, at each step.
    pub crash: u64,
    /// Of a hook or a freeze to fail.
    pub fail: u64,
    /// Of a hook or a freeze to take longer than it may.
    pub hang: u64,
    /// Of a freeze to be ended by something else.
    pub thawed: u64,
    /// Of the network to fall apart or to be whole again, at each step.
    pub partition: u64,
    /// Of the members to change, at each step.
    pub change: u64,
    /// Of somebody to ask for a marker, at each step.
    pub wanted: u64,
}

impl Worldly {
    pub fn good() -> Self {
        Self {
            skew: 1,
            loss: 0,
            twice: 0,
            replay: 0,
            delay: 5,
            crash: 0,
            fail: 0,
            hang: 0,
            thawed: 0,
            partition: 0,
            change: 0,
            wanted: 0,
        }
    }
    pub fn bad(seed: u64) -> Self {
        // Each seed its own kind of bad.
        let mut random = Random(seed ^ 0xbad);
        let mut up_to = |most: u64| if random.chance(3000) { 0 } else { random.below(most) };
        Self {
            skew: 100,
            loss: up_to(3000),
            twice: up_to(3000),
            replay: up_to(1000),
            delay: 1 + up_to(1500),
            crash: up_to(20),
            fail: up_to(500),
            hang: up_to(500),
            thawed: up_to(500),
            partition: up_to(20),
            change: up_to(10),
            wanted: up_to(50),
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, most: u64) -> u64 {
        if most == 0 { 0 } else { self.next() % most }
    }
    fn chance(&mut self, of_10000: u64) -> bool {
        self.below(10_000) < of_10000
    }
}

#[derive(Debug)]
enum Event {
    Deliver {
        from: usize,
        to: usize,
        message: Message,
    },
    Wake {
        node: usize,
    },
    /// What was asked of a machine is done, if it lives its life still.
    Done {
        node: usize,
        generation: u64,
        what: Done,
    },
    Start {
        node: usize,
    },
    Reported {
        node: usize,
        generation: u64,
        marker: Marker,
        epoch: u64,
    },
    Withdrawn {
        marker: Marker,
    },
    Told {
        node: usize,
        membership: Membership,
    },
}

#[derive(Debug, Clone, Copy)]
enum Done {
    Prepared(Marker, bool),
    Frozen(Marker, bool),
    Thawed(Marker),
}

struct Node {
    id: MachineId,
    machine: Option<Machine>,
    generation: u64,
    life: u64,
    /// Of 1000 real milliseconds, so many pass on its clock.
    rate: u64,
    /// Freezes or is frozen: for which, since when, and since when everything stands still.
    frozen: Option<(Marker, Tick, Option<Tick>)>,
    /// When it was thawed last in this life, and for how long it had been frozen.
    thawed: Option<(Tick, Tick)>,
    membership: Membership,
    gone: bool,
    /// When it is woken next.
    wake_at: Option<Tick>,
}

/// See `simulation`.
pub struct World {
    how: Worldly,
    random: Random,
    now: Tick,
    sequence: u64,
    queue: BinaryHeap<Reverse<(Tick, u64)>>,
    events: BTreeMap<u64, Event>,
    nodes: Vec<Node>,
    membership: Membership,
    /// Which side of a partition each is on.
    sides: Vec<bool>,
    old: Vec<(usize, usize, Message)>,
    timing: Timing,
    /// By marker and member: from when to when everything stood still.
    kept: BTreeMap<(Marker, MachineId), (Tick, Tick)>,
    memberships: BTreeMap<u64, Membership>,
    /// Of which each marker is that somebody kept.
    epochs: BTreeMap<Marker, u64>,
    reports: BTreeMap<Marker, (u64, BTreeSet<MachineId>)>,
    complete: BTreeSet<Marker>,
    revoked: BTreeSet<Marker>,
    failed: Vec<(Tick, Marker, Failure)>,
    sent: u64,
    steps: u64,
}

impl World {
    pub fn new(seed: u64, size: usize, how: Worldly) -> Self {
        let mut random = Random(seed);
        let timing = Timing {
            crash_every: Some(2_000),
            application_every: Some(9_000),
            prepare_max: 1_000,
            freeze_max: 600,
            hold_max: 1_000,
            mark_max: 800,
            resend: 50,
            patience: 1_500,
            retry: 500,
        };
        let ids: Vec<MachineId> = (0..size as u8).map(|n| MachineId::from_bytes([n + 1; 16])).collect();
        let membership = Membership::new(1, ids.clone()).unwrap();
        let nodes = ids.into_iter().map(|id| Node {
            id,
            machine: None,
            generation: 0,
            life: 1000,
            rate: 1000 - how.skew + random.below(2 * how.skew + 1),
            frozen: None,
            thawed: None,
            membership: membership.clone(),
            gone: false,
            wake_at: None,
        });
        let nodes: Vec<Node> = nodes.collect();
        let mut world = Self {
            how,
            random,
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sides: vec![false; nodes.len()],
            nodes,
            memberships: [(1, membership.clone())].into(),
            epochs: BTreeMap::new(),
            membership,
            old: vec![],
            timing,
            kept: BTreeMap::new(),
            reports: BTreeMap::new(),
            complete: BTreeSet::new(),
            revoked: BTreeSet::new(),
            failed: vec![],
            sent: 0,
            steps: 0,
        };
        for node in 0..world.nodes.len() {
            world.after(0, Event::Start { node });
        }
        world
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }
    pub fn complete(&self) -> u64 {
        self.complete.len() as u64
    }
    pub fn failed(&self) -> &[(Tick, Marker, Failure)] {
        &self.failed
    }
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// A machine dies and is taken out of the group.
    pub fn remove(&mut self, node: usize) {
        self.crash(node);
        self.nodes[node].gone = true;
        let id = self.nodes[node].id;
        let members = self.membership.members().iter().copied().filter(|m| *m != id).collect();
        self.tell_all(members);
    }

    pub fn restart_in_life(&mut self, node: usize, life: u64) {
        self.crash(node);
        // The next start adds one.
        self.nodes[node].life = life;
    }

    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            let Some(Reverse((at, key))) = self.queue.pop() else { return };
            self.steps += 1;
            self.now = self.now.max(at);
            let event = self.events.remove(&key).unwrap();
            self.happen(event);
            self.disturb();
            self.look();
        }
    }

    fn after(&mut self, delay: Tick, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((self.now + delay, self.sequence)));
        self.events.insert(self.sequence, event);
    }

    fn local(&self, node: usize) -> Tick {
        self.now * self.nodes[node].rate / 1000 + node as u64 * 12_345
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, message } => {
                if self.sides[from] == self.sides[to] {
                    let from = self.nodes[from].id;
                    self.input(to, Input::Message { from, message });
                }
            }
            Event::Wake { node } => {
                self.nodes[node].wake_at = None;
                self.input(node, Input::Tick);
            }
            Event::Done { node, generation, what } if generation == self.nodes[node].generation => {
                self.done(node, what);
            }
            Event::Done { .. } => {}
            Event::Start { node } => self.start(node),
            Event::Reported { node, generation, marker, epoch } => {
                // What was not stored yet is lost with the machine's memory.
                if generation == self.nodes[node].generation {
                    self.reported(self.nodes[node].id, marker, epoch);
                }
            }
            Event::Withdrawn { marker } => {
                if !self.complete.contains(&marker) {
                    self.revoked.insert(marker);
                }
            }
            Event::Told { node, membership } => {
                if self.nodes[node].membership.epoch() < membership.epoch() {
                    self.nodes[node].membership = membership.clone();
                }
                self.input(node, Input::Membership(membership));
            }
        }
    }

    fn start(&mut self, node: usize) {
        let (timing, nonce) = (self.timing, self.random.next());
        let one = &mut self.nodes[node];
        if one.machine.is_some() || one.gone {
            return;
        }
        one.life += 1;
        one.machine = Some(Machine::new(one.id, Life { since: one.life, nonce }, timing));
        let membership = one.membership.clone();
        self.input(node, Input::Membership(membership));
        if self.how.replay > 0 && self.random.chance(5_000) {
            // Somebody kept what was said to its last life, and says it again.
            let said: Vec<_> = self.old.iter().filter(|(_, to, _)| *to == node).copied().collect();
            for (number, (from, to, message)) in (0..).zip(said.into_iter().rev().take(12).rev()) {
                self.after(number * 150, Event::Deliver { from, to, message });
            }
        }
    }

    fn crash(&mut self, node: usize) {
        let one = &mut self.nodes[node];
        one.machine = None;
        one.generation += 1;
        // Its guardian thaws.
        one.frozen = None;
        one.thawed = None;
        let delay = 100 + self.random.below(8_000);
        self.after(delay, Event::Start { node });
    }

    fn done(&mut self, node: usize, what: Done) {
        match what {
            Done::Prepared(marker, done) => self.input(node, Input::Prepared { marker, done }),
            Done::Frozen(marker, done) => {
                match &mut self.nodes[node].frozen {
                    Some((of, _, still)) if *of == marker && done => *still = Some(self.now),
                    frozen if done => {
                        // It was told to drop it meanwhile.
                        assert!(frozen.is_none_or(|(of, ..)| of != marker));
                        return;
                    }
                    frozen => *frozen = None,
                }
                self.input(node, Input::Frozen { marker, done });
            }
            Done::Thawed(marker) => {
                if self.nodes[node].frozen.is_some_and(|(of, ..)| of == marker) {
                    self.nodes[node].frozen = None;
                }
            }
        }
    }

    fn input(&mut self, node: usize, input: Input) {
        let now = self.local(node);
        let Some(machine) = &mut self.nodes[node].machine else { return };
        let outputs = machine.on(now, input);
        let next = machine.next();
        for output in outputs {
            self.output(node, output);
        }
        if let Some(next) = next {
            // Rounded up: it is not woken before its time.
            let left = next.saturating_sub(now);
            let delay = (left * 1000).div_ceil(self.nodes[node].rate).max(1);
            let at = self.now + delay;
            if self.nodes[node].wake_at.is_none_or(|earlier| at < earlier) {
                self.nodes[node].wake_at = Some(at);
                self.after(delay, Event::Wake { node });
            }
        }
    }

    fn output(&mut self, node: usize, output: Output) {
        let generation = self.nodes[node].generation;
        match output {
            Output::Send { to, message } => self.send(node, to, message),
            Output::Prepare { marker, .. } => {
                let done = !self.random.chance(self.how.fail);
                let delay = if self.random.chance(self.how.hang) { 3_000 } else { self.random.below(200) };
                self.after(delay, Event::Done { node, generation, what: Done::Prepared(marker, done) });
            }
            Output::Freeze { marker } => {
                assert!(self.nodes[node].frozen.is_none(), "frozen already");
                if let Some((at, time)) = self.nodes[node].thawed {
                    // By one clock, which counts whole milliseconds.
                    assert!(
                        self.now - at + 12 >= 4 * time,
                        "frozen again {} ms after {time} ms",
                        self.now - at
                    );
                }
                self.nodes[node].frozen = Some((marker, self.now, None));
                let done = !self.random.chance(self.how.fail);
                let delay = if self.random.chance(self.how.hang) { 2_000 } else { self.random.below(100) };
                self.after(delay, Event::Done { node, generation, what: Done::Frozen(marker, done) });
                if self.random.chance(self.how.thawed) {
                    let delay = self.random.below(500);
                    self.after(delay, Event::Done { node, generation, what: Done::Thawed(marker) });
                }
            }
            Output::Keep { marker } => {
                self.note_thawed(node);
                let frozen = self.nodes[node].frozen.take();
                let intact = match frozen {
                    Some((of, _, Some(since))) if of == marker => {
                        let before = self.kept.insert((marker, self.nodes[node].id), (since, self.now));
                        assert!(before.is_none(), "kept twice");
                        true
                    }
                    _ => false,
                };
                self.input(node, Input::Kept { marker, intact });
            }
            Output::Drop { marker } => {
                if self.nodes[node].frozen.is_some_and(|(of, ..)| of == marker) {
                    self.note_thawed(node);
                    self.nodes[node].frozen = None;
                }
            }
            Output::Report { marker, epoch, .. } => {
                self.epochs.insert(marker, epoch);
                let delay = self.random.below(3_000);
                self.after(delay, Event::Reported { node, generation, marker, epoch });
            }
            Output::Withdraw { marker } => {
                let delay = self.random.below(3_000);
                self.after(delay, Event::Withdrawn { marker });
            }
            Output::Ended { marker, result, .. } => {
                if result.is_ok() {
                    let members = self.memberships[&self.epochs[&marker]].members();
                    let kept = |member: &MachineId| self.kept.contains_key(&(marker, *member));
                    assert!(members.iter().all(kept), "{marker:?} has ended well, and not all keep it");
                }
                self.failed.extend(result.err().map(|failure| (self.now, marker, failure)));
            }
        }
    }

    fn send(&mut self, from: usize, to: MachineId, message: Message) {
        self.sent += 1;
        let Some(to) = self.nodes.iter().position(|node| node.id == to) else { return };
        for _ in 0..if self.random.chance(self.how.twice) { 2 } else { 1 } {
            if !self.random.chance(self.how.loss) {
                let delay = self.random.below(self.how.delay);
                self.after(delay, Event::Deliver { from, to, message });
            }
        }
        if self.how.replay > 0 {
            self.old.push((from, to, message));
            if self.random.chance(self.how.replay) {
                let at = self.random.below(self.old.len() as u64) as usize;
                let (from, to, message) = self.old[at];
                let delay = self.random.below(2_000);
                self.after(delay, Event::Deliver { from, to, message });
            }
        }
    }

    fn reported(&mut self, member: MachineId, marker: Marker, epoch: u64) {
        let entry = self.reports.entry(marker).or_insert_with(|| (epoch, BTreeSet::new()));
        assert_eq!(entry.0, epoch, "one marker of two memberships");
        entry.1.insert(member);
        let membership = &self.memberships[&epoch];
        let all = membership.members().iter().all(|m| entry.1.contains(m));
        if !all || self.revoked.contains(&marker) || !self.complete.insert(marker) {
            return;
        }
        let times: Vec<(Tick, Tick)> =
            membership.members().iter().map(|m| self.kept[&(marker, *m)]).collect();
        let (last_frozen, first_thawed) =
            (times.iter().map(|t| t.0).max().unwrap(), times.iter().map(|t| t.1).min().unwrap());
        assert!(last_frozen <= first_thawed, "{marker:?}: no common instant: {times:?}");
    }

    fn disturb(&mut self) {
        let count = self.nodes.len() as u64;
        if self.random.chance(self.how.crash) {
            let node = self.random.below(count) as usize;
            if self.nodes[node].machine.is_some() {
                self.crash(node);
            }
        }
        if self.random.chance(self.how.partition) {
            let whole = self.random.chance(6_000);
            for side in 0..self.sides.len() {
                self.sides[side] = !whole && self.random.chance(5_000);
            }
        }
        // Connections end, whatever for; where a machine has crashed, some see it.
        if self.how.crash > 0 && self.random.chance(300) {
            let (node, gone) = (self.random.below(count) as usize, self.random.below(count) as usize);
            let gone = self.nodes[gone].id;
            self.input(node, Input::Gone(gone));
        }
        if self.random.chance(self.how.wanted) {
            let node = self.random.below(count) as usize;
            let kind = if self.random.chance(5_000) { Kind::Crash } else { Kind::Application };
            self.input(node, Input::Wanted(kind));
        }
        if self.random.chance(self.how.change) {
            let out = self.random.below(count) as usize;
            let keep = self.random.chance(5_000);
            let members = self.nodes.iter().enumerate().filter(|(n, _)| keep || *n != out || count == 1);
            let members = members.map(|(_, node)| node.id).collect();
            self.tell_all(members);
        }
    }

    fn tell_all(&mut self, members: Vec<MachineId>) {
        let epoch = self.membership.epoch() + 1;
        self.membership = Membership::new(epoch, members).unwrap();
        self.memberships.insert(epoch, self.membership.clone());
        for node in 0..self.nodes.len() {
            let delay = self.random.below(self.how.delay * 3);
            self.after(delay, Event::Told { node, membership: self.membership.clone() });
        }
    }

    fn note_thawed(&mut self, node: usize) {
        if let Some((_, since, _)) = self.nodes[node].frozen {
            self.nodes[node].thawed = Some((self.now, self.now - since));
        }
    }

    fn look(&self) {
        for node in &self.nodes {
            let Some((marker, since, _)) = node.frozen else { continue };
            // By its own clock, which may be slow; and it is woken a millisecond late.
            let most = self.timing.hold_max * 1000 / (1000 - self.how.skew) + 2;
            assert!(
                self.now - since <= most,
                "{:?} is frozen for {marker:?} since {} ms",
                node.id,
                self.now - since
            );
        }
    }
}
