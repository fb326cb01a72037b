//! Points that are asked for: `point-requests/<id>` by whoever wants one; `point-requests-taken/<id>`, created if absent, by the collector that has
//! a session with a member; `point-requests-answered/<id>` with what came of it.
//!
//! An id begins with the time, so that old ones can be told without being read. They are deleted after a day.

use super::cache::{create, find};
use crate::{Result, Vault, VaultError};
use highwater_delta::{Code, CommitId, GroupId, MachineId, SegmentId};
use highwater_group::Marker;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr, time::Duration};
use uuid::Uuid;

/// So long documents of requests stay.
const STAY: Duration = Duration::from_secs(86_400);

/// A request's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(Uuid);

impl RequestId {
    fn at(ms: u64) -> Self {
        Self(Uuid::from_bytes(*SegmentId::at_ms(ms, 0).as_bytes()))
    }
    /// When it was made, in milliseconds since 1970.
    #[must_use]
    pub fn at_ms(&self) -> u64 {
        let [a, b, c, d, e, f, ..] = *self.0.as_bytes();
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for RequestId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// Of whom a point is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Of {
    /// All members of a group.
    Group(GroupId),
    /// A machine.
    Machine(MachineId),
}

/// A point is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Request {
    /// Of whom.
    pub of: Of,
    /// With the applications' hooks.
    pub application: bool,
    /// When it was asked for, in milliseconds since 1970.
    pub at_ms: u64,
    /// After that nobody waits for it any more.
    pub until_ms: u64,
}

/// A collector has passed it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Taken {
    /// To this machine; none: it was taken back.
    pub machine: Option<MachineId>,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A recovery point of the machine.
    Point(CommitId),
    /// All members keep this marker.
    Marker(Marker),
    /// Nothing.
    Failed {
        /// Of the error.
        code: Code,
        /// Why.
        cause: String,
        /// What to do about it.
        action: String,
    },
}

impl Vault {
    /// Asks for a point; it is waited for so long.
    pub async fn ask_point(&self, of: Of, application: bool, wait: Duration) -> Result<RequestId> {
        let at_ms = self.stamp_ms().await?;
        let (id, until_ms) = (RequestId::at(at_ms), at_ms.saturating_add(super::millis(wait)));
        let request = Request { of, application, at_ms, until_ms };
        match create(self, &format!("point-requests/{id}"), &request).await? {
            true => Ok(id),
            false => Err(VaultError::Exists),
        }
    }

    /// The requests that there are, oldest first.
    pub async fn point_requests(&self) -> Result<Vec<RequestId>> {
        let names = self.control_list("point-requests").await?;
        Ok(names.iter().filter_map(|name| name.strip_prefix("point-requests/")?.parse().ok()).collect())
    }
    /// A request.
    pub async fn point_request(&self, id: RequestId) -> Result<Option<Request>> {
        find(self, &format!("point-requests/{id}")).await
    }
    /// Takes a request, to pass it on to a machine; false if somebody else has.
    pub async fn take_request(&self, id: RequestId, machine: MachineId) -> Result<bool> {
        self.take(id, Some(machine)).await
    }
    /// Takes a request back; false if somebody has taken it.
    pub async fn cancel_request(&self, id: RequestId) -> Result<bool> {
        self.take(id, None).await
    }
    async fn take(&self, id: RequestId, machine: Option<MachineId>) -> Result<bool> {
        let taken = Taken { machine, at_ms: self.stamp_ms().await? };
        create(self, &format!("point-requests-taken/{id}"), &taken).await
    }
    /// Who was asked, if somebody was.
    pub async fn request_taken(&self, id: RequestId) -> Result<Option<Taken>> {
        find(self, &format!("point-requests-taken/{id}")).await
    }
    /// Answers a request.
    pub async fn answer_request(&self, id: RequestId, answer: &Answer) -> Result<bool> {
        create(self, &format!("point-requests-answered/{id}"), answer).await
    }
    /// What came of a request, if something did.
    pub async fn request_answer(&self, id: RequestId) -> Result<Option<Answer>> {
        find(self, &format!("point-requests-answered/{id}")).await
    }

    pub(super) async fn tidy_requests(&self, now_ms: u64) -> Result<()> {
        for folder in ["point-requests", "point-requests-taken", "point-requests-answered"] {
            for name in self.control_list(folder).await? {
                let id: Option<RequestId> = name.rsplit('/').next().and_then(|id| id.parse().ok());
                if id.is_some_and(|id| id.at_ms().saturating_add(super::millis(STAY)) < now_ms) {
                    self.control_forget(&name).await?;
                }
            }
        }
        Ok(())
    }
}
