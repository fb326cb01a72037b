//! The order of a session's messages, as a pure state machine: frame in, action out.

use crate::CollectorError;
use bytes::Bytes;
use highwater_delta::{BlockRange, CommitKind, DeltaId, DiskId, GroupId};
use highwater_group::{Kind, Marker};
use highwater_wire::Version;
use highwater_wire::message::{AgentMessage, DiskInfo, Kept, PointAnswer, Reachable};

/// What the owner task is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Take over the list of disks.
    Disks(Vec<DiskInfo>),
    /// Open a delta.
    Begin(DeltaId),
    /// Add a chunk to the open delta.
    Push(Bytes),
    /// Close the open delta.
    Commit(DeltaId, CommitKind),
    /// Throw the open delta away.
    Abort,
    /// Answer with hashes.
    Hashes(DiskId, BlockRange),
    /// Answer a ping.
    Pong(u64),
    /// Certify a new key of the machine.
    Renew(String),
    /// Take a word on groups.
    Group(Word),
    /// End in an orderly way.
    End,
}

/// What a machine says of groups.
#[derive(Debug, PartialEq, Eq)]
pub enum Word {
    /// Where it is reached.
    Reachable(Reachable),
    /// It keeps a marker.
    Kept(Kept),
    /// A marker came to nothing.
    Withdrawn(GroupId, Marker),
    /// A marker that it coordinated has ended: why it came to nothing, if it did.
    Ended(GroupId, Marker, Kind, Option<String>),
    /// What came of a point that was wanted.
    Answer(u64, PointAnswer),
}

/// Where a session stands after the hello.
#[derive(Debug)]
pub struct State {
    version: Version,
    disks_known: bool,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    delta: DeltaId,
    chunks: u64,
}

impl State {
    /// At the beginning of a session in this version.
    #[must_use]
    pub const fn new(version: Version) -> Self {
        Self { version, disks_known: false, open: None }
    }

    /// Takes a message.
    pub fn message(&mut self, message: AgentMessage) -> Result<Action, CollectorError> {
        Ok(match message {
            AgentMessage::Hello(_) => return Err(CollectorError::Unexpected("a second hello")),
            AgentMessage::Disks(disks) => {
                if self.open.is_some() {
                    return Err(CollectorError::Unexpected("disks within a delta"));
                }
                let mut ids: Vec<DiskId> = disks.iter().map(|disk| disk.disk).collect();
                ids.sort_unstable();
                if ids.windows(2).any(|pair| pair[0] == pair[1]) {
                    return Err(CollectorError::Disks("a disk is named twice"));
                }
                self.disks_known = true;
                Action::Disks(disks)
            }
            AgentMessage::DeltaBegin(delta) => {
                if !self.disks_known {
                    return Err(CollectorError::Unexpected("a delta before the disks"));
                }
                if let Some(open) = &self.open {
                    return Err(CollectorError::StillOpen(open.delta));
                }
                self.open = Some(Open { delta, chunks: 0 });
                Action::Begin(delta)
            }
            AgentMessage::DeltaCommit(commit) => {
                let open = self.close(commit.delta)?;
                if commit.chunks != open.chunks {
                    return Err(CollectorError::Count {
                        delta: open.delta,
                        sent: commit.chunks,
                        received: open.chunks,
                    });
                }
                Action::Commit(open.delta, commit.kind)
            }
            AgentMessage::DeltaAbort(delta) => {
                self.close(delta)?;
                Action::Abort
            }
            AgentMessage::Hashes { disk, range } => Action::Hashes(disk, range),
            AgentMessage::Ping(number) => Action::Pong(number),
            AgentMessage::Goodbye => Action::End,
            AgentMessage::Renew { csr_pem } if self.version >= Version::V2 => Action::Renew(csr_pem),
            AgentMessage::Renew { .. } => return Err(CollectorError::Unexpected("a renewal in version 1")),
            AgentMessage::Reachable(reachable) => self.word(Word::Reachable(reachable))?,
            AgentMessage::Kept(kept) => self.word(Word::Kept(kept))?,
            AgentMessage::Withdrawn { group, marker } => self.word(Word::Withdrawn(group, marker))?,
            AgentMessage::MarkerEnded { group, marker, kind, failed } => {
                self.word(Word::Ended(group, marker, kind, failed))?
            }
            AgentMessage::Answer { request, answer } => self.word(Word::Answer(request, answer))?,
        })
    }

    fn word(&self, word: Word) -> Result<Action, CollectorError> {
        match self.version {
            Version::V1 | Version::V2 => Err(CollectorError::Unexpected("of groups, before version 3")),
            Version::V3 => Ok(Action::Group(word)),
        }
    }

    /// Takes a chunk.
    pub fn chunk(&mut self, delta: DeltaId, chunk: Bytes) -> Result<Action, CollectorError> {
        match &mut self.open {
            Some(open) if open.delta == delta => {
                open.chunks += 1;
                Ok(Action::Push(chunk))
            }
            _ => Err(CollectorError::NotOpen(delta)),
        }
    }

    /// The delta that is open.
    #[must_use]
    pub fn open(&self) -> Option<DeltaId> {
        self.open.as_ref().map(|open| open.delta)
    }

    fn close(&mut self, delta: DeltaId) -> Result<Open, CollectorError> {
        self.open.take_if(|open| open.delta == delta).ok_or(CollectorError::NotOpen(delta))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_wire::message::DeltaCommit;

    fn commit(delta: DeltaId, chunks: u64) -> AgentMessage {
        AgentMessage::DeltaCommit(DeltaCommit { delta, chunks, kind: CommitKind::Partial })
    }

    fn ready() -> State {
        let mut state = State::new(Version::MAX);
        state.message(AgentMessage::Disks(vec![])).unwrap();
        state
    }

    #[test]
    fn a_delta_goes_its_way() {
        let (mut state, delta) = (ready(), DeltaId::new());
        assert_eq!(state.message(AgentMessage::DeltaBegin(delta)).unwrap(), Action::Begin(delta));
        let chunk = Bytes::from_static(b"x");
        assert_eq!(state.chunk(delta, chunk.clone()).unwrap(), Action::Push(chunk));
        assert_eq!(state.message(commit(delta, 1)).unwrap(), Action::Commit(delta, CommitKind::Partial));
        assert_eq!(state.open(), None);
        assert_eq!(state.message(commit(delta, 1)).unwrap_err().code(), 1304);
    }

    #[test]
    fn what_is_out_of_order_is_refused() {
        let (one, two) = (DeltaId::new(), DeltaId::new());
        assert_eq!(State::new(Version::V1).message(AgentMessage::DeltaBegin(one)).unwrap_err().code(), 1311);
        let renew = AgentMessage::Renew { csr_pem: String::new() };
        assert_eq!(State::new(Version::V1).message(renew.clone()).unwrap_err().code(), 1311);
        assert_eq!(ready().message(renew).unwrap(), Action::Renew(String::new()));
        assert_eq!(ready().chunk(one, Bytes::new()).unwrap_err().code(), 1304);
        assert_eq!(ready().message(AgentMessage::DeltaAbort(one)).unwrap_err().code(), 1304);
        let mut state = ready();
        state.message(AgentMessage::DeltaBegin(one)).unwrap();
        assert_eq!(state.message(AgentMessage::DeltaBegin(two)).unwrap_err().code(), 1305);
        assert_eq!(state.chunk(two, Bytes::new()).unwrap_err().code(), 1304);
        assert_eq!(state.message(AgentMessage::Disks(vec![])).unwrap_err().code(), 1311);
        assert_eq!(state.message(commit(one, 7)).unwrap_err().code(), 1306);
        let group = GroupId::new();
        let marker: Marker = "07070707-0707-0707-0707-070707070707.1.0000000000000002.3".parse().unwrap();
        let withdrawn = AgentMessage::Withdrawn { group, marker };
        let before = State::new(Version::V2).message(withdrawn.clone());
        assert_eq!(before.unwrap_err().code(), 1311);
        let taken = ready().message(withdrawn).unwrap();
        assert_eq!(taken, Action::Group(Word::Withdrawn(group, marker)));
        let disk = DiskInfo { disk: DiskId::new(), name: String::new(), size_bytes: 0 };
        assert_eq!(ready().message(AgentMessage::Disks(vec![disk.clone(), disk])).unwrap_err().code(), 1312);
    }
}
