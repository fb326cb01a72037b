//! The management port (enrolment, health). HTTP/1.1, one request at a time, every connection bounded in time and every
//! body in size.
//!
//! **Rates.** Each source (`Source`) has a rate of its own, so nobody's requests are counted against another's. What comes
//! from all together is counted only for those who hold a token that is valid and unused and ask for what can be had, before the
//! costly part: a stranger cannot use it up from any number of addresses, and whoever holds a token only by using that.
//! Requests that cannot be granted are counted against the token. What strangers cost before that (a handshake, one look into
//! the vault) is bounded by the port's places.

use crate::bucket::Bucket;
use crate::certificates::{self, Origin};
use crate::clock::now_ms;
use crate::holder::Holder;
use crate::lock::locked;
use crate::log_limit::LogLimit;
use crate::per_peer::{PerPeer, Source};
use crate::shared::Shared;
use crate::tokens::{Checked, Returning};
use crate::{CollectorError, relays, tokens};
use highwater_delta::{Code, MachineId, RelayId};
use highwater_serve::{Limits, Place, Reply, http, reply};
use highwater_vault::NAME_BYTES_MAX;
use highwater_wire::WireError;
use highwater_wire::enroll::{
    ENROL_PATH, EnrolRefusal, EnrolRequest, EnrolResponse, RELAY_PATH, REQUEST_BYTES_MAX, RelayResponse,
};
use highwater_wire::identity::{Grant, RelayGrant, check_request};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Seconds of the rate that may come at once.
const BURST_SECONDS: f64 = 4.0;
/// The rate of all sources together, for what is costly, is so many times that of one.
const ALL_SOURCES: f64 = 8.0;

/// Requests with one token that could not be granted: so many at once, and one again after each [`FAILED_TRY_SECONDS`].
const FAILED_TRIES: f64 = 5.0;
const FAILED_TRY_SECONDS: f64 = 60.0;

/// The management port's service.
pub struct Api {
    shared: Arc<Shared>,
    ingest_port: u16,
    /// Of each source.
    rates: Mutex<PerPeer<Source, Bucket>>,
    /// Of all together.
    certifying: Mutex<Bucket>,
    /// Failed tries with each token that is valid, by its id.
    tries: Mutex<PerPeer<[u8; 16], Bucket>>,
    log: Mutex<LogLimit<Source>>,
}

impl Api {
    /// `ingest_port` is told to machines that enrol.
    #[must_use]
    pub fn new(shared: Arc<Shared>, ingest_port: u16) -> Self {
        let now = Instant::now();
        let per_second = f64::from(shared.config.enrolments_per_second);
        let certifying = Mutex::new(rate(per_second * ALL_SOURCES, now));
        let log = Mutex::new(LogLimit::new(now));
        let (rates, tries) = (Mutex::new(PerPeer::new()), Mutex::new(PerPeer::new()));
        Self { shared, ingest_port, rates, certifying, tries, log }
    }

    async fn handle(&self, source: Source, request: Request<Incoming>) -> Reply {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => reply(StatusCode::OK, "text/plain", "ok\n"),
            (&Method::POST, path @ (ENROL_PATH | RELAY_PATH)) => {
                let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).map(host_only);
                let answered = match path {
                    ENROL_PATH => {
                        let answer = self.enrol(source, host, request.into_body()).await;
                        answer.map(|answer| json(StatusCode::OK, &answer))
                    }
                    _ => {
                        let answer = self.enrol_relay(source, host, request.into_body()).await;
                        answer.map(|answer| json(StatusCode::OK, &answer))
                    }
                };
                match answered {
                    Ok(reply) => reply,
                    Err(error) => {
                        let said = locked(&self.log).say(source, Instant::now());
                        if let Some(left_out) = self.shared.metrics.line(said) {
                            tracing::warn!(%source, code = %Code(error.code()), %error, left_out, "an enrolment was refused");
                        }
                        refusal(&error)
                    }
                }
            }
            (_, "/healthz" | ENROL_PATH | RELAY_PATH) => {
                reply(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "wrong method\n")
            }
            _ => reply(StatusCode::NOT_FOUND, "text/plain", "not found\n"),
        }
    }

    /// What was asked, with a token that is valid, for what can be had.
    async fn asked<H: Holder>(
        &self,
        source: Source,
        body: Incoming,
        now: u64,
    ) -> Result<(EnrolRequest, Checked<H>), CollectorError> {
        let at = Instant::now();
        let own = || rate(f64::from(self.shared.config.enrolments_per_second), at);
        if locked(&self.rates).of(source, at, own).take(at).is_err() {
            return Err(CollectorError::Full("too many enrolments from one address"));
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
        let token = tokens::check(vault, &request.token_id, &request.secret, now).await?;
        let tries = || Bucket::new(FAILED_TRIES, 1.0 / FAILED_TRY_SECONDS, at);
        if !locked(&self.tries).of(token.id, at, tries).has_one(at) {
            return Err(CollectorError::Full("too many failed tries with one token"));
        }
        if let Err(error) = check(&request) {
            // Those that come at the same time may be some more.
            let _ = locked(&self.tries).of(token.id, at, tries).take(at);
            return Err(error);
        }
        Ok((request, token))
    }

    /// Takes one of all that may be certified.
    fn take_certificate(&self) -> Result<(), CollectorError> {
        let taken = locked(&self.certifying).take(Instant::now());
        taken.map_err(|_| CollectorError::Full("too many enrolments at once"))
    }

    /// A relay's enrolment: as a machine's.
    async fn enrol_relay(
        &self,
        source: Source,
        host: Option<String>,
        body: Incoming,
    ) -> Result<RelayResponse, CollectorError> {
        let now = now_ms();
        let (request, token) = self.asked::<RelayId>(source, body, now).await?;
        let returning = token.returning;
        let Returning { machine: relay, generation } =
            returning.unwrap_or_else(|| Returning { machine: RelayId::new(), generation: 0 });
        let revoked = certificates::revoked_upto(&self.shared.vault, relay).await?;
        if revoked.is_some_and(|upto| generation <= upto) {
            return Err(WireError::RelayRevoked(relay).into());
        }
        self.take_certificate()?;
        let grant = RelayGrant { relay, generation, validity: self.shared.config.certificate_validity };
        let shared = self.shared.clone();
        let (name, csr_pem) = (request.host_name.clone(), request.csr_pem.clone());
        let register = tokio::spawn(async move {
            tokens::use_up(&shared.vault, &token.id, relay, now).await?;
            relays::register(&shared.vault, relay, &name).await?;
            certificates::issue_relay(&shared, &csr_pem, grant, Origin::Enrolment).await
        });
        let cert_pem = register.await.map_err(|_| CollectorError::ShuttingDown)??;
        self.shared.metrics.enrolled();
        tracing::info!(%relay, host = request.host_name, returning = returning.is_some(), "a relay has joined");
        Ok(RelayResponse {
            relay,
            cert_pem,
            ca_pem: self.shared.authority.cert_pem().to_owned(),
            endpoint: self.shared.config.endpoint_for(host.as_deref(), self.ingest_port),
        })
    }

    async fn enrol(
        &self,
        source: Source,
        host: Option<String>,
        body: Incoming,
    ) -> Result<EnrolResponse, CollectorError> {
        let now = now_ms();
        let (request, token) = self.asked::<MachineId>(source, body, now).await?;
        let vault = &self.shared.vault;
        let returning = token.returning;
        let Returning { machine, generation } =
            returning.unwrap_or_else(|| Returning { machine: MachineId::new(), generation: 0 });
        // A token that was made before a revocation must not undo it.
        if certificates::revoked_upto(vault, machine).await?.is_some_and(|upto| generation <= upto) {
            return Err(WireError::Revoked(machine).into());
        }
        self.take_certificate()?;
        // Everything that may fail for the asker's fault came before the token is used up.
        let validity = self.shared.config.certificate_validity;
        let grant = Grant { machine, generation, validity };
        let shared = self.shared.clone();
        let (host_name, csr_pem) = (request.host_name.clone(), request.csr_pem.clone());
        // A task of its own: a client that goes away, or is cut off, cannot leave a used token without its machine.
        let register = tokio::spawn(async move {
            tokens::use_up(&shared.vault, &token.id, machine, now).await?;
            // Does nothing for a machine that returns.
            shared.vault.register_machine(machine, &host_name).await?;
            certificates::issue(&shared, &csr_pem, grant, Origin::Enrolment).await
        });
        let cert_pem = register.await.map_err(|_| CollectorError::ShuttingDown)??;
        self.shared.metrics.enrolled();
        tracing::info!(%machine, host = request.host_name, returning = returning.is_some(), "enrolled");
        Ok(EnrolResponse {
            machine,
            cert_pem,
            ca_pem: self.shared.authority.cert_pem().to_owned(),
            endpoint: self.shared.config.endpoint_for(host.as_deref(), self.ingest_port),
        })
    }
}

/// Whether what a request asks for can be had.
fn check(request: &EnrolRequest) -> Result<(), CollectorError> {
    let name = &request.host_name;
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        let cause = "the host name must have 1 to 255 printable bytes";
        return Err(CollectorError::BadRequest(cause.to_owned()));
    }
    check_request(&request.csr_pem).map_err(|error| CollectorError::BadRequest(error.to_string()))
}

fn rate(per_second: f64, now: Instant) -> Bucket {
    Bucket::new(per_second * BURST_SECONDS, per_second, now)
}

fn host_only(host: &str) -> String {
    let host = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    host.trim_start_matches('[').trim_end_matches(']').to_owned()
}

fn refusal(error: &CollectorError) -> Reply {
    let status = match error {
        CollectorError::TokenInvalid
        | CollectorError::TokenExpired
        | CollectorError::Wire(WireError::Revoked(_) | WireError::RelayRevoked(_)) => StatusCode::FORBIDDEN,
        CollectorError::TokenUsed => StatusCode::CONFLICT,
        CollectorError::BadRequest(_) => StatusCode::BAD_REQUEST,
        CollectorError::Full(_) => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let told = error.refusal();
    json(
        status,
        &EnrolRefusal { code: format!("HW-{:04}", told.code), cause: told.cause, action: told.action },
    )
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(body) => reply(status, "application/json", body),
        Err(_) => reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "the answer cannot be encoded\n"),
    }
}

/// A connection to the management port.
pub async fn connection(
    api: Arc<Api>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    place: Arc<Place>,
) {
    let source = Source::from(peer.ip());
    let limit = api.shared.config.handshake_timeout;
    // Who cannot shake hands gets no answer; scanners do this all day.
    let shutdown = api.shared.shutdown.clone();
    let serve = async {
        let Ok(Ok(stream)) = timeout(limit, acceptor.accept(stream)).await else { return };
        let handle = move |request| {
            let api = api.clone();
            async move { api.handle(source, request).await }
        };
        http(stream, Limits::default(), handle).await;
    };
    tokio::select! {
        () = serve => {}
        () = place.evicted.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}
