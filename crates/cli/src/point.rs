//! `point create`: asks for a point, and waits until it is stored.
//!
//! The request is a document of the vault: a collector that has a session with the machine, or with a member, takes it and passes it on. A request
//! that nobody has taken in time is taken back, so that it is not done later, when nobody expects it.

use crate::{
    CliError, Console, Exit,
    args::{CreatePoint, Global},
    context,
    error::Unmade,
    group::{consistency_text, host_names, point_document},
    list,
    output::{count, json, plain, rfc3339},
};
use highwater_delta::{CommitId, GroupId, MachineId};
use highwater_group::Marker;
use highwater_vault::{
    Vault,
    groups::{Answer, Decision, Group, GroupPoint, Of, RequestId},
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How often it is looked how it goes.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const TIMEOUT_MIN: Duration = Duration::from_secs(5);
/// A collector with a session takes a request within two seconds; a machine may be about to come back.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);

pub(crate) async fn create(
    global: &Global,
    what: &CreatePoint,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    if what.timeout < TIMEOUT_MIN {
        let cause =
            format!("--timeout is {} s at least: only to be passed on, it takes two", TIMEOUT_MIN.as_secs());
        return Err(CliError::Usage(cause));
    }
    let vault = context::open(global, console).await?;
    let until = Instant::now() + what.timeout;
    let (of, group, members) = match (&what.of.group, &what.of.machine) {
        (Some(group), _) => {
            let group = context::group(&vault, group, false).await?;
            let members = group.members.clone();
            (Of::Group(group.id), Some(group), members)
        }
        (None, Some(machine)) => {
            let machine = context::machine(&vault, machine).await?;
            (Of::Machine(machine), None, vec![machine])
        }
        (None, None) => return Err(CliError::Usage("give --group or --machine".to_owned())),
    };
    let names = host_names(&vault, members.into_iter()).await;
    let mut asked = Asked { vault: &vault, names, json: global.json, until, said: String::new() };
    let id = vault.ask_point(of, what.kind.application, what.timeout).await?;
    match (asked.answer(id, console).await?, group) {
        (Answer::Marker(marker), Some(group)) => {
            let point = asked.stored(&group, marker, console).await?;
            if global.json {
                json(console, &point_document(&point, &asked.names))?;
            } else {
                let done = &point.done;
                writeln!(
                    console.out,
                    "Point {marker} of {}: {}, {}-consistent, taken {}.",
                    plain(&group.name),
                    count(done.members.len() as u64, "member"),
                    consistency_text(done.consistency),
                    rfc3339(done.taken_at_ms)
                )?;
            }
        }
        (Answer::Point(commit), None) => of_machine(global, &vault, of, commit, console).await?,
        (Answer::Failed { code, cause, action }, _) => {
            return Err(Unmade { code: code.0, cause: asked.named(cause), action }.into());
        }
        (Answer::Marker(_) | Answer::Point(_), _) => {
            let cause = "the machine answered something else than it was asked for".to_owned();
            return Err(Unmade {
                code: 1515,
                cause,
                action: "check that its agent and the collector are releases that belong together".to_owned(),
            }
            .into());
        }
    }
    Ok(Exit::Success)
}

async fn of_machine(
    global: &Global,
    vault: &Vault,
    of: Of,
    commit: CommitId,
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    let Of::Machine(machine) = of else { return Ok(()) };
    let state = vault.machine(machine).await?;
    let point = state.point(commit)?;
    if global.json {
        let mut document = list::point_document(&state, point);
        document["machine"] = machine.to_string().into();
        return json(console, &document);
    }
    let (host, taken) = (plain(&state.host_name), rfc3339(point.info.taken_at_ms));
    writeln!(
        console.out,
        "Point {commit} of {host}: {}-consistent, taken {taken}.",
        list::consistency(&point.info)
    )?;
    Ok(())
}

struct Asked<'a> {
    vault: &'a Vault,
    names: HashMap<MachineId, String>,
    json: bool,
    until: Instant,
    said: String,
}

impl Asked<'_> {
    /// Says how it goes, each thing once.
    fn say(&mut self, text: String, console: &mut Console<'_>) -> Result<(), CliError> {
        if !self.json && self.said != text {
            writeln!(console.err, "{text}")?;
            self.said = text;
        }
        Ok(())
    }

    fn name(&self, machine: MachineId) -> String {
        self.names.get(&machine).map_or_else(|| machine.to_string(), |name| plain(name))
    }

    /// A text of an agent, in which machines are called by their ids.
    fn named(&self, mut text: String) -> String {
        for (machine, name) in &self.names {
            text = text.replace(&machine.to_string(), &plain(name));
        }
        text
    }

    async fn answer(&mut self, id: RequestId, console: &mut Console<'_>) -> Result<Answer, CliError> {
        let taken_until = self.until.min(Instant::now() + TAKEN_WITHIN);
        let mut taken = None;
        loop {
            if let Some(answer) = self.vault.request_answer(id).await? {
                return Ok(answer);
            }
            if taken.is_none() {
                taken = self.vault.request_taken(id).await?;
            }
            match taken.and_then(|taken| taken.machine) {
                Some(machine) => {
                    let name = self.name(machine);
                    self.say(format!("{name} was asked; waiting for its answer."), console)?;
                    if Instant::now() >= self.until {
                        let cause = format!("{name} was asked, and did not answer in time");
                        return Err(unmade(
                            1513,
                            cause,
                            "Look at its agent (`highwater-agent status`); a point may be made still.",
                        ));
                    }
                }
                None => {
                    self.say("Waiting for a collector with a session.".to_owned(), console)?;
                    if Instant::now() >= taken_until && self.vault.cancel_request(id).await? {
                        let all: Vec<String> = self.names.values().map(|name| plain(name)).collect();
                        let cause = format!("no collector has a session with {}", all.join(" or "));
                        return Err(unmade(
                            1512,
                            cause,
                            "See that a collector of this vault runs, and that the agents are connected (`highwater-agent status`) and know of groups.",
                        ));
                    }
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// All members keep the marker: waits until each has stored it.
    async fn stored(
        &mut self,
        group: &Group,
        marker: Marker,
        console: &mut Console<'_>,
    ) -> Result<GroupPoint, CliError> {
        loop {
            match self.vault.decision(group.id, marker).await? {
                Some(Decision::Complete(done)) => return Ok(GroupPoint { marker, done }),
                Some(Decision::Revoked(revoked)) => {
                    let cause = match revoked.by {
                        Some(machine) => format!("{} did not keep it after all", self.name(machine)),
                        None => "not all members have stored it in time".to_owned(),
                    };
                    return Err(unmade(
                        1514,
                        cause,
                        "Ask again; `highwater group show` tells who is waited for.",
                    ));
                }
                None => {}
            }
            let missing = self.missing(group.id, marker).await?;
            let waits = match &missing {
                Some(missing) => {
                    missing.iter().map(|machine| self.name(*machine)).collect::<Vec<_>>().join(", ")
                }
                None => "its members".to_owned(),
            };
            self.say(format!("All members keep {marker}; waiting until it is stored by {waits}."), console)?;
            if Instant::now() >= self.until {
                let cause = format!("all members keep {marker}, but it is not yet stored by {waits}");
                return Err(unmade(
                    1514,
                    cause,
                    "It becomes a point when they have sent it: see `highwater group show`.",
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn missing(&self, group: GroupId, marker: Marker) -> Result<Option<Vec<MachineId>>, CliError> {
        let pending = self.vault.group_pending(group).await?;
        Ok(pending.into_iter().find(|pending| pending.marker == marker).map(|pending| pending.missing))
    }
}

fn unmade(code: u16, cause: String, action: &str) -> CliError {
    Unmade { code, cause, action: action.to_owned() }.into()
}
