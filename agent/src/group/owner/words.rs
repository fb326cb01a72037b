//! What is told to people of markers that came to nothing.

use super::{super::MarkerStatus, Owner};
use highwater_delta::MachineId;
use highwater_group::{Failure, Kind, Marker, Refusal};
use highwater_wire::message::Refusal as WireRefusal;
use std::time::{SystemTime, UNIX_EPOCH};

impl Owner {
    pub(super) fn text(&self, failure: &Failure) -> String {
        match failure {
            Failure::Changed => "the members of the group changed meanwhile".to_owned(),
            Failure::Silent(silent) | Failure::Slow(silent) => {
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
                let names = names.join(", ");
                match failure {
                    Failure::Slow(_) => {
                        format!("not frozen within half of the group's --hold: {names}{more}")
                    }
                    _ => format!("no answer in time from {names}{more}"),
                }
            }
            Failure::Refused(machine, why) => format!("{} {}", self.name(*machine), refused(why)),
        }
    }
}

pub(super) fn refused(why: &Refusal) -> &'static str {
    match why {
        Refusal::Busy => "takes part in another marker, or rests from one",
        Refusal::OtherMembership { .. } => "knows of other members",
        Refusal::Old { .. } => "has heard of a later marker",
        Refusal::Unprepared => {
            "could not prepare: its disks can have no point now (no connection to a collector, a first copy or a comparison, a disk that is not there), or a hook has failed; its log says which"
        }
        Refusal::Unfrozen => "could not freeze (its log says why)",
        Refusal::Late => "was ready or frozen for as long as it may be",
        Refusal::Unready => {
            "was not prepared within the group's --prepare: a hook takes longer, or what is to be written out"
        }
        Refusal::Thawed => "did not stand still until the word came",
        Refusal::Unknown => "knows nothing of the marker any more",
    }
}

pub(super) fn refusal(cause: String) -> WireRefusal {
    let action = "See `highwater-agent status` and the log on the machine that is named".to_owned();
    WireRefusal { code: 1458, cause, action, retry: true, fatal: false }
}

pub(super) fn told_of(marker: Marker, kind: Kind, why: Option<String>) -> MarkerStatus {
    MarkerStatus { marker: marker.to_string(), kind, at_ms: now_ms(), why }
}

pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
