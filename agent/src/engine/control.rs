//! Requests of operators.

use super::{Engine, Link, protect::operator, state::DiskState};
use crate::{
    control::{Response, Work},
    units::ByteSize,
};
use std::time::Instant;
use tokio::sync::oneshot;

impl Engine {
    pub(super) fn on_request(&mut self, work: Work, answer: oneshot::Sender<Response>) {
        if answer.is_closed() {
            // Whoever asked was told that it was not done, or has gone.
            return;
        }
        if self.delta_open && work != Work::Status {
            self.put_off.push_back((work, answer));
            return;
        }
        let response = match work {
            Work::Status => Response::Status(Box::new(self.status())),
            Work::Protect { path, name } => match self.protect(&path, name) {
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
            Work::Unprotect { disk } => match self.unprotect(&disk) {
                Ok(message) => {
                    self.announce();
                    Response::Done { message, point: None }
                }
                Err(error) => Response::Error(error),
            },
            Work::Point { application } => {
                if application {
                    self.applications.ask(true);
                }
                return self.want_point(answer);
            }
            Work::Resync { disk } => match self.find_disk(&disk) {
                Ok(at) if !self.disks[at].protected.replicated => {
                    refused(1473, "its first copy is not complete yet")
                }
                Ok(at) => {
                    let (id, name) = (self.disks[at].id(), self.disks[at].protected.name.clone());
                    self.start_resync(id, "asked for by an operator".into());
                    Response::Done {
                        message: format!("Disk {name} is being compared with the vault."),
                        point: None,
                    }
                }
                Err(error) => Response::Error(error),
            },
        };
        let _ = answer.send(response);
    }

    /// Answered when the point is stored, or has failed. Without a connection, one is tried first.
    pub(super) fn want_point(&mut self, answer: oneshot::Sender<Response>) {
        if self.machine.is_none() {
            let _ = answer.send(Response::Error(operator(
                1476,
                "this machine is not enrolled: there is no collector to store a point".into(),
                "Run `highwater-agent enroll URL -` with a token, then restart the agent",
            )));
            return;
        }
        if !matches!(self.link, Link::Up(_)) {
            self.attempt_wanted.push(answer);
            self.wake.notify_one();
            return;
        }
        let states = self.disks.iter().map(|d| (d.protected.name.as_str(), d.state.state()));
        if let Some((cause, action)) = why_no_point(states) {
            let _ = answer.send(Response::Error(operator(1474, cause, action)));
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

/// Why disks in these states can have no recovery point, and what to do; none if they can.
pub(super) fn why_no_point<'a>(
    disks: impl Iterator<Item = (&'a str, &'a DiskState)> + Clone,
) -> Option<(String, &'static str)> {
    let told = |(name, state): (&str, &DiskState)| match state.reason() {
        Some(reason) => format!("disk {name} is {}: {reason}", state.kind()),
        None => format!("disk {name} is {}", state.kind()),
    };
    let list = |of: Vec<String>| of.join("; ");
    if disks.clone().next().is_none() {
        return Some((
            "no disk is protected".into(),
            "Protect one with `highwater-agent protect DEVICE`, and wait for its first copy",
        ));
    }
    let doubtful: Vec<_> = disks.clone().filter(|(_, state)| !state.allows_points()).map(told).collect();
    if !doubtful.is_empty() {
        return Some((
            list(doubtful),
            "Wait for a comparison that runs; else see to the disk, or begin with `highwater-agent resync DISK`",
        ));
    }
    if disks.clone().any(|(_, state)| matches!(state, DiskState::Bitmap | DiskState::WriteOrdered)) {
        return None;
    }
    Some((
        list(disks.map(told).collect()),
        "Wait for the first copy: `highwater-agent status` tells how far it is",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_point_names_the_disks_and_their_reasons() {
        let why = |disks: &[(&str, DiskState)]| {
            why_no_point(disks.iter().map(|(name, state)| (*name, state))).map(|(cause, _)| cause)
        };
        assert_eq!(why(&[]).unwrap(), "no disk is protected");
        let first = ("a", DiskState::InitialReplication);
        assert_eq!(why(std::slice::from_ref(&first)).unwrap(), "disk a is initial-replication");
        assert_eq!(why(&[first.clone(), ("b", DiskState::Bitmap)]), None);
        let lost = ("c", DiskState::Error("its device is not there".into()));
        let said =
            why(&[first, ("b", DiskState::Bitmap), lost, ("d", DiskState::Suspect("tampered".into()))]);
        assert_eq!(said.unwrap(), "disk c is error: its device is not there; disk d is suspect: tampered");
    }
}
