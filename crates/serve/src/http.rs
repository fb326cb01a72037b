//! HTTP/1.1, one request at a time, and the metrics endpoint.

use crate::{Place, accept};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// How long a scrape that has begun may go on after a shutdown.
const DRAIN_MAX: Duration = Duration::from_secs(1);

/// An answer.
pub type Reply = Response<Full<Bytes>>;

/// What a client may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once to a metrics port.
    pub places: usize,
    /// From the connection, or the last answer, to the end of a request's header.
    pub header: Duration,
    /// A connection lasts no longer.
    pub connection: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { places: 8, header: Duration::from_secs(10), connection: Duration::from_secs(30) }
    }
}

/// What a metrics port tells.
#[derive(Clone)]
pub struct Metrics {
    /// Of the text.
    pub content_type: &'static str,
    /// Writes the text.
    pub render: Arc<dyn Fn() -> String + Send + Sync>,
}

/// An answer with a body of this type.
pub fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Serves one connection to its end.
pub async fn http<S, F>(stream: S, limits: Limits, handle: impl Fn(Request<Incoming>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Reply>,
{
    let service = service_fn(move |request| {
        let reply = handle(request);
        async move { Ok::<_, Infallible>(reply.await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    // Broken and slow clients are their own problem.
    let _ = timeout(limits.connection, connection).await;
}

/// Answers `GET /metrics`, and nothing else, until shutdown.
pub async fn serve_metrics(
    listener: TcpListener,
    metrics: Metrics,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let handle = {
        let shutdown = shutdown.clone();
        move |stream, _, place| scrape(stream, place, metrics.clone(), limits, shutdown.clone())
    };
    accept(listener, limits.places, shutdown, DRAIN_MAX, handle).await;
}

async fn scrape(
    stream: TcpStream,
    place: Arc<Place>,
    metrics: Metrics,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let serve = http(stream, limits, move |request| {
        std::future::ready(match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => reply(StatusCode::OK, metrics.content_type, (metrics.render)()),
            _ => reply(StatusCode::NOT_FOUND, "text/plain", "GET /metrics\n"),
        })
    });
    tokio::select! {
        () = serve => {}
        () = place.evicted.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}

#[cfg(test)]
mod tests;
