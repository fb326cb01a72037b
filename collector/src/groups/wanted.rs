//! Points that are asked for: whoever has a session with a machine that could make one takes the request, passes it on, and writes the answer.
//!
//! A crash after a request was taken leaves it without an answer: whoever waits for it gives up at its time, which he set.

use crate::CollectorError;
use crate::shared::Shared;
use highwater_delta::{Code, GroupId, MachineId};
use highwater_vault::VaultError;
use highwater_vault::groups::{Answer, Of, Request, RequestId};
use highwater_wire::message::PointAnswer;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Answers waited for at once.
const WAITING_MAX: usize = 64;
/// However long somebody would wait.
const ANSWER_MAX: Duration = Duration::from_secs(3600);

/// See the module.
pub struct Wanted {
    shared: Arc<Shared>,
    /// Requests that are done with.
    past: HashSet<RequestId>,
    waiting: Arc<Semaphore>,
}

impl Wanted {
    /// Nothing was asked for yet.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, past: HashSet::new(), waiting: Arc::new(Semaphore::new(WAITING_MAX)) }
    }

    /// Looks for new requests.
    pub async fn look(&mut self) -> Result<(), VaultError> {
        let vault = &self.shared.vault;
        let all = vault.point_requests().await?;
        self.past.retain(|id| all.binary_search(id).is_ok());
        let new: Vec<RequestId> = all.into_iter().filter(|id| !self.past.contains(id)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let now_ms = vault.stamp_ms().await?;
        for id in new {
            let request = match vault.point_request(id).await {
                // Nobody can tell what it wants. Whoever waits for it gives up at his time.
                Err(error) if error.is_damage() => {
                    tracing::warn!(request = %id, code = %Code(error.code()), %error, "a request cannot be read");
                    None
                }
                request => request?,
            };
            let Some(request) = request.filter(|request| request.until_ms > now_ms) else {
                self.past.insert(id);
                continue;
            };
            let Some((machine, group)) = self.whom(&request).await else { continue };
            let Ok(place) = self.waiting.clone().try_acquire_owned() else { return Ok(()) };
            self.past.insert(id);
            if !vault.take_request(id, machine).await? {
                continue;
            }
            let (shared, left_ms) = (self.shared.clone(), request.until_ms.saturating_sub(now_ms));
            let wait = Duration::from_millis(left_ms).min(ANSWER_MAX);
            tokio::spawn(async move {
                let answer = ask(&shared, machine, group, request.application, wait).await;
                tracing::info!(request = %id, %machine, ?answer, "a point was asked for");
                if let Err(error) = shared.vault.answer_request(id, &answer).await {
                    tracing::warn!(request = %id, code = %Code(error.code()), %error, "an answer cannot be written");
                }
                drop(place);
            });
        }
        Ok(())
    }

    /// Who is asked: the machine, or the first member in line, that has a session here.
    async fn whom(&self, request: &Request) -> Option<(MachineId, Option<GroupId>)> {
        let desk = &self.shared.desk;
        match request.of {
            Of::Machine(machine) => desk.has(machine).then_some((machine, None)),
            Of::Group(group) => {
                let groups = self.shared.vault.groups_known().await;
                let members = &groups.get(group).filter(|group| !group.deleted)?.members;
                members.iter().find(|machine| desk.has(**machine)).map(|machine| (*machine, Some(group)))
            }
        }
    }
}

async fn ask(
    shared: &Shared,
    machine: MachineId,
    group: Option<GroupId>,
    application: bool,
    wait: Duration,
) -> Answer {
    let Some(answered) = shared.desk.ask(machine, group, application) else {
        return failed(&CollectorError::NotAsked(machine));
    };
    let answered = tokio::select! {
        answered = tokio::time::timeout(wait, answered) => answered,
        () = shared.shutdown.cancelled() => return failed(&CollectorError::ShuttingDown),
    };
    match answered {
        Ok(Ok(PointAnswer::Point(commit))) => Answer::Point(commit),
        Ok(Ok(PointAnswer::Marker(marker))) => Answer::Marker(marker),
        Ok(Ok(PointAnswer::Failed(refusal))) => {
            Answer::Failed { code: Code(refusal.code), cause: refusal.cause, action: refusal.action }
        }
        Ok(Err(_)) => failed(&CollectorError::SessionEnded(machine)),
        Err(_) => failed(&CollectorError::NoAnswer(machine)),
    }
}

fn failed(error: &CollectorError) -> Answer {
    Answer::Failed { code: Code(error.code()), cause: error.to_string(), action: error.action() }
}
