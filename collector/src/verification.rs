//! The vault is read back, now and then: [`highwater_vault::verify`], all of it or a sample, slowly, beside sessions and maintenance.
//!
//! - **State.** How far a pass is lies in `state-dir` (`verification`), and when the last one ended (`verified`): a collector that is started
//!   anew goes on. Lost or garbled, both only make it begin anew; without a directory so does each start.
//! - **Failures** of the store end a round, which goes on later. A shutdown ends it at once.
//! - **Memory**, beside `memory`'s budget: what a verification takes ([`highwater_vault::verify`]).
//! - Of several collectors of a vault each reads by itself: set `verify-every = "0s"` in all but one.

use crate::CollectorError;
use crate::clock::now_ms;
use crate::rounds::{self, Rounds};
use crate::shared::Shared;
use crate::state_dir::not_kept;
use async_trait::async_trait;
use highwater_delta::{Code, VaultId};
use highwater_vault::Location;
use highwater_vault::verify::{Pass, Report, Sample, Settings, Watch, resume};
use highwater_vault::{Pace, VaultError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Until the first round, at most: a start has other things to do.
const FIRST_AFTER: Duration = Duration::from_secs(600);
/// After a failure, at most.
const AGAIN_AFTER: Duration = Duration::from_secs(300);
/// Between two looks at whether a pass is due.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How often what is done is written down: as much is read again after a kill.
const KEPT_EVERY: Duration = Duration::from_secs(10);
/// Findings of a pass that are logged one by one.
const LINES_MAX: usize = 20;

/// Percent of a vault that is not in a local directory, unless the configuration says otherwise.
const FAR_SAMPLE: f64 = 2.0;

/// Runs until the collector ends.
pub async fn run(shared: Arc<Shared>) {
    let every = shared.config.verify_every;
    if every.is_zero() {
        return;
    }
    let rate = Some(shared.config.verify_rate).filter(|rate| *rate > 0);
    let mut verifier = Verifier {
        dir: shared.state.path().map(Path::to_path_buf),
        settings: Settings { pace: Arc::new(Pace::new(rate)) },
        pass: None,
        last: None,
        loaded: false,
        shared: shared.clone(),
    };
    rounds::run(&shared.shutdown, FIRST_AFTER.min(every), &mut verifier).await;
    verifier.keep();
}

/// What is known of the last pass that came to its end.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Last {
    vault: VaultId,
    begun_ms: u64,
    ended_ms: u64,
    problems: u64,
}

struct Verifier {
    shared: Arc<Shared>,
    dir: Option<PathBuf>,
    settings: Settings,
    /// Begun, and not at its end.
    pass: Option<Pass>,
    last: Option<Last>,
    loaded: bool,
}

impl Rounds for Verifier {
    /// Does what is due; answers until when nothing is.
    async fn round(&mut self) -> Duration {
        if !self.loaded {
            self.load();
            self.loaded = true;
        }
        let every = self.shared.config.verify_every;
        if self.pass.is_none()
            && let Some(left) = self.not_due(every)
        {
            return left.min(LOOK_EVERY);
        }
        match self.go_on().await {
            Ok(()) => self.not_due(every).unwrap_or(every).min(LOOK_EVERY),
            Err(error) => {
                self.shared.metrics.verification.failed();
                let (code, action) = (Code(error.code()), error.action());
                tracing::warn!(%code, %error, action, "verifying the vault was broken off; it goes on later");
                AGAIN_AFTER.min(every)
            }
        }
    }
}

impl Verifier {
    /// How long it is until the next pass.
    fn not_due(&self, every: Duration) -> Option<Duration> {
        let last = self.last?;
        // By a clock that was set back, nobody waits for years.
        let since = Duration::from_millis(now_ms().abs_diff(last.begun_ms));
        every.checked_sub(since).filter(|left| !left.is_zero())
    }

    async fn go_on(&mut self) -> Result<(), VaultError> {
        let shared = self.shared.clone();
        let pass = match &mut self.pass {
            Some(pass) => pass,
            None => self.pass.insert(Pass::new(&shared.vault, None, sample(&shared)?)),
        };
        let watch = Told {
            shared: &shared,
            file: self.dir.as_deref().map(file),
            before: self.last.map_or(0, |last| last.problems),
            seen: Mutex::new(Seen::of(pass.report())),
        };
        let report = pass.run(&shared.vault, &self.settings, &watch).await?;
        let last = Last {
            vault: shared.vault.id(),
            begun_ms: pass.begun_ms(),
            ended_ms: now_ms(),
            problems: report.problems.len() as u64 + report.left_out,
        };
        self.ended(&report, last);
        Ok(())
    }

    fn ended(&mut self, report: &Report, last: Last) {
        (self.pass, self.last) = (None, Some(last));
        self.shared.metrics.verification.ended(last.ended_ms, report.problems.len());
        if report.is_clean() {
            let (segments, maps, bytes) = (report.segments, report.maps, report.bytes);
            tracing::info!(segments, maps, bytes, not_read = report.not_read, "the vault was verified");
        } else {
            let error = CollectorError::VaultDamaged(report.problems.len());
            let (code, action) = (Code(error.code()), error.action());
            tracing::error!(%code, %error, action, "verifying the vault has found damage");
        }
        let Some(dir) = &self.dir else { return };
        // Short, and once in a pass.
        let kept = write_last(dir, &last).and_then(|()| Ok(resume::remove(&file(dir))?));
        if let Err(error) = kept {
            not_kept(&error);
        }
    }

    /// For the next process.
    fn keep(&self) {
        if let (Some(dir), Some(pass)) = (&self.dir, &self.pass)
            && let Err(error) = resume::save(&file(dir), pass)
        {
            not_kept(&error);
        }
    }

    /// What an earlier process left.
    fn load(&mut self) {
        let Some(dir) = &self.dir else { return };
        let vault = &self.shared.vault;
        match sample_of(&self.shared) {
            // Whatever sample was drawn: it is gone on with, if there is to be one.
            Some(_) => self.pass = loaded(resume::load(&file(dir), vault, None, None)),
            None => self.pass = loaded(resume::load(&file(dir), vault, None, Some(None))),
        }
        let read = std::fs::read(dir.join("verified")).ok();
        let last: Option<Last> = read.and_then(|text| serde_json::from_slice(&text).ok());
        self.last = last.filter(|last| last.vault == vault.id());
        if let Some(last) = self.last {
            self.shared.metrics.verification.ended(last.ended_ms, last.problems as usize);
        }
    }
}

/// One that is of no use is begun anew.
fn loaded(read: Result<Option<Pass>, VaultError>) -> Option<Pass> {
    read.unwrap_or_else(|error| {
        tracing::warn!(code = %Code(error.code()), %error, "verifying the vault begins anew");
        None
    })
}

/// Percent of the objects that are read. Reading a whole bucket each week can cost more than keeping it.
fn sample_of(shared: &Shared) -> Option<f64> {
    let default = match shared.config.vault {
        Location::Directory(_) => None,
        Location::Bucket(_) | Location::Relay(_) => Some(FAR_SAMPLE),
    };
    shared.config.verify_sample.map(f64::from).or(default).filter(|percent| *percent < 100.0)
}

fn sample(shared: &Shared) -> Result<Option<Sample>, VaultError> {
    sample_of(shared).map(Sample::random).transpose()
}

fn file(dir: &Path) -> PathBuf {
    dir.join("verification")
}

fn write_last(dir: &Path, last: &Last) -> anyhow::Result<()> {
    let new = dir.join("verified.new");
    std::fs::write(&new, serde_json::to_vec(last)?)?;
    std::fs::File::open(&new)?.sync_all()?;
    Ok(std::fs::rename(&new, dir.join("verified"))?)
}

/// What was told of a pass so far.
struct Seen {
    objects: u64,
    bytes: u64,
    problems: usize,
    kept: Instant,
    /// It could not be written down, and that was said.
    not_kept: bool,
}

impl Seen {
    fn of(report: &Report) -> Self {
        let objects = report.segments + report.maps;
        let (bytes, problems) = (report.bytes, report.problems.len());
        Self { objects, bytes, problems, kept: Instant::now(), not_kept: false }
    }
}

struct Told<'a> {
    shared: &'a Shared,
    file: Option<PathBuf>,
    /// Problems of the pass before.
    before: u64,
    seen: Mutex<Seen>,
}

#[async_trait]
impl Watch for Told<'_> {
    async fn done(&self, pass: &Pass) -> Result<(), VaultError> {
        let report = pass.report();
        let is_time = {
            let mut seen = crate::lock::locked(&self.seen);
            let objects = report.segments + report.maps;
            let (more, bytes) =
                (objects - seen.objects.min(objects), report.bytes - seen.bytes.min(report.bytes));
            self.shared.metrics.verification.read(more, bytes);
            for (n, problem) in report.problems.iter().enumerate().skip(seen.problems) {
                if n < LINES_MAX {
                    let (code, cause, action) = (problem.code, &problem.cause, &problem.action);
                    let machine = problem.machine.map(|machine| machine.to_string()).unwrap_or_default();
                    tracing::error!(machine, %code, cause, %action, "the vault is damaged");
                }
            }
            self.shared.metrics.verification.found(report.problems.len().max(self.before as usize));
            (seen.objects, seen.bytes, seen.problems) = (objects, report.bytes, report.problems.len());
            let is_time = seen.kept.elapsed() >= KEPT_EVERY;
            if is_time {
                seen.kept = Instant::now();
            }
            is_time
        };
        if let Some(file) = self.file.clone().filter(|_| is_time)
            && let Err(error) = resume::save_beside(file, pass.clone()).await
        {
            let mut seen = crate::lock::locked(&self.seen);
            if !std::mem::replace(&mut seen.not_kept, true) {
                not_kept(&error);
            }
        }
        Ok(())
    }
}
