//! Where requests arrive: what needs nothing of the engine is answered at once, the rest is passed on to it.
//!
//! A round of replication can take long, above all under a bandwidth limit, and the engine takes no requests meanwhile.
//! The limit itself is changed here, so that it holds for the round that is under way; and who asks how things stand gets an answer
//! within [`PATIENCE`]: the engine's own, or the last one on the [`Board`].

use super::{Request, Response, StatusReport, refused};
use crate::{config::Bandwidth, throttle::Throttle};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

/// How long the engine may take to answer.
const ANSWER: Duration = Duration::from_secs(300);
/// How long it may take to say how things stand, before its last report must do.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the engine is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// How everything stands.
    Status,
    /// See [`Request::Protect`].
    Protect {
        /// Any path that leads to it.
        path: PathBuf,
        /// For people.
        name: Option<String>,
    },
    /// See [`Request::Unprotect`].
    Unprotect {
        /// Its id, its name or a path.
        disk: String,
    },
    /// See [`Request::Point`].
    Point {
        /// With the applications' hooks.
        application: bool,
    },
    /// See [`Request::ResyncNow`].
    Resync {
        /// Its id, its name or a path.
        disk: String,
    },
}

/// Work on its way to the engine, and where its response goes.
pub type Ask = (Work, oneshot::Sender<Response>);

/// The engine's last report.
#[derive(Debug, Default)]
pub struct Board(Mutex<Option<StatusReport>>);

impl Board {
    /// Puts it up.
    pub fn put(&self, report: StatusReport) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }
    fn read(&self) -> Option<StatusReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Desk {
    asks: mpsc::Sender<Ask>,
    board: Arc<Board>,
    throttle: Arc<Throttle>,
    /// One question how things stand waits for the engine; the queue is not filled with more of them.
    status: Arc<Semaphore>,
}

impl Desk {
    /// Passes work on by `asks`.
    #[must_use]
    pub fn new(asks: mpsc::Sender<Ask>, board: Arc<Board>, throttle: Arc<Throttle>) -> Self {
        Self { asks, board, throttle, status: Arc::new(Semaphore::new(1)) }
    }

    /// Until the engine is gone.
    pub async fn closed(&self) {
        self.asks.closed().await;
    }

    /// Answers a request.
    pub async fn answer(&self, request: Request) -> Response {
        match request {
            Request::Status => self.status().await,
            Request::SetBandwidth { bandwidth } => {
                self.throttle.set_rate(bandwidth.0);
                Response::Done {
                    message: format!("The bandwidth limit is now {bandwidth}, until the agent restarts."),
                    point: None,
                }
            }
            Request::Protect { path, name } => ask(&self.asks, Work::Protect { path, name }).await,
            Request::Unprotect { disk } => ask(&self.asks, Work::Unprotect { disk }).await,
            Request::Point { application } => ask(&self.asks, Work::Point { application }).await,
            Request::ResyncNow { disk } => ask(&self.asks, Work::Resync { disk }).await,
        }
    }

    async fn status(&self) -> Response {
        let asked = async {
            let turn = Arc::clone(&self.status).acquire_owned().await.ok()?;
            let asks = self.asks.clone();
            // Goes on when nobody waits any more, so that the turn ends with the engine's answer.
            let task = tokio::spawn(async move {
                let answer = pass_on(&asks, Work::Status).await;
                drop(turn);
                answer
            });
            task.await.ok()
        };
        if let Ok(Some(response)) = timeout(PATIENCE, asked).await {
            return response;
        }
        match self.board.read() {
            Some(mut report) => {
                report.bandwidth = Bandwidth(self.throttle.rate_per_s());
                Response::Status(Box::new(report))
            }
            None => ask(&self.asks, Work::Status).await,
        }
    }
}

/// What is not answered in time is not done: the engine passes over what nobody waits for.
async fn ask(asks: &mpsc::Sender<Ask>, work: Work) -> Response {
    match timeout(ANSWER, pass_on(asks, work)).await {
        Ok(response) => response,
        Err(_) => refused("the agent is too busy to answer; it was not done"),
    }
}

async fn pass_on(asks: &mpsc::Sender<Ask>, work: Work) -> Response {
    let (sender, receiver) = oneshot::channel();
    if asks.send((work, sender)).await.is_err() {
        return refused("the agent is stopping");
    }
    receiver.await.unwrap_or_else(|_| refused("the agent is stopping"))
}

#[cfg(test)]
mod tests;
