//! The side that uses the objects: an object store, whose objects lie at another collector.
//!
//! **Retries.** See [`RETRY_MAX`]; a request is tried anew on a new connection. A content that breaks off is asked for from where it
//! did. **Cancellation.** Dropping a future ends its request; what the other side has begun by then it may finish.
//! **Identity.** Read from its directory for each connection, so that one renewed by another process is used; renewed by the client
//! itself once a third of its validity is left.

mod connect;
mod content;
mod renewal;
mod store;
mod upload;

use crate::{Name, RelayError, Request, error::Refusal};
use bytes::Bytes;
use connect::{Connection, Connections};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Response, StatusCode, body::Incoming};
use renewal::Renewal;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

/// So long is a request tried again.
pub const RETRY_MAX: Duration = Duration::from_secs(60);
/// Between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// A try, up to the beginning of its answer: a part of 5 MiB passes at 45 KiB/s.
const REQUEST_MAX: Duration = Duration::from_secs(120);
/// Between two pieces of an answer.
const ANSWER_IDLE_MAX: Duration = Duration::from_secs(60);

/// Where a relay's objects are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Host name or address, without brackets; the other collector's certificate must name it.
    pub host: String,
    /// Its port for machines and relays.
    pub port: u16,
    /// Directory of the relay's identity.
    pub identity: PathBuf,
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    address: Address,
    connections: Connections,
    renewal: Renewal,
}

/// An answer whose content is still to be read, on its connection.
pub(crate) struct Open {
    response: Response<Incoming>,
    connection: Connection,
}

impl Client {
    /// Reads the identity; nothing is asked of the other side yet.
    ///
    /// # Errors
    /// The identity cannot be used.
    pub fn open(address: Address) -> Result<Self, RelayError> {
        let identity = highwater_wire::RelayIdentity::load(&address.identity)?;
        let renewal = Renewal::of(&identity)?;
        Ok(Self(Arc::new(Inner { connections: Connections::new(address.clone()), address, renewal })))
    }

    /// Asks until there is an answer, or no sense in asking; answers with a content that may be read.
    async fn ask(&self, request: &Request, body: &Bytes) -> Result<Open, RelayError> {
        let mut tries = Tries::new();
        loop {
            match self.attempt(request, body, tries.is_first()).await {
                Ok(open) => return Ok(open),
                Err(error) => tries.after(error).await?,
            }
        }
    }

    /// The same for answers that are no content: they are read as a whole within each try.
    pub(crate) async fn tell(&self, request: &Request, body: Bytes) -> Result<Bytes, RelayError> {
        let mut tries = Tries::new();
        loop {
            let told = async {
                let open = self.attempt(request, &body, tries.is_first()).await?;
                open.whole().await
            };
            match told.await {
                Ok(answer) => return Ok(answer),
                // It was deleted the first time, and the answer not heard.
                Err(RelayError::NotFound(_))
                    if !tries.is_first() && matches!(request, Request::Delete { .. }) =>
                {
                    return Ok(Bytes::new());
                }
                Err(error) => tries.after(error).await?,
            }
        }
    }

    pub(crate) async fn attempt(
        &self,
        request: &Request,
        body: &Bytes,
        reuse: bool,
    ) -> Result<Open, RelayError> {
        self.renew_if_due(request);
        let mut connection = self.0.connections.take(reuse).await?;
        let (method, target) = request.encode();
        let http = hyper::Request::builder()
            .method(method)
            .uri(target)
            .header(hyper::header::HOST, "highwater")
            .body(Full::new(body.clone()))
            .map_err(|_| RelayError::BadRequest("it cannot be written"))?;
        let response = timeout(REQUEST_MAX, connection.send(http)).await;
        let response = response.map_err(|_| RelayError::Slow(REQUEST_MAX))??;
        let open = Open { response, connection };
        if open.response.status() == StatusCode::OK { Ok(open) } else { Err(open.refused(request).await) }
    }
}

impl Open {
    /// Reads an answer that is no content. The connection can be used again.
    async fn whole(self) -> Result<Bytes, RelayError> {
        let Self { response, connection } = self;
        let body = Limited::new(response.into_body(), crate::ANSWER_BYTES_MAX).collect();
        let body = timeout(ANSWER_IDLE_MAX, body).await.map_err(|_| RelayError::Slow(ANSWER_IDLE_MAX))?;
        let body = body.map_err(|_| RelayError::BrokenOff)?.to_bytes();
        connection.give_back();
        Ok(body)
    }

    async fn refused(self, request: &Request) -> RelayError {
        let status = self.response.status();
        let name = request.name().map(Name::to_string).unwrap_or_default();
        match status {
            StatusCode::NOT_FOUND => RelayError::NotFound(name),
            StatusCode::LOCKED => RelayError::Kept(name),
            StatusCode::CONFLICT => RelayError::Exists(name),
            StatusCode::GONE => RelayError::UploadGone(name),
            // The answer to a HEAD has nothing that it could be read from.
            _ if matches!(request, Request::Head { .. }) && status.is_server_error() => {
                RelayError::Store("it is not told how".to_owned())
            }
            _ => match self.whole().await.map(|body| serde_json::from_slice::<Refusal>(&body)) {
                Ok(Ok(refusal)) => RelayError::Refused(refusal),
                Ok(Err(_)) => RelayError::BadAnswer("a refusal without its reason"),
                Err(error) => error,
            },
        }
    }
}

/// Counts tries, and waits between them.
struct Tries {
    begun: Instant,
    pause: Duration,
    tries: u32,
}

impl Tries {
    fn new() -> Self {
        Self { begun: Instant::now(), pause: PAUSES.0, tries: 0 }
    }

    const fn is_first(&self) -> bool {
        self.tries == 0
    }

    /// Waits for the next try.
    ///
    /// # Errors
    /// It makes no sense, or it was tried for long enough.
    async fn after(&mut self, error: RelayError) -> Result<(), RelayError> {
        if !error.retry() {
            return Err(error);
        }
        if self.begun.elapsed() + self.pause > RETRY_MAX {
            return Err(RelayError::GivenUp { for_: self.begun.elapsed(), last: error.into() });
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        self.tries += 1;
        Ok(())
    }
}
