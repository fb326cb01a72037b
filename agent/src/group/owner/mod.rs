//! The owner of the protocol's state.

mod roster;
mod words;

use super::{
    FreezeLimits, FromEngine, SharedStatus, ToEngine,
    peers::{Connection, Event, Shared, Table},
};
use highwater_delta::{CommitId, GroupId, MachineId};
use highwater_group::{Failure, Input, Kind, Machine, Marker, Output, Refusal, Tick};
use highwater_wire::{
    Identity, PeerMessage, Roster, SignedRoster,
    message::{AgentMessage, Kept, PointAnswer},
};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;
use words::{refusal, refused, told_of};

/// Markers that wait until this machine's point is stored.
const KEPT_MAX: usize = 16;
/// Reports that are said again in a new session.
const SAID_MAX: usize = 4;
/// And withdrawals.
const WITHDRAWN_MAX: usize = 16;
/// Requests of operators that wait.
const REQUESTS_MAX: usize = 16;
/// So long an operator's request is tried again, while a member is busy.
const REQUEST_MAX: Duration = Duration::from_secs(60);
/// Callers that no roster known here names, and how long they may take to show one that does.
const STRANGERS_MAX: usize = 16;
const STRANGER_MAX: Duration = Duration::from_secs(10);

/// What the operator chose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen, while the machine belongs to a group.
    pub listen: SocketAddr,
    /// In memory.
    pub run_dir: PathBuf,
}

/// What the collector tells.
#[derive(Clone, Debug)]
pub enum Told {
    /// There is a new session.
    Session,
    /// The group, or that there is none.
    Group(Option<SignedRoster>),
    /// A point of this group is wanted.
    Wanted {
        /// Which.
        group: GroupId,
        /// Its number.
        request: u64,
        /// What is to be frozen.
        kind: Kind,
    },
}

struct Request {
    number: u64,
    kind: Kind,
    until: Instant,
    not_by: Option<Marker>,
}

struct Member {
    roster: Roster,
    /// When the newest roster of the group that was ever believed was issued.
    newest_issued_ms: u64,
    signed: SignedRoster,
    machine: Machine,
}

struct Owner {
    own: MachineId,
    options: Options,
    began: Instant,
    member: Option<Member>,
    peers: Arc<Shared>,
    table: Table,
    strangers: VecDeque<(Instant, Connection)>,
    engine: mpsc::Sender<ToEngine>,
    status: SharedStatus,
    listening: Option<DropGuard>,
    listen_at: Instant,
    listen_failures: u32,
    /// Kept in which epoch, and not stored yet; oldest first.
    kept: VecDeque<(Marker, Kind, u64)>,
    /// What the collector was told lately: nobody says that it was heard, and saying it twice does no harm.
    said: VecDeque<Kept>,
    /// Markers that came to nothing though the others may have kept them: there may have been no session then.
    withdrawn: VecDeque<Marker>,
    requests: Vec<Request>,
    /// Wanted again then.
    again: [Option<Instant>; 2],
    /// What the engine is busy with.
    part: Option<(Marker, Kind)>,
}

/// Runs until the engine is gone.
pub async fn run(
    options: Options,
    own: MachineId,
    identity: impl Fn() -> Arc<Identity> + Send + Sync + 'static,
    mut told: mpsc::Receiver<Told>,
    engine: mpsc::Sender<ToEngine>,
    mut done: mpsc::UnboundedReceiver<FromEngine>,
    status: SharedStatus,
) {
    let (events, mut happened) = mpsc::channel(256);
    let mut owner = Owner {
        own,
        options,
        began: Instant::now(),
        member: None,
        peers: Shared::new(identity, events),
        table: Table::default(),
        strangers: VecDeque::new(),
        engine,
        status,
        listening: None,
        listen_at: Instant::now(),
        listen_failures: 0,
        kept: VecDeque::new(),
        said: VecDeque::new(),
        withdrawn: VecDeque::new(),
        requests: vec![],
        again: [None; 2],
        part: None,
    };
    owner.recall();
    loop {
        owner.listen().await;
        let due = owner.due();
        tokio::select! {
            () = owner.engine.closed() => return,
            Some(event) = happened.recv() => owner.on_event(event),
            Some(done) = done.recv() => owner.on_done(done),
            Some(told) = told.recv() => owner.on_told(told),
            () = tokio::time::sleep_until(due.into()) => owner.tick(),
        }
    }
}

impl Owner {
    fn now(&self) -> Tick {
        self.began.elapsed().as_millis() as Tick
    }

    fn due(&self) -> Instant {
        let next = self.member.as_ref().and_then(|member| member.machine.next());
        let machine = next.map(|tick| self.began + Duration::from_millis(tick));
        let idle = Instant::now() + Duration::from_secs(1);
        self.again.into_iter().chain([machine]).flatten().fold(idle, Instant::min)
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.strangers.retain(|(since, _)| now.duration_since(*since) < STRANGER_MAX);
        // What was asked for may wait until the machine has rested, and others may have made a marker meanwhile.
        for kind in [Kind::Application, Kind::Crash] {
            let waits = self.requests.iter().any(|request| request.kind == kind);
            let under_way = self.member.as_ref().is_some_and(|member| member.machine.coordinates().is_some());
            let again = &mut self.again[kind as usize];
            if !waits || under_way {
                // Nobody waits for another one.
                *again = None;
            } else if again.take_if(|at| now >= *at).is_some() {
                self.input(Input::Wanted(kind));
            } else if again.is_none() {
                *again = Some(now + Duration::from_secs(1));
            }
        }
        // Each marker ends, and answers; this is for requests that no marker answers.
        let late = |request: &Request| now > request.until + REQUEST_MAX * 10;
        for request in self.requests.extract_if(.., |request| late(request)).collect::<Vec<_>>() {
            let cause = "there was no marker that could answer".to_owned();
            self.answer(request.number, PointAnswer::Failed(refusal(cause)));
        }
        self.input(Input::Tick);
        let connected = self.table.len();
        self.status.change(|status| status.connected = connected);
    }

    fn on_told(&mut self, told: Told) {
        match told {
            Told::Session => self.tell_again(),
            Told::Group(Some(signed)) => self.adopt(&signed, true),
            Told::Group(None) => self.leave(),
            Told::Wanted { request, group, kind } => self.wanted(request, group, kind),
        }
    }

    fn wanted(&mut self, number: u64, group: GroupId, kind: Kind) {
        let member = self.member.as_ref().filter(|member| member.roster.group == group);
        let (Some(member), true) = (member, self.requests.len() < REQUESTS_MAX) else {
            let cause = match member {
                None => "this machine does not belong to that group",
                Some(_) => "too many points are asked for at once",
            };
            return self.answer(number, PointAnswer::Failed(refusal(cause.to_owned())));
        };
        // One that is under way may have been frozen before it was asked for.
        let not_by = member.machine.coordinates();
        self.requests.push(Request { number, kind, until: Instant::now() + REQUEST_MAX, not_by });
        self.input(Input::Wanted(kind));
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Up(connection) if self.belongs(&connection.credential) => self.welcome(connection),
            Event::Up(connection) => {
                // What was to be said to whoever was called is not for this certificate.
                self.table.unreachable(connection.credential.machine);
                if self.strangers.len() >= STRANGERS_MAX {
                    self.strangers.pop_front();
                }
                self.strangers.push_back((Instant::now(), connection));
            }
            Event::Down(machine, number) => {
                self.strangers.retain(|(_, connection)| connection.number != number);
                if self.table.down(machine, number) {
                    self.input(Input::Gone(machine));
                }
            }
            Event::Unreachable(machine, why) => {
                let name = self.name(machine);
                tracing::debug!(%machine, name, why, "a member of the group cannot be reached");
                self.table.unreachable(machine);
            }
            Event::Said(_, _, PeerMessage::Roster(signed)) => self.adopt(&signed, false),
            Event::Said(from, number, PeerMessage::Said { group, message }) => {
                // By the connection, not by the name: another of this machine's may have shown a certificate that was revoked.
                let is_known = self.member.as_ref().is_some_and(|member| member.roster.group == group)
                    && self.table.has(from, number);
                if is_known {
                    self.input(Input::Message { from, message });
                }
            }
        }
    }

    /// A member is connected: it is told the roster, since it may have an older one.
    fn welcome(&mut self, connection: Connection) {
        if let Some(member) = &self.member {
            connection.say(PeerMessage::Roster(member.signed.clone()));
        }
        self.table.up(connection);
    }

    fn on_done(&mut self, done: FromEngine) {
        match done {
            FromEngine::Prepared { marker, done } => {
                self.own_part(marker, done, &Refusal::Unprepared);
                self.input(Input::Prepared { marker, done });
            }
            FromEngine::Frozen { marker, done } => {
                self.own_part(marker, done, &Refusal::Unfrozen);
                self.input(Input::Frozen { marker, done });
            }
            FromEngine::Kept { marker, intact } => {
                self.own_part(marker, intact, &Refusal::Thawed);
                self.input(Input::Kept { marker, intact });
            }
            FromEngine::Lost { marker } => {
                tracing::info!(%marker, code = "HW-1458", "what this machine kept of the group's point is not stored");
                self.output(Output::Withdraw { marker });
            }
            FromEngine::Stored { marker, commit, taken_at_ms } => self.stored(marker, commit, taken_at_ms),
        }
    }

    /// What this machine itself did not do for a marker is told where it is looked for.
    fn own_part(&self, marker: Marker, done: bool, why: &Refusal) {
        if let Some((_, kind)) = self.part.filter(|(of, _)| *of == marker && !done) {
            let failed = told_of(marker, kind, Some(format!("this machine {}", refused(why))));
            self.status.change(|status| status.last_failed = Some(failed));
        }
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        let Some(member) = &mut self.member else { return };
        for output in member.machine.on(now, input) {
            self.output(output);
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Send { to, message } => {
                let Some(member) = &self.member else { return };
                let address = member.roster.member(to).and_then(|member| member.address.as_deref());
                let group = member.roster.group;
                self.table.say(&self.peers, to, address, PeerMessage::Said { group, message });
            }
            Output::Prepare { marker, kind } => {
                self.part = Some((marker, kind));
                self.ask(ToEngine::Prepare { marker, kind });
            }
            Output::Freeze { marker } => {
                let Some(member) = &self.member else { return };
                let timing = member.roster.timing();
                let [within, hold] = [timing.freeze_max, timing.hold_max].map(Duration::from_millis);
                self.ask(ToEngine::Freeze { marker, limits: FreezeLimits { within, hold } });
            }
            Output::Keep { marker } => self.ask(ToEngine::Keep { marker }),
            Output::Drop { marker } => {
                self.part = None;
                self.ask(ToEngine::Drop { marker });
            }
            Output::Report { marker, epoch, kind } => {
                self.part = None;
                if self.kept.len() >= KEPT_MAX {
                    self.kept.pop_front();
                }
                self.kept.push_back((marker, kind, epoch));
            }
            Output::Withdraw { marker } => {
                self.kept.retain(|(kept, ..)| *kept != marker);
                self.said.retain(|kept| kept.marker != marker);
                if self.withdrawn.len() >= WITHDRAWN_MAX {
                    self.withdrawn.pop_front();
                }
                self.withdrawn.push_back(marker);
                self.tell_withdrawn(marker);
            }
            Output::Ended { marker, kind, result } => self.ended(marker, kind, result),
        }
    }

    /// A marker that this machine coordinated is over.
    fn ended(&mut self, marker: Marker, kind: Kind, result: Result<(), Failure>) {
        let why = result.as_ref().err().map(|failure| self.text(failure));
        if let Some(why) = &why {
            tracing::info!(%marker, ?kind, why, code = "HW-1458", "no point of the group this time");
            let failed = told_of(marker, kind, Some(why.clone()));
            self.status.change(|status| status.last_failed = Some(failed));
        } else {
            tracing::debug!(%marker, ?kind, "every member keeps the marker");
        }
        let is_busy = matches!(
            result,
            Err(Failure::Refused(_, Refusal::Busy | Refusal::OtherMembership { .. }) | Failure::Changed)
        );
        // That somebody rests from the marker before is no failure that an operator should see to.
        if let Some(member) = self.member.as_ref().filter(|_| !is_busy) {
            let group = member.roster.group;
            self.ask(ToEngine::Tell(AgentMessage::MarkerEnded { group, marker, kind, failed: why.clone() }));
        }
        let now = Instant::now();
        let (over, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.requests).into_iter().partition(|request| {
                request.kind == kind && request.not_by != Some(marker) && !(is_busy && now < request.until)
            });
        self.requests = waiting;
        for request in over {
            let answer = match &why {
                None => PointAnswer::Marker(marker),
                Some(why) => PointAnswer::Failed(refusal(why.clone())),
            };
            self.answer(request.number, answer);
        }
        if self.requests.iter().any(|request| request.kind == kind) {
            self.again[kind as usize] = Some(now + Duration::from_secs(1));
        }
    }

    /// Tells the collector: it is kept by the protocol, and stored by the vault.
    fn stored(&mut self, marker: Marker, commit: CommitId, taken_at_ms: u64) {
        let Some(at) = self.kept.iter().position(|(kept, ..)| *kept == marker) else { return };
        let (Some((_, kind, epoch)), Some(member)) = (self.kept.remove(at), &self.member) else { return };
        let kept = Kept { group: member.roster.group, epoch, marker, kind, commit, taken_at_ms };
        self.ask(ToEngine::Tell(AgentMessage::Kept(kept)));
        if self.said.len() >= SAID_MAX {
            self.said.pop_front();
        }
        self.said.push_back(kept);
        let told = told_of(marker, kind, None);
        self.status.change(|status| status.last_kept = Some(told));
    }

    fn tell_again(&self) {
        for kept in &self.said {
            self.ask(ToEngine::Tell(AgentMessage::Kept(*kept)));
        }
        self.withdrawn.iter().for_each(|marker| self.tell_withdrawn(*marker));
    }

    fn tell_withdrawn(&self, marker: Marker) {
        if let Some(member) = &self.member {
            let group = member.roster.group;
            self.ask(ToEngine::Tell(AgentMessage::Withdrawn { group, marker }));
        }
    }

    fn answer(&self, request: u64, answer: PointAnswer) {
        self.ask(ToEngine::Tell(AgentMessage::Answer { request, answer }));
    }

    /// The engine may be busy for long, but not with so much: what does not fit is not done, and the protocol notices.
    fn ask(&self, ask: ToEngine) {
        if let Err(error) = self.engine.try_send(ask) {
            tracing::warn!(%error, "the engine does not take what the group asks for");
        }
    }
}
