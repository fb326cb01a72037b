//! `highwater-agent run`: puts the parts together, and takes them apart at SIGTERM.
//!
//! Order of a start: control socket (so that two agents never meet), guardian, tracker, engine, session. At the end
//! only the agent goes: the programs stay pinned and go on marking.

use crate::{
    config::{Config, LogFormat, Resync},
    control::{self, Board, Desk},
    engine::{
        ApplicationOptions, Engine, EngineOptions, Parts,
        link::{self, Endpoint, Patience},
        renewal::Renewal,
    },
    error::{Fatal, OperatorError},
    freeze::FreezeOptions,
    group::{self, FromEngine, SharedStatus, ToEngine},
    guardian::{GuardianHandle, GuardianOptions},
    hooks::HookLimits,
    metrics::{CountErrors, Metrics},
    pulse::Pulse,
    source::BufferPool,
    throttle::Throttle,
    tracker::{self, Origin, Tracker},
};
use anyhow::{Context, Result};
use highwater_serve::Limits;
use highwater_wire::{Identity, WireError, enroll::split_endpoint, message::Reachable};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
};
use tokio_util::sync::CancellationToken;

/// How long a freeze's preceding sync may take.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// How long one read may take: the kernel gives a disk minutes, and starting the agent anew would not make it faster.
const READ_MAX: Duration = Duration::from_secs(600);
/// How long the engine may take to stop after a signal.
const STOP_MAX: Duration = Duration::from_secs(20);

/// What enrolment left beside the identity.
#[derive(Serialize, Deserialize)]
struct Enrolment {
    endpoint: String,
}

/// Keeps the enrolment in the state directory. The identity is written last: with it, the machine is enrolled. Each file is
/// replaced as a whole; what a crash left half-written is no obstacle and never read.
///
/// # Errors
/// It cannot be written; the token is used up all the same.
pub fn save_enrolment(state_dir: &Path, identity: &Identity, endpoint: &str) -> Result<()> {
    let enrolment = serde_json::to_vec(&Enrolment { endpoint: endpoint.to_owned() })?;
    highwater_wire::files::write_secret(&enrolment_path(state_dir), &enrolment)?;
    identity.save(state_dir)?;
    Ok(())
}

/// Whether this machine is enrolled already.
#[must_use]
pub fn is_enrolled(state_dir: &Path) -> bool {
    state_dir.join(highwater_wire::client::IDENTITY_FILE).exists()
}

/// Whether an enrolment could be kept: to be asked before a token is used up.
///
/// # Errors
/// The state directory cannot be made or written.
pub fn check_state_dir(dir: &Path) -> Result<(), OperatorError> {
    let probe = dir.join(format!("probe.{}", std::process::id()));
    let tried = make_private(dir).and_then(|()| fs::write(&probe, "")).and_then(|()| fs::remove_file(&probe));
    tried.map_err(|error| OperatorError {
        code: 1486,
        cause: format!("the state directory {} cannot be written: {error}", dir.display()),
        action: "Run this as root, or correct state-dir; the token has not been used".into(),
    })
}

fn make_private(dir: &Path) -> std::io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A private key that others may read is made private again: refusing it would end replication.
fn keep_private(path: &Path) {
    let Ok(found) = fs::metadata(path) else { return };
    let mode = found.permissions().mode();
    if mode & 0o077 == 0 {
        return;
    }
    let repaired = fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    tracing::warn!(
        code = "HW-1487",
        path = %path.display(),
        mode = format!("{:o}", mode & 0o7777),
        repaired = repaired.is_ok(),
        "others could read this machine's private key; if one may have, revoke the machine and enrol it again"
    );
}

/// Logs to standard error through a thread of its own that drops lines rather than wait: whoever reads the log may be
/// blocked on a filesystem that is frozen.
/// What is logged with a code is counted too, whatever is shown.
pub fn start_logging(config: &Config, metrics: Arc<Metrics>) -> tracing_appender::non_blocking::WorkerGuard {
    use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let filter =
        EnvFilter::try_from_env("HIGHWATER_LOG").unwrap_or_else(|_| EnvFilter::new(&config.log.level));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let lines = match config.log.format {
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
        LogFormat::Text => lines.with_filter(filter).boxed(),
    };
    tracing_subscriber::registry().with(lines).with(CountErrors(metrics)).init();
    guard
}

/// How long the engine may be silent within one piece of work: what a freeze with its hooks, a read of a disk that hardly
/// answers, and a collector that does not, may take together.
fn work_max(config: &Config) -> Duration {
    config.limits.hang.0
        + SYNC_LIMIT * 2
        + config.replication.freeze_deadline.0 * 5
        + config.guest.iter().map(|guest| guest.freeze_timeout.0).max().unwrap_or_default()
        + READ_MAX
        + config.limits.stall.0
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: &Config, metrics: Arc<Metrics>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let stop = Arc::new(AtomicBool::new(false));
    make_private(&config.state_dir).with_context(|| format!("cannot make {}", config.state_dir.display()))?;
    let listener = {
        let _inside = runtime.enter();
        control::bind(&config.run_dir).map_err(|e| Fatal(crate::error::Coded::operator(&e)))?
    };
    use crate::error::Coded;
    // A life before may have been killed with its guardian while filesystems were frozen.
    match crate::freeze::thaw_all(&config.run_dir) {
        Ok(thawed) if thawed.thawed > 0 => {
            tracing::warn!(
                code = "HW-1475",
                thawed = thawed.thawed,
                "an agent before this one left filesystems, of this machine or of guests, frozen; they are thawed"
            );
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot look for filesystems left frozen"),
    }
    let guardian_options = GuardianOptions {
        program: config.guardian_path.clone(),
        log: Some(config.run_dir.join("guardian.log")),
    };
    let guardian = GuardianHandle::spawn(guardian_options.clone()).map_err(|e| Fatal(e.operator()))?;
    let (tracker, origin) = Tracker::open(tracker::Options {
        bpf_dir: config.bpf_dir.clone(),
        run_dir: config.run_dir.clone(),
        copies: config.tracking.copies.map(|c| c as usize),
        net: config.tracking.net,
        bits_max: config.tracking.bitmap_memory.0 / 3 * 8,
    })
    .map_err(|e| Fatal(e.operator()))?;
    crate::memory::give_back();
    let fresh = match origin {
        Origin::TakenOver => None,
        Origin::Fresh(why) => Some(why),
    };
    tracing::info!(copies = tracker.copies(), taken_over = fresh.is_none(), "tracking programs run");

    let throttle = Arc::new(Throttle::new(config.replication.bandwidth.0));
    let (asks, control) = mpsc::channel(16);
    let board = Arc::new(Board::default());
    runtime.spawn(control::serve(listener, Desk::new(asks, board.clone(), throttle.clone())));
    serve_metrics(&runtime, config, metrics.clone());
    let (events, link_events) = mpsc::channel(256);
    let wake = Arc::new(Notify::new());
    let pulse = Arc::new(Pulse::new(config.limits.hang.0, work_max(config)));
    let group_status = SharedStatus::default();
    let (group, in_group) = group_channels();
    let start = LinkParts { events, wake: wake.clone(), throttle: throttle.clone(), pulse: pulse.clone() };
    let (machine, endpoint) = start_link(&runtime, config, start, (in_group, group_status.clone()))?;

    let r = &config.replication;
    let options = EngineOptions {
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
        point_interval: r.point_interval.0,
        freeze: FreezeOptions {
            deadline: r.freeze_deadline.0,
            sync_limit: SYNC_LIMIT,
            run_dir: config.run_dir.clone(),
        },
        freeze_budget_bytes: r.freeze_budget.0,
        rounds_max: r.rounds_max,
        compression_level: r.compression_level,
        readers: r.readers as usize,
        encoders: std::thread::available_parallelism().map_or(1, usize::from).min(4),
        partial_commit_bytes: r.partial_commit.0,
        resync_automatically: r.resync == Resync::Automatic,
        freeze_hook: config.freeze_hook.command.clone(),
        application: ApplicationOptions {
            hooks_dir: config.application.hooks_dir.clone(),
            interval: config.application.interval.0,
            limits: HookLimits { call: config.application.hook_timeout.0, hold: config.application.hold.0 },
            on_failure: config.application.on_failure,
        },
        guests: config.guest.iter().map(crate::config::Guest::options).collect(),
        guardian: guardian_options,
        endpoint,
        stored_max: config.limits.stored.0,
        capture: config.capture.options(),
        compare_bytes_per_s: r.compare_rate.0,
    };
    let parts = Parts {
        tracker,
        fresh,
        guardian,
        // The rest is for what is held under a freeze.
        pool: BufferPool::new((r.memory.0 - r.freeze_budget.0 / 2).max(4 << 20) as usize),
        throttle,
        metrics,
        link: link_events,
        wake,
        control,
        board,
        group,
        group_status,
        machine,
        stop: stop.clone(),
        pulse: pulse.clone(),
        runtime: runtime.handle().clone(),
    };
    let engine = Engine::new(options, parts)?;
    let worker = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    runtime.block_on(supervise(&worker, &pulse));
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.store(true, Ordering::Release);
    let until = std::time::Instant::now() + STOP_MAX;
    while !worker.is_finished() && std::time::Instant::now() < until {
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let died = worker.is_finished() && worker.join().is_err();
    runtime.shutdown_timeout(Duration::from_secs(1));
    // Sockets are found stale and replaced by the next life; removing it tells `status` at once.
    let _ = fs::remove_file(config.run_dir.join(control::SOCKET_NAME));
    anyhow::ensure!(!died, "the engine ended unexpectedly; tracking goes on, start the agent again");
    Ok(())
}

/// Until a signal, or the engine is gone; keeps systemd's watchdog fed meanwhile, for as long as the engine is heard of.
async fn supervise(worker: &std::thread::JoinHandle<()>, pulse: &Pulse) {
    let mut hangs = false;
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            _ = term.recv() => return,
            _ = int.recv() => return,
            _ = tick.tick() => {
                if worker.is_finished() {
                    return;
                }
                let late = pulse.overdue();
                match late {
                    Some(late) if !hangs => tracing::error!(
                        code = "HW-1485",
                        late_s = late.as_secs(),
                        "the engine is not heard of; systemd's watchdog is fed no more"
                    ),
                    None if hangs => tracing::info!("the engine is heard of again"),
                    _ => {}
                }
                hangs = late.is_some();
                if !hangs {
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                }
            }
        }
    }
}

struct LinkParts {
    events: mpsc::Sender<link::LinkEvent>,
    wake: Arc<Notify>,
    throttle: Arc<Throttle>,
    pulse: Arc<Pulse>,
}

/// Both ends of what engine and group tell each other.
type EngineEnd = (mpsc::Receiver<ToEngine>, mpsc::UnboundedSender<FromEngine>);
type GroupEnd = (mpsc::Sender<ToEngine>, mpsc::UnboundedReceiver<FromEngine>);

fn group_channels() -> (EngineEnd, GroupEnd) {
    let (ask, asks) = mpsc::channel(256);
    // The engine says no more than it was asked.
    let (say, said) = mpsc::unbounded_channel();
    ((asks, say), (ask, said))
}

fn start_link(
    runtime: &tokio::runtime::Runtime,
    config: &Config,
    LinkParts { events, wake, throttle, pulse }: LinkParts,
    ((ask, done), status): (GroupEnd, SharedStatus),
) -> Result<(Option<highwater_delta::MachineId>, Option<String>)> {
    if !is_enrolled(&config.state_dir) {
        tracing::warn!(
            code = "HW-1476",
            "this machine is not enrolled: run `highwater-agent enroll URL -` with a token; disks are tracked meanwhile"
        );
        // Keeps the engine's end open.
        runtime.spawn(async move { events.closed().await });
        return Ok((None, config.collector.endpoint.clone()));
    }
    let wire =
        |e: WireError| Fatal(OperatorError { code: e.code(), cause: e.to_string(), action: e.action() });
    keep_private(&config.state_dir.join(highwater_wire::client::IDENTITY_FILE));
    let identity = Identity::load(&config.state_dir).map_err(wire)?;
    let enrolled = fs::read(enrolment_path(&config.state_dir)).ok();
    let enrolled: Option<Enrolment> = enrolled.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let address = (config.collector.endpoint.clone())
        .or(enrolled.map(|e| e.endpoint))
        .context("no collector endpoint: set collector.endpoint in the configuration")?;
    let (host, _) = split_endpoint(&address).map_err(wire)?;
    let server_name = config.collector.server_name.clone().unwrap_or(host);
    let machine = identity.machine;
    let endpoint = Endpoint { address: address.clone(), server_name };
    let patience = Patience {
        silence: config.limits.silence.0,
        stall: config.limits.stall.0,
        retry_unit: config.replication.retry_unit.0,
    };
    let renewal = Arc::new(Renewal::new(config.state_dir.clone(), identity).map_err(wire)?);
    let (tell, told) = mpsc::channel(64);
    let listen = config.group.listen;
    let reachable = Reachable { host: config.group.advertise.clone(), port: listen.port() };
    let groups = link::Groups { told: tell, reachable };
    let options = group::Options { listen, run_dir: config.run_dir.clone() };
    let identity = {
        let renewal = renewal.clone();
        move || renewal.identity()
    };
    runtime.spawn(group::run(options, machine, identity, told, ask, done, status));
    runtime.spawn(link::run(endpoint, renewal, patience, (throttle, pulse), groups, events, wake));
    Ok((Some(machine), Some(address)))
}

fn enrolment_path(state_dir: &Path) -> PathBuf {
    state_dir.join("enrolment.json")
}

fn serve_metrics(runtime: &tokio::runtime::Runtime, config: &Config, metrics: Arc<Metrics>) {
    const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let address = config.metrics_listen;
    let told = highwater_serve::Metrics { content_type: TEXT, render: Arc::new(move || metrics.text()) };
    runtime.spawn(async move {
        match tokio::net::TcpListener::bind(address).await {
            // It ends with the runtime.
            Ok(listener) => {
                highwater_serve::serve_metrics(listener, told, Limits::default(), CancellationToken::new()).await;
            }
            Err(error) => {
                tracing::error!(code = "HW-1477", %address, %error, "metrics are not served; change metrics-listen in the configuration");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_is_tried_before_a_token_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        check_state_dir(&state).unwrap();
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "nothing is left behind");
        fs::write(dir.path().join("file"), "").unwrap();
        let error = check_state_dir(&dir.path().join("file/state")).unwrap_err();
        assert_eq!(error.code, 1486);
    }

    #[test]
    fn a_key_that_others_may_read_is_made_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.pem");
        fs::write(&path, "key").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        keep_private(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
