//! The sessions with machines that may belong to a group, and what each is to hear. A session has a [`Line`]; whoever has something to say to a
//! machine says it here. Nothing here waits: of rosters the last one counts, and what is wanted is passed on or not.

use crate::lock::locked;
use highwater_delta::{GroupId, MachineId};
use highwater_wire::SignedRoster;
use highwater_wire::message::PointAnswer;
use std::collections::HashMap;
use std::future::pending;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};

/// Points that may be wanted of one machine at once.
const WANTED_MAX: usize = 16;

/// A roster, or that the machine belongs to no group; none: that is not known yet.
type Roster = Option<Option<Arc<SignedRoster>>>;

/// What a session is to say.
#[derive(Debug)]
pub enum Order {
    /// The machine belongs to this group now, or to none.
    Group(Option<Arc<SignedRoster>>),
    /// A point is wanted.
    Wanted {
        /// The number by which the machine answers.
        request: u64,
        /// Of all members of this group, or of the machine alone.
        group: Option<GroupId>,
        /// With the applications' hooks.
        application: bool,
    },
}

struct Ask {
    group: Option<GroupId>,
    application: bool,
    answer: oneshot::Sender<PointAnswer>,
}

/// See the module.
#[derive(Default)]
pub struct Desk {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    sessions: HashMap<MachineId, Session>,
    /// Of every machine that belongs to a group; none: not known yet.
    rosters: Option<HashMap<MachineId, Arc<SignedRoster>>>,
    number: u64,
}

struct Session {
    number: u64,
    from: IpAddr,
    reachable: Option<String>,
    roster: watch::Sender<Roster>,
    ask: mpsc::Sender<Ask>,
}

impl Desk {
    /// A line for a machine's session, which comes from this address. One of an older session of the machine hears nothing more.
    pub fn open(self: &Arc<Self>, machine: MachineId, from: IpAddr) -> Line {
        let mut inner = locked(&self.inner);
        inner.number += 1;
        let number = inner.number;
        let roster = inner.rosters.as_ref().map(|rosters| rosters.get(&machine).cloned());
        let (roster, mut heard) = watch::channel(roster);
        // So that it is said at the beginning.
        heard.mark_changed();
        let (ask, asked) = mpsc::channel(WANTED_MAX);
        inner.sessions.insert(machine, Session { number, from, reachable: None, roster, ask });
        Line { desk: self.clone(), machine, number, heard, asked, waiting: HashMap::new(), requests: 0 }
    }

    /// What every machine is to know from now on.
    pub fn tell(&self, rosters: HashMap<MachineId, Arc<SignedRoster>>) {
        let mut inner = locked(&self.inner);
        for (machine, session) in &inner.sessions {
            let roster = Some(rosters.get(machine).cloned());
            session.roster.send_if_modified(|known| {
                let differs = *known != roster;
                if differs {
                    *known = roster;
                }
                differs
            });
        }
        inner.rosters = Some(rosters);
    }

    /// Where the machines that have a session here say they are reached.
    #[must_use]
    pub fn reachable(&self) -> Vec<(MachineId, String)> {
        let inner = locked(&self.inner);
        inner.sessions.iter().filter_map(|(machine, s)| Some((*machine, s.reachable.clone()?))).collect()
    }

    /// Whether a machine has a session here that knows of groups.
    #[must_use]
    pub fn has(&self, machine: MachineId) -> bool {
        locked(&self.inner).sessions.contains_key(&machine)
    }

    /// Asks a machine for a point; none: it has no session here, or too much is wanted of it. The answer fails when its session ends.
    pub fn ask(
        &self,
        machine: MachineId,
        group: Option<GroupId>,
        application: bool,
    ) -> Option<oneshot::Receiver<PointAnswer>> {
        let (answer, answered) = oneshot::channel();
        let inner = locked(&self.inner);
        inner.sessions.get(&machine)?.ask.try_send(Ask { group, application, answer }).ok()?;
        Some(answered)
    }
}

/// A session's.
pub struct Line {
    desk: Arc<Desk>,
    machine: MachineId,
    number: u64,
    heard: watch::Receiver<Roster>,
    asked: mpsc::Receiver<Ask>,
    waiting: HashMap<u64, oneshot::Sender<PointAnswer>>,
    requests: u64,
}

impl Line {
    /// The next thing to say. Cancellation-safe.
    pub async fn next(&mut self) -> Order {
        let (heard, asked) = (&mut self.heard, &mut self.asked);
        let roster = async {
            loop {
                // A newer session has taken its place.
                if heard.changed().await.is_err() {
                    pending::<()>().await;
                }
                if let Some(roster) = heard.borrow_and_update().clone() {
                    return roster;
                }
            }
        };
        let ask = async {
            match asked.recv().await {
                Some(ask) => ask,
                None => pending().await,
            }
        };
        let Ask { group, application, answer } = tokio::select! {
            biased;
            roster = roster => return Order::Group(roster),
            ask = ask => ask,
        };
        // Nobody waits for those any more.
        self.waiting.retain(|_, answer| !answer.is_closed());
        self.requests += 1;
        self.waiting.insert(self.requests, answer);
        Order::Wanted { request: self.requests, group, application }
    }

    /// The machine's answer; one to nothing that was asked is passed over.
    pub fn answer(&mut self, request: u64, answer: PointAnswer) {
        if let Some(waiting) = self.waiting.remove(&request) {
            // Whoever asked may have gone.
            let _ = waiting.send(answer);
        }
    }

    /// The machine is reached there; false if it is nowhere that one could be.
    pub fn reachable(&self, host: Option<&str>, port: u16) -> bool {
        let mut inner = locked(&self.desk.inner);
        let Some(session) = inner.sessions.get_mut(&self.machine).filter(|s| s.number == self.number) else {
            return true;
        };
        session.reachable = super::address::address(host, session.from, port);
        session.reachable.is_some()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut inner = locked(&self.desk.inner);
        if inner.sessions.get(&self.machine).is_some_and(|session| session.number == self.number) {
            inner.sessions.remove(&self.machine);
        }
    }
}
