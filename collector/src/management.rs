//! The management port (enrolment, health) and the metrics port. HTTP/1.1, one request at a time, every connection
//! bounded in time and every body in size.

use crate::shared::{Shared, locked, now_ms};
use crate::{CollectorError, server::Place, tokens};
use bytes::Bytes;
use highwater_delta::MachineId;
use highwater_vault::NAME_BYTES_MAX;
use highwater_wire::enroll::{ENROL_PATH, EnrolRefusal, EnrolRequest, EnrolResponse, REQUEST_BYTES_MAX};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// A connection lasts no longer.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
const HEADER_MAX: Duration = Duration::from_secs(10);
/// Seconds of the rate that may come at once.
const BURST_SECONDS: f64 = 4.0;

/// The management port's service.
pub struct Api {
    shared: Arc<Shared>,
    ingest_port: u16,
    rate: Mutex<Rate>,
}

/// A token bucket.
struct Rate {
    tokens: f64,
    at: Instant,
}

impl Api {
    /// `ingest_port` is told to machines that enrol.
    #[must_use]
    pub fn new(shared: Arc<Shared>, ingest_port: u16) -> Self {
        let tokens = f64::from(shared.config.enrolments_per_second) * BURST_SECONDS;
        Self { shared, ingest_port, rate: Mutex::new(Rate { tokens, at: Instant::now() }) }
    }

    async fn handle(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => respond(StatusCode::OK, "text/plain", "ok\n"),
            (&Method::POST, ENROL_PATH) => {
                let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).map(host_only);
                match self.enrol(host, request.into_body()).await {
                    Ok(response) => json(StatusCode::OK, &response),
                    Err(error) => refusal(&error),
                }
            }
            (_, "/healthz" | ENROL_PATH) => {
                respond(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "wrong method\n")
            }
            _ => respond(StatusCode::NOT_FOUND, "text/plain", "not found\n"),
        }
    }

    async fn enrol(&self, host: Option<String>, body: Incoming) -> Result<EnrolResponse, CollectorError> {
        if !locked(&self.rate).take(f64::from(self.shared.config.enrolments_per_second)) {
            return Err(CollectorError::Full("too many enrolments at once"));
        }
        let bad = |cause: &str| CollectorError::BadRequest(cause.to_owned());
        if body.size_hint().lower() > REQUEST_BYTES_MAX as u64 {
            return Err(bad("it is too long"));
        }
        let body = Limited::new(body, REQUEST_BYTES_MAX)
            .collect()
            .await
            .map_err(|_| bad("it is too long or broke off"))?;
        let request: EnrolRequest =
            serde_json::from_slice(&body.to_bytes()).map_err(|_| bad("it is no enrolment request"))?;
        let vault = &self.shared.vault;
        let now = now_ms();
        let token = tokens::check(vault, &request.token_id, &request.secret, now).await?;
        let name = &request.host_name;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(bad("the host name must have 1 to 255 printable bytes"));
        }
        // Everything that may fail for the asker's fault comes before the token is used up.
        let machine = MachineId::new();
        let cert_pem =
            self.shared.authority.sign_csr(&request.csr_pem, machine).map_err(|e| bad(&e.to_string()))?;
        let (vault, host_name) = (vault.clone(), request.host_name.clone());
        // A task of its own: a client that goes away, or is cut off, cannot leave a used token without its machine.
        let register = tokio::spawn(async move {
            tokens::use_up(&vault, &token, machine, now).await?;
            vault.register_machine(machine, &host_name).await?;
            Ok::<_, CollectorError>(())
        });
        register.await.map_err(|_| CollectorError::ShuttingDown)??;
        self.shared.metrics.enrolled();
        tracing::info!(%machine, host = request.host_name, "enrolled");
        Ok(EnrolResponse {
            machine,
            cert_pem,
            ca_pem: self.shared.authority.cert_pem().to_owned(),
            endpoint: self.shared.config.endpoint_for(host.as_deref(), self.ingest_port),
        })
    }
}

impl Rate {
    fn take(&mut self, per_second: f64) -> bool {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * per_second;
        self.tokens = (self.tokens + earned).min(per_second * BURST_SECONDS);
        self.at = now;
        let ok = self.tokens >= 1.0;
        if ok {
            self.tokens -= 1.0;
        }
        ok
    }
}

fn host_only(host: &str) -> String {
    let host = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    host.trim_start_matches('[').trim_end_matches(']').to_owned()
}

fn refusal(error: &CollectorError) -> Response<Full<Bytes>> {
    let status = match error {
        CollectorError::TokenInvalid | CollectorError::TokenExpired => StatusCode::FORBIDDEN,
        CollectorError::TokenUsed => StatusCode::CONFLICT,
        CollectorError::BadRequest(_) => StatusCode::BAD_REQUEST,
        CollectorError::Full(_) => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    tracing::warn!(code = error.code(), %error, "an enrolment was refused");
    let told = error.refusal();
    json(
        status,
        &EnrolRefusal { code: format!("HW-{:04}", told.code), cause: told.cause, action: told.action },
    )
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(body) => respond(status, "application/json", body),
        Err(_) => respond(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "the answer cannot be encoded\n"),
    }
}

fn respond(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// A connection to the management port.
pub async fn connection(api: Arc<Api>, acceptor: TlsAcceptor, stream: TcpStream, place: Arc<Place>) {
    let limit = api.shared.config.handshake_timeout;
    // Who cannot shake hands gets no answer; scanners do this all day.
    let shutdown = api.shared.shutdown.clone();
    let serve = async {
        let Ok(Ok(stream)) = timeout(limit, acceptor.accept(stream)).await else { return };
        http(stream, async move |request| api.handle(request).await).await;
    };
    tokio::select! {
        () = serve => {}
        () = place.evicted.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}

/// A connection to the metrics port.
pub async fn metrics_connection(shared: Arc<Shared>, stream: TcpStream, place: Arc<Place>) {
    let shutdown = shared.shutdown.clone();
    let serve = http(stream, async move |request: Request<Incoming>| {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => {
                respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", shared.metrics.render())
            }
            _ => respond(StatusCode::NOT_FOUND, "text/plain", "GET /metrics\n"),
        }
    });
    tokio::select! {
        () = serve => {}
        () = place.evicted.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}

async fn http<S>(stream: S, handle: impl AsyncFn(Request<Incoming>) -> Response<Full<Bytes>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handle = &handle;
    let service = service_fn(move |request| async move { Ok::<_, Infallible>(handle(request).await) });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_MAX)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // Broken and slow clients are their own problem.
    let _ = timeout(CONNECTION_MAX, connection).await;
}
