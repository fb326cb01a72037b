//! The owner of the protocol's state.

use super::{
    FromEngine, GroupStatus, MarkerStatus, SharedStatus, ToEngine,
    peers::{self, Connection, Event, Shared, Table},
};
use highwater_delta::{CommitId, DeltaId, GroupId, MachineId};
use highwater_group::{Failure, Input, Kind, Life, Machine, Marker, Output, Refusal, Tick};
use highwater_wire::{
    Credential, Identity, PeerMessage, Roster, SignedRoster, codec,
    files::write_secret,
    message::{AgentMessage, Kept, PointAnswer, Refusal as WireRefusal},
};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Markers that wait until this machine's point is stored.
const KEPT_MAX: usize = 16;
/// Reports that are said again in a new session.
const SAID_MAX: usize = 4;
/// Requests of operators that wait.
const REQUESTS_MAX: usize = 16;
/// So long an operator's request is tried again, while a member is busy.
const REQUEST_MAX: Duration = Duration::from_secs(60);
/// Callers that no roster known here names, and how long they may take to show one that does.
const STRANGERS_MAX: usize = 16;
const STRANGER_MAX: Duration = Duration::from_secs(10);
/// Between two attempts to listen.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);
/// Where the newest roster lies, in the run directory.
const ROSTER_FILE: &str = "group-roster";

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
    requests: Vec<Request>,
    /// Wanted again then.
    again: [Option<Instant>; 2],
    /// What the engine is busy with.
    part: Option<Marker>,
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
        for kind in [Kind::Application, Kind::Crash] {
            if self.again[kind as usize].take_if(|at| now >= *at).is_some() {
                self.input(Input::Wanted(kind));
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
                self.table.down(machine, number);
                self.strangers.retain(|(_, connection)| connection.number != number);
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
            FromEngine::Prepared { marker, done } => self.input(Input::Prepared { marker, done }),
            FromEngine::Frozen { marker, done } => self.input(Input::Frozen { marker, done }),
            FromEngine::Kept { marker, intact } => self.input(Input::Kept { marker, intact }),
            FromEngine::Lost { marker } => {
                tracing::info!(%marker, code = "HW-1458", "what this machine kept of the group's point is not stored");
                self.output(Output::Withdraw { marker });
            }
            FromEngine::Stored { marker, commit } => self.stored(marker, commit),
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
                self.part = Some(marker);
                self.ask(ToEngine::Prepare { marker, kind });
            }
            Output::Freeze { marker } => self.ask(ToEngine::Freeze { marker }),
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
                if let Some(member) = &self.member {
                    let group = member.roster.group;
                    self.ask(ToEngine::Tell(AgentMessage::Withdrawn { group, marker }));
                }
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
        if let Some(member) = &self.member {
            let group = member.roster.group;
            self.ask(ToEngine::Tell(AgentMessage::MarkerEnded { group, marker, kind, failed: why.clone() }));
        }
        let is_busy = matches!(
            result,
            Err(Failure::Refused(_, Refusal::Busy | Refusal::OtherMembership { .. }) | Failure::Changed)
        );
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
    fn stored(&mut self, marker: Marker, commit: CommitId) {
        let Some(at) = self.kept.iter().position(|(kept, ..)| *kept == marker) else { return };
        let (Some((_, kind, epoch)), Some(member)) = (self.kept.remove(at), &self.member) else { return };
        let kept = Kept { group: member.roster.group, epoch, marker, kind, commit };
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

    fn belongs(&self, credential: &Credential) -> bool {
        let member = self.member.as_ref().and_then(|member| member.roster.member(credential.machine));
        member.is_some_and(|member| credential.generation >= member.generation_min)
    }

    fn name(&self, machine: MachineId) -> String {
        let member = self.member.as_ref().and_then(|member| member.roster.member(machine));
        member
            .map(|member| member.host_name.clone())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| machine.to_string())
    }

    fn text(&self, failure: &Failure) -> String {
        match failure {
            Failure::Changed => "the members of the group changed meanwhile".to_owned(),
            Failure::Silent(silent) => {
                let member = |machine: &MachineId| self.member.as_ref()?.roster.member(*machine);
                let told = |machine: &MachineId| match member(machine) {
                    Some(member) if member.address.is_none() => {
                        format!(
                            "{} (it is not known where that is reached: does its agent run?)",
                            self.name(*machine)
                        )
                    }
                    _ => self.name(*machine),
                };
                let names: Vec<String> = silent.iter().take(8).map(told).collect();
                let more = silent.len().saturating_sub(8);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                format!("no answer in time from {}{more}", names.join(", "))
            }
            Failure::Refused(machine, why) => format!("{} {}", self.name(*machine), refused(why)),
        }
    }

    /// Takes over a roster that is newer, whoever brought it. `collector`: it may also be of another group.
    fn adopt(&mut self, signed: &SignedRoster, collector: bool) {
        if self.member.as_ref().is_some_and(|member| member.signed == *signed) {
            return;
        }
        let opened = signed.open(&self.peers.identity().ca);
        let (roster, membership) = match opened.and_then(|roster| Ok((roster.membership()?, roster))) {
            Ok((membership, roster)) => (roster, membership),
            Err(error) if collector => {
                return tracing::warn!(code = error.code(), %error, "the collector's roster of the group is not believed");
            }
            // Any machine of the vault may say so as often as it likes.
            Err(error) => return tracing::debug!(%error, "a roster that was passed on is not believed"),
        };
        match &self.member {
            // What the collector says of the present epoch holds, whatever time it is there.
            Some(member)
                if member.roster.group == roster.group
                    && roster.order() <= member.roster.order()
                    && !(collector && roster.epoch == member.roster.epoch) =>
            {
                return;
            }
            Some(member) if member.roster.group == roster.group => {}
            _ if !collector => return,
            Some(_) => self.leave(),
            None => {}
        }
        let timing = roster.timing();
        let is_new = self.member.is_none();
        let mut machine = match self.member.take() {
            Some(member) => member.machine,
            None => {
                tracing::info!(group = %roster.group, name = roster.name, members = roster.members.len(), "this machine belongs to a group");
                Machine::new(self.own, new_life(), timing)
            }
        };
        machine.set_timing(timing);
        self.status.set(Some(self.new_status(&roster)));
        let path = self.options.run_dir.join(ROSTER_FILE);
        let kept =
            codec::encode(&PeerMessage::Roster(signed.clone())).and_then(|bytes| write_secret(&path, &bytes));
        if let Err(error) = kept {
            tracing::debug!(%error, "the roster cannot be kept for the agent's next life");
        }
        self.member = Some(Member { roster, signed: signed.clone(), machine });
        let strangers = std::mem::take(&mut self.strangers);
        for (since, connection) in strangers {
            if self.belongs(&connection.credential) {
                self.welcome(connection);
            } else {
                self.strangers.push_back((since, connection));
            }
        }
        let member = self.member.as_ref();
        self.table.keep(|credential| {
            let known = member.and_then(|member| member.roster.member(credential.machine));
            known.is_some_and(|known| credential.generation >= known.generation_min)
        });
        if !is_new {
            self.table.tell_all(&PeerMessage::Roster(signed.clone()));
        }
        self.input(Input::Membership(membership));
    }

    fn new_status(&self, roster: &Roster) -> GroupStatus {
        let before = self.status.get().filter(|status| status.group == roster.group);
        let (last_kept, last_failed) =
            before.map_or((None, None), |before| (before.last_kept, before.last_failed));
        GroupStatus {
            group: roster.group,
            name: roster.name.clone(),
            epoch: roster.epoch,
            members: roster.members.len(),
            connected: self.table.len(),
            listening: self.listening.as_ref().map(|_| self.options.listen.to_string()),
            last_kept,
            last_failed,
        }
    }

    /// The machine belongs to no group any more.
    fn leave(&mut self) {
        let Some(member) = self.member.take() else { return };
        tracing::info!(group = %member.roster.group, name = member.roster.name, "this machine belongs to its group no longer");
        if let Some(marker) = self.part.take() {
            self.ask(ToEngine::Drop { marker });
        }
        self.table = Table::default();
        self.strangers.clear();
        self.listening = None;
        self.status.set(None);
        self.kept.clear();
        self.said.clear();
        for request in std::mem::take(&mut self.requests) {
            let cause = "this machine belongs to its group no longer".to_owned();
            self.answer(request.number, PointAnswer::Failed(refusal(cause)));
        }
        let _ = std::fs::remove_file(self.options.run_dir.join(ROSTER_FILE));
    }

    /// What an earlier life knew, until the collector tells what holds now.
    fn recall(&mut self) {
        let Ok(bytes) = std::fs::read(self.options.run_dir.join(ROSTER_FILE)) else { return };
        if let Ok(PeerMessage::Roster(signed)) = codec::decode(&bytes) {
            self.adopt(&signed, true);
        }
    }

    /// Listens while there is somebody to listen to.
    async fn listen(&mut self) {
        if self.member.is_none() || self.listening.is_some() || Instant::now() < self.listen_at {
            return;
        }
        match peers::bind(self.options.listen).await {
            Ok(listener) => {
                let stop = CancellationToken::new();
                tokio::spawn(peers::listen(self.peers.clone(), listener, stop.clone()));
                self.listening = Some(stop.drop_guard());
                self.listen_failures = 0;
                let listening = self.options.listen.to_string();
                self.status.change(|status| status.listening = Some(listening));
            }
            Err(error) => {
                self.listen_at = Instant::now() + LISTEN_AGAIN;
                self.listen_failures += 1;
                // Its own last listener may not have gone yet; then now and then only.
                if self.listen_failures % 16 != 3 {
                    return;
                }
                tracing::warn!(code = "HW-1459", address = %self.options.listen, %error,
                    "the members of the group cannot call this machine; free the port, or change group.listen in the configuration");
            }
        }
    }
}

fn refused(why: &Refusal) -> &'static str {
    match why {
        Refusal::Busy => "takes part in another marker, or rests from one",
        Refusal::OtherMembership { .. } => "knows of other members",
        Refusal::Old { .. } => "has heard of a later marker",
        Refusal::Unprepared => {
            "could not prepare: its disks can have no point now, or a hook has failed (its log says which)"
        }
        Refusal::Unfrozen => "could not freeze (its log says why)",
        Refusal::Late => "was ready or frozen for as long as it may be",
        Refusal::Thawed => "did not stand still until the word came",
        Refusal::Unknown => "knows nothing of the marker any more",
    }
}

fn refusal(cause: String) -> WireRefusal {
    let action = "See `highwater-agent status` and the log on the machine that is named".to_owned();
    WireRefusal { code: 1458, cause, action, retry: true, fatal: false }
}

fn told_of(marker: Marker, kind: Kind, why: Option<String>) -> MarkerStatus {
    MarkerStatus { marker: marker.to_string(), kind, at_ms: now_ms(), why }
}

fn new_life() -> Life {
    // Bytes 8 to 16 of such an id are random but for two bits.
    let mut nonce = [0; 8];
    nonce.copy_from_slice(&DeltaId::new().as_bytes()[8..]);
    Life { since: now_ms(), nonce: u64::from_le_bytes(nonce) }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
