//! `highwater-agent run`: puts the parts together, and takes them apart at SIGTERM.
//!
//! Order of a start: control socket (so that two agents never meet), guardian, tracker, engine, session. At the end
//! only the agent goes: the programs stay pinned and go on marking.

use crate::{
    config::{Config, LogFormat, Resync},
    control,
    engine::{
        Engine, EngineOptions, Parts,
        link::{self, Endpoint},
    },
    freeze::FreezeOptions,
    guardian::{GuardianHandle, GuardianOptions},
    metrics::Metrics,
    source::BufferPool,
    throttle::Throttle,
    tracker::{self, Origin, Tracker},
};
use anyhow::{Context, Result};
use axum::{Router, http::header, routing::get};
use highwater_wire::{Identity, WireError, enroll::split_endpoint};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
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

/// How long a freeze's preceding sync may take.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// How long the engine may take to stop after a signal.
const STOP_MAX: Duration = Duration::from_secs(20);

/// What enrolment left beside the identity.
#[derive(Serialize, Deserialize)]
struct Enrolment {
    endpoint: String,
}

/// Keeps the enrolment in the state directory. The identity is written last: with it, the machine is enrolled.
///
/// # Errors
/// It cannot be written; the token is used up all the same.
pub fn save_enrolment(state_dir: &Path, identity: &Identity, endpoint: &str) -> Result<()> {
    make_private(state_dir)?;
    let path = state_dir.join("enrolment.json");
    let next = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    file.write_all(&serde_json::to_vec(&Enrolment { endpoint: endpoint.to_owned() })?)?;
    file.sync_all()?;
    fs::rename(&next, &path)?;
    identity.save(state_dir)?;
    Ok(())
}

/// Whether this machine is enrolled already.
#[must_use]
pub fn is_enrolled(state_dir: &Path) -> bool {
    state_dir.join(highwater_wire::client::IDENTITY_FILE).exists()
}

fn make_private(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot make {}", dir.display()))?;
    }
    Ok(())
}

/// Logs to standard error through a thread of its own that drops lines rather than wait: whoever reads the log may be
/// blocked on a filesystem that is frozen.
pub fn start_logging(config: &Config) -> tracing_appender::non_blocking::WorkerGuard {
    use tracing_subscriber::EnvFilter;
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let filter =
        EnvFilter::try_from_env("HIGHWATER_LOG").unwrap_or_else(|_| EnvFilter::new(&config.log.level));
    let builder = tracing_subscriber::fmt().with_writer(writer).with_env_filter(filter).with_ansi(false);
    match config.log.format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.init(),
    }
    guard
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let stop = Arc::new(AtomicBool::new(false));
    make_private(&config.state_dir)?;
    let listener = {
        let _inside = runtime.enter();
        control::bind(&config.run_dir)
            .map_err(|e| anyhow::anyhow!(crate::error::Coded::operator(&e).to_string()))?
    };
    let operator = |e: &dyn Fn() -> crate::error::OperatorError| anyhow::anyhow!(e().to_string());
    use crate::error::Coded;
    // A life before may have been killed with its guardian while filesystems were frozen.
    match crate::freeze::thaw_all(&config.run_dir) {
        Ok(thawed) if thawed.thawed > 0 => {
            tracing::warn!(
                code = "HW-1475",
                thawed = thawed.thawed,
                "an agent before this one left filesystems frozen; they are thawed"
            );
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot look for filesystems left frozen"),
    }
    let guardian = GuardianHandle::spawn(GuardianOptions {
        program: config.guardian_path.clone(),
        log: Some(config.run_dir.join("guardian.log")),
    })
    .map_err(|e| operator(&|| e.operator()))?;
    let (tracker, origin) = Tracker::open(tracker::Options {
        bpf_dir: config.bpf_dir.clone(),
        run_dir: config.run_dir.clone(),
        copies: config.tracking.copies.map(|c| c as usize),
        net: config.tracking.net,
        bits_max: config.tracking.bitmap_memory.0 / 3 * 8,
    })
    .map_err(|e| operator(&|| e.operator()))?;
    let fresh = match origin {
        Origin::TakenOver => None,
        Origin::Fresh(why) => Some(why),
    };
    tracing::info!(copies = tracker.copies(), taken_over = fresh.is_none(), "tracking programs run");

    let metrics = Arc::new(Metrics::new());
    let throttle = Arc::new(Throttle::new(config.replication.bandwidth.0));
    let (asks, control) = mpsc::channel(16);
    runtime.spawn(control::serve(listener, asks));
    serve_metrics(&runtime, config, metrics.clone());
    let (events, link_events) = mpsc::channel(256);
    let wake = Arc::new(Notify::new());
    let (machine, endpoint) = start_link(&runtime, config, &throttle, events, &wake)?;

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
        endpoint,
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
        machine,
        stop: stop.clone(),
        runtime: runtime.handle().clone(),
    };
    let engine = Engine::new(options, parts)?;
    let worker = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    runtime.block_on(supervise(&worker));
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

/// Until a signal, or the engine is gone; keeps systemd's watchdog fed meanwhile.
async fn supervise(worker: &std::thread::JoinHandle<()>) {
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
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
            }
        }
    }
}

fn start_link(
    runtime: &tokio::runtime::Runtime,
    config: &Config,
    throttle: &Arc<Throttle>,
    events: mpsc::Sender<link::LinkEvent>,
    wake: &Arc<Notify>,
) -> Result<(Option<highwater_delta::MachineId>, Option<String>)> {
    if !is_enrolled(&config.state_dir) {
        tracing::warn!(
            code = "HW-1476",
            "this machine is not enrolled: run `highwater-agent enroll URL TOKEN`; disks are tracked meanwhile"
        );
        // Keeps the engine's end open.
        runtime.spawn(async move { events.closed().await });
        return Ok((None, config.collector.endpoint.clone()));
    }
    let wire = |e: WireError| anyhow::anyhow!("HW-{}: {e}. {}", e.code(), e.action());
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
    let unit = config.replication.retry_unit.0;
    runtime.spawn(link::run(endpoint, Arc::new(identity), unit, throttle.clone(), events, wake.clone()));
    Ok((Some(machine), Some(address)))
}

fn enrolment_path(state_dir: &Path) -> PathBuf {
    state_dir.join("enrolment.json")
}

fn serve_metrics(runtime: &tokio::runtime::Runtime, config: &Config, metrics: Arc<Metrics>) {
    const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let address = config.metrics_listen;
    let app = Router::new().route(
        "/metrics",
        get(move || {
            let metrics = metrics.clone();
            async move { ([(header::CONTENT_TYPE, TEXT)], metrics.text()) }
        }),
    );
    runtime.spawn(async move {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => {
                if let Err(error) = axum::serve(listener, app).await {
                    tracing::error!(%error, "the metrics endpoint ended");
                }
            }
            Err(error) => {
                tracing::error!(code = "HW-1477", %address, %error, "metrics are not served; change metrics-listen in the configuration");
            }
        }
    });
}
