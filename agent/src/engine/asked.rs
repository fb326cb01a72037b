//! Points that are asked for at the collector.

use super::Engine;
use crate::control::{Response, Work};
use highwater_wire::message::{AgentMessage, PointAnswer, Refusal};
use tokio::sync::oneshot::{self, error::TryRecvError};

/// More at once are not taken.
const ASKED_MAX: usize = 16;

/// Requests that wait: their numbers, and what they wait for.
#[derive(Default)]
pub(super) struct AskedPoints(Vec<(u64, oneshot::Receiver<Response>)>);

impl Engine {
    /// A point of this machine alone is asked for.
    pub(super) fn point_asked(&mut self, request: u64, application: bool) {
        if self.asked_points.0.len() >= ASKED_MAX {
            let cause = "too many recovery points are asked for at once".to_owned();
            return self
                .answer_point(request, PointAnswer::Failed(refusal(1474, cause, "Wait for those".into())));
        }
        let (answer, wait) = oneshot::channel();
        self.asked_points.0.push((request, wait));
        self.on_request(Work::Point { application }, answer);
    }

    /// Answers those whose point is stored, or has failed.
    pub(super) fn answer_points(&mut self) {
        let mut answers = vec![];
        self.asked_points.0.retain_mut(|(request, wait)| {
            let answer = match wait.try_recv() {
                Err(TryRecvError::Empty) => return true,
                Ok(Response::Done { point: Some(commit), .. }) => PointAnswer::Point(commit),
                Ok(Response::Error(error)) => {
                    PointAnswer::Failed(refusal(error.code, error.cause, error.action))
                }
                Ok(_) | Err(TryRecvError::Closed) => {
                    let cause = "the agent ended before there was a point".to_owned();
                    PointAnswer::Failed(refusal(1474, cause, "Ask again".into()))
                }
            };
            answers.push((*request, answer));
            false
        });
        for (request, answer) in answers {
            self.answer_point(request, answer);
        }
    }

    fn answer_point(&mut self, request: u64, answer: PointAnswer) {
        self.tell(AgentMessage::Answer { request, answer });
    }
}

fn refusal(code: u16, cause: String, action: String) -> Refusal {
    Refusal { code, cause, action, retry: true, fatal: false }
}
