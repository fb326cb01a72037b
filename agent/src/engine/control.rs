//! Requests of operators.

use super::{Engine, Link, protect::operator};
use crate::{
    config::ByteSize,
    control::{Request, Response},
};
use std::time::Instant;
use tokio::sync::oneshot;

impl Engine {
    pub(super) fn on_request(&mut self, request: Request, answer: oneshot::Sender<Response>) {
        let response = match request {
            Request::Status => Response::Status(Box::new(self.status())),
            Request::Protect { path, name } => match self.protect(&path, name) {
                Ok((at, notes)) => {
                    let disk = &self.disks[at];
                    Response::Protected {
                        disk: disk.id().to_string(),
                        name: disk.protected.name.clone(),
                        size_bytes: ByteSize(disk.size_bytes()),
                        identity: disk.protected.identity.to_string(),
                        notes,
                    }
                }
                Err(error) => Response::Error(error),
            },
            Request::Unprotect { disk } => match self.unprotect(&disk) {
                Ok(message) => {
                    self.announce();
                    Response::Done { message }
                }
                Err(error) => Response::Error(error),
            },
            Request::Point {} => return self.want_point(answer),
            Request::SetBandwidth { bandwidth } => {
                self.throttle.set_rate(bandwidth.0);
                Response::Done {
                    message: format!("The bandwidth limit is now {bandwidth}, until the agent restarts."),
                }
            }
            Request::ResyncNow { disk } => match self.find_disk(&disk) {
                Ok(at) if !self.disks[at].protected.replicated => {
                    refused(1473, "its first copy is not complete yet")
                }
                Ok(at) => {
                    let (id, name) = (self.disks[at].id(), self.disks[at].protected.name.clone());
                    self.start_resync(id, "asked for by an operator".into());
                    Response::Done { message: format!("Disk {name} is being compared with the vault.") }
                }
                Err(error) => Response::Error(error),
            },
        };
        let _ = answer.send(response);
    }

    /// Answered when the point is stored, or has failed.
    fn want_point(&mut self, answer: oneshot::Sender<Response>) {
        let why_not = if !matches!(self.link, Link::Up(_)) {
            self.wake.notify_one();
            Some("there is no connection to the collector (it is being tried now)")
        } else if !self.points_possible() {
            Some("no disk is fully replicated, or one is in doubt")
        } else {
            None
        };
        if let Some(why) = why_not {
            let _ = answer.send(refused(1474, why));
            return;
        }
        self.point_wanted.push(answer);
        self.point_due = Instant::now();
    }
}

pub(super) fn refused(code: u16, cause: &str) -> Response {
    Response::Error(operator(
        code,
        cause.to_owned(),
        "See `highwater-agent status` for the state of the disks and the connection",
    ))
}
