//! Messages to control bodies and back. Everything that comes from a peer is held against the limits of
//! [`crate::message`] here, so that no later part needs to.

use crate::identity::{CERT_BYTES_MAX, CSR_BYTES_MAX};
use crate::message::{
    AgentMessage, CollectorMessage, MAX_DISKS, MAX_HASH_BLOCKS, MAX_NAME_BYTES, PointAnswer, Refusal,
};
use crate::peer::PeerMessage;
use crate::printable::printable;
use crate::{WireError, frame};
use highwater_delta::CommitKind;
use serde::{Serialize, de::DeserializeOwned};

/// Most bytes of a refusal's cause and of its action.
pub const MAX_REFUSAL_BYTES: usize = 4096;

/// The body of a message.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    message.check()?;
    let body = postcard::to_stdvec(message).map_err(|_| WireError::BadMessage("it cannot be encoded"))?;
    if body.len() > frame::CONTROL_BYTES_MAX {
        let bytes_max = frame::CONTROL_BYTES_MAX as u64;
        return Err(WireError::Oversized { bytes: body.len() as u64, bytes_max });
    }
    Ok(body)
}

/// The message in a body, within the limits; nothing may follow it.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, WireError> {
    let (mut message, rest) = postcard::take_from_bytes::<M>(body)
        .map_err(|_| WireError::BadMessage("unknown, or of another version"))?;
    if !rest.is_empty() {
        return Err(WireError::BadMessage("bytes follow it"));
    }
    message.check()?;
    message.tidy();
    Ok(message)
}

/// A message of one direction.
pub trait Message: Serialize + DeserializeOwned {
    /// Holds it against the protocol's limits.
    fn check(&self) -> Result<(), WireError>;
    /// Makes texts that are for people harmless to logs and terminals. Names that are kept stay as they are: whoever
    /// keeps them refuses what cannot be one.
    fn tidy(&mut self);
}

impl Message for AgentMessage {
    fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => names([&hello.agent_version, &hello.host_name, &hello.kernel].into_iter()),
            Self::Disks(disks) => {
                at_most(disks.len() as u64, MAX_DISKS as u64, "too many disks")?;
                names(disks.iter().map(|disk| &disk.name))
            }
            Self::DeltaCommit(commit) => match &commit.kind {
                CommitKind::Partial => Ok(()),
                CommitKind::Point(point) => {
                    at_most(point.disks.len() as u64, MAX_DISKS as u64, "too many disks in a point")
                }
            },
            Self::Hashes { range, .. } => {
                at_most(range.count, MAX_HASH_BLOCKS, "too many hashes asked for")?;
                range
                    .start
                    .0
                    .checked_add(range.count)
                    .map(drop)
                    .ok_or(WireError::BadMessage("no such blocks"))
            }
            Self::Renew { csr_pem } => {
                at_most(csr_pem.len() as u64, CSR_BYTES_MAX as u64, "a signing request that is too long")
            }
            Self::Reachable(reachable) => names(reachable.host.iter()),
            Self::MarkerEnded { failed, .. } => {
                let length = failed.as_ref().map_or(0, String::len);
                at_most(length as u64, MAX_REFUSAL_BYTES as u64, "an endless cause")
            }
            Self::Answer { answer: PointAnswer::Failed(refusal), .. } => refusal_of(refusal),
            Self::DeltaBegin(_)
            | Self::DeltaAbort(_)
            | Self::Ping(_)
            | Self::Goodbye
            | Self::Kept(_)
            | Self::Withdrawn { .. }
            | Self::Answer { .. } => Ok(()),
        }
    }

    fn tidy(&mut self) {
        match self {
            Self::Hello(hello) => {
                for text in [&mut hello.agent_version, &mut hello.host_name, &mut hello.kernel] {
                    *text = printable(text, MAX_NAME_BYTES);
                }
            }
            Self::MarkerEnded { failed: Some(why), .. } => *why = printable(why, MAX_REFUSAL_BYTES),
            Self::Answer { answer: PointAnswer::Failed(refusal), .. } => tidy_refusal(refusal),
            _ => {}
        }
    }
}

impl Message for CollectorMessage {
    fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Welcome(welcome) => {
                at_most(welcome.disks.len() as u64, MAX_DISKS as u64, "too many disks in the welcome")
            }
            Self::Hashes { range, blocks, .. } => {
                at_most(range.count, MAX_HASH_BLOCKS, "too many hashes")?;
                if blocks.len() as u64 == range.count {
                    Ok(())
                } else {
                    Err(WireError::BadMessage("another number of hashes than blocks"))
                }
            }
            Self::Refused(refusal) | Self::NotRenewed(refusal) => refusal_of(refusal),
            Self::Renewed { cert_pem } => {
                at_most(cert_pem.len() as u64, CERT_BYTES_MAX as u64, "a certificate that is too long")
            }
            Self::Group(Some(signed)) => signed.check(),
            Self::Received { .. }
            | Self::Stored { .. }
            | Self::Pong(_)
            | Self::Group(None)
            | Self::PointWanted { .. } => Ok(()),
        }
    }

    fn tidy(&mut self) {
        if let Self::Refused(refusal) | Self::NotRenewed(refusal) = self {
            tidy_refusal(refusal);
        }
    }
}

impl Message for PeerMessage {
    fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Roster(signed) => signed.check(),
            Self::Said { .. } => Ok(()),
        }
    }

    fn tidy(&mut self) {}
}

fn refusal_of(Refusal { cause, action, .. }: &Refusal) -> Result<(), WireError> {
    at_most(cause.len().max(action.len()) as u64, MAX_REFUSAL_BYTES as u64, "an endless refusal")
}

fn tidy_refusal(refusal: &mut Refusal) {
    refusal.cause = printable(&refusal.cause, MAX_REFUSAL_BYTES);
    refusal.action = printable(&refusal.action, MAX_REFUSAL_BYTES);
}

fn names<'a>(mut names: impl Iterator<Item = &'a String>) -> Result<(), WireError> {
    names.try_for_each(|name| at_most(name.len() as u64, MAX_NAME_BYTES as u64, "a name is too long"))
}

pub(crate) fn at_most(count: u64, max: u64, what: &'static str) -> Result<(), WireError> {
    if count > max { Err(WireError::BadMessage(what)) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
