//! The content of an object, as a stream that goes on where it broke off.

use super::{ANSWER_IDLE_MAX, Client, Open, Tries};
use crate::{
    Name, RelayError, Request,
    headers::{MODIFIED, SIZE, START},
    page::Entry,
    server::BODY_BYTES_A_SECOND,
};
use bytes::Bytes;
use futures::{Stream, stream};
use http_body_util::BodyExt;
use hyper::{Response, body::Body};
use object_store::{GetRange, ObjectMeta};
use std::ops::Range;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// What an answer says of its object, and which part of it it brings.
pub(super) fn described<B: Body>(
    response: &Response<B>,
    name: &Name,
) -> Result<(ObjectMeta, u64), RelayError> {
    let number = |header| {
        let value = response.headers().get(header)?;
        value.to_str().ok()?.parse::<i64>().ok()
    };
    let bad = RelayError::BadAnswer("what it says of an object");
    let (Some(bytes), Some(start), Some(modified_ms)) = (number(SIZE), number(START), number(MODIFIED))
    else {
        return Err(bad);
    };
    let (Ok(bytes), Ok(start)) = (u64::try_from(bytes), u64::try_from(start)) else { return Err(bad) };
    Ok((Entry { name: name.to_string(), bytes, modified_ms }.meta()?, start))
}

/// So long may it take beside what a slow line takes for its bytes: more than all tries of one piece.
const TRICKLE_MAX: Duration = Duration::from_secs(300);

/// What is left of a content.
struct Rest {
    client: Client,
    name: Name,
    range: Range<u64>,
    open: Option<Open>,
    tries: Tries,
    /// How long the other side was waited for, and what it has brought.
    waited: Duration,
    brought_bytes: u64,
}

/// The bytes of `range`, of which `open` brings the first, and perhaps all.
pub(super) fn stream(
    client: Client,
    name: Name,
    range: Range<u64>,
    open: Open,
) -> impl Stream<Item = object_store::Result<Bytes>> {
    let (waited, brought_bytes) = (Duration::ZERO, 0);
    let rest = Rest { client, name, range, open: Some(open), tries: Tries::new(), waited, brought_bytes };
    stream::try_unfold(rest, |mut rest| async move {
        let next = rest.next().await.map_err(|error| error.of_store(&rest.name))?;
        Ok(next.map(|data| (data, rest)))
    })
}

impl Rest {
    async fn next(&mut self) -> Result<Option<Bytes>, RelayError> {
        loop {
            if self.range.is_empty() {
                if let Some(open) = self.open.take() {
                    // Nothing but its end is left.
                    let _ = open.whole().await;
                }
                return Ok(None);
            }
            let began = Instant::now();
            let piece = self.piece().await;
            self.waited += began.elapsed();
            match piece {
                Ok(data) => {
                    self.range.start += data.len() as u64;
                    self.brought_bytes += data.len() as u64;
                    self.check_rate()?;
                    self.tries = Tries::new();
                    return Ok(Some(data));
                }
                Err(error) => {
                    self.open = None;
                    self.tries.after(error).await?;
                }
            }
        }
    }

    /// Whoever sends a byte now and then would hold its reader for ever.
    fn check_rate(&self) -> Result<(), RelayError> {
        let allowed = TRICKLE_MAX + Duration::from_secs(self.brought_bytes / BODY_BYTES_A_SECOND);
        if self.waited > allowed { Err(RelayError::Slow(self.waited)) } else { Ok(()) }
    }

    async fn piece(&mut self) -> Result<Bytes, RelayError> {
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let range = Some(GetRange::Bounded(self.range.clone()));
                let request = Request::Get { name: self.name.clone(), range };
                let open = self.client.attempt(&request, &Bytes::new(), false).await?;
                if described(&open.response, &self.name)?.1 != self.range.start {
                    return Err(RelayError::BadAnswer("another part than was asked for"));
                }
                self.open.insert(open)
            }
        };
        loop {
            let frame = timeout(ANSWER_IDLE_MAX, open.response.body_mut().frame()).await;
            let frame = frame.map_err(|_| RelayError::Slow(ANSWER_IDLE_MAX))?.ok_or(RelayError::BrokenOff)?;
            let Ok(data) = frame.map_err(|_| RelayError::BrokenOff)?.into_data() else { continue };
            if data.len() as u64 > self.range.end - self.range.start {
                return Err(RelayError::BadAnswer("more than was asked for"));
            }
            if !data.is_empty() {
                return Ok(data);
            }
        }
    }
}
