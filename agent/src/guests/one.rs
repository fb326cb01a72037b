//! The thread that freezes one guest and thaws it. It alone speaks to the guest's agent from greeting to thaw, so there is one place that
//! cleans up, whether the one who asked for it still waits or not.

use super::{GREETING, GuestError, THAW, qga::Qga, record};
use crate::guardian::GuardianHandle;
use std::{
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel},
    },
    time::{Duration, Instant},
};

/// What is asked of it.
pub(super) struct Job {
    pub name: String,
    pub record: PathBuf,
    pub socket: PathBuf,
    pub disks: Vec<PathBuf>,
    pub guardian: GuardianHandle,
    /// For the freeze.
    pub limit: Duration,
    /// For standing still, beyond the freeze.
    pub deadline: Duration,
    /// Set as long as the thread lives.
    pub busy: Arc<AtomicBool>,
}

/// It stands still.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frozen {
    /// So many filesystems.
    pub count: u64,
}

/// What it says, in this order: one of the first two; after `Frozen` one of the last two.
pub(super) enum Report {
    Frozen(Frozen),
    Failed(GuestError),
    /// `count` filesystems were frozen until the thread itself thawed them.
    Thawed {
        count: u64,
        in_time: bool,
    },
}

struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Job {
    /// Dropping the sender thaws.
    pub(super) fn start(self) -> Result<(Sender<()>, Receiver<Report>), GuestError> {
        let (release, released) = channel();
        // Room for all that is ever sent: the thread waits for nobody who has left.
        let (report, reports) = sync_channel(2);
        self.busy.store(true, Ordering::Release);
        let busy = Busy(self.busy.clone());
        let name = self.name.clone();
        let run = move || {
            let last = self.run(&released, &report);
            // First, so that whoever hears of the end may begin anew.
            drop(busy);
            if let Some(last) = last {
                let _ = report.send(last);
            }
        };
        let started = std::thread::Builder::new().name("guest".into()).spawn(run);
        started.map_err(|source| GuestError::Host {
            name,
            what: "no thread could be started".into(),
            source,
        })?;
        Ok((release, reports))
    }

    /// Answers what is to be said last.
    fn run(self, released: &Receiver<()>, report: &SyncSender<Report>) -> Option<Report> {
        let agent = |source| GuestError::Agent { name: self.name.clone(), source };
        let greeted = Instant::now() + GREETING;
        let connected =
            Qga::connect(&self.socket, greeted).and_then(|mut qga| qga.ready(greeted).map(|()| qga));
        let mut qga = match connected {
            Ok(qga) => qga,
            Err(source) => return Some(Report::Failed(agent(source))),
        };
        let until = Instant::now() + self.limit + self.deadline;
        if let Err(error) = self.arm(&qga) {
            return Some(Report::Failed(error));
        }
        // Nobody waits any more: not a needless freeze.
        let wanted = released.try_recv() != Err(TryRecvError::Disconnected);
        let frozen = wanted.then(|| self.freeze(&mut qga));
        let stands = matches!(frozen, Some(Ok(_)));
        match frozen {
            Some(Ok(count)) => {
                let _ = report.send(Report::Frozen(Frozen { count }));
                let left = until.saturating_duration_since(Instant::now());
                let _: Result<(), RecvTimeoutError> = released.recv_timeout(left);
            }
            Some(Err(error)) => {
                let _ = report.send(Report::Failed(error));
            }
            None => {}
        }
        let ended = self.end(&mut qga);
        let (thawed, in_time) = (ended.is_ok(), Instant::now() < until);
        let mut last = stands.then(|| match ended {
            Ok(count) => Report::Thawed { count, in_time },
            Err(source) => Report::Failed(agent(source)),
        });
        if !thawed && let Some(last) = last.take() {
            let _ = report.send(last);
        }
        // The guardian has its own reference to the connection: closed here, it stays open as long as that one needs it.
        drop(qga);
        // At once if it is thawed. Else the guardian keeps at it, and nothing is begun with this guest meanwhile.
        let disarmed = self.guardian.disarm();
        if thawed || disarmed.is_ok() {
            record::remove(&self.record);
        } else {
            tracing::warn!(
                code = "HW-1447",
                guest = self.name,
                "the guest's thaw is not confirmed; its guardian keeps at it"
            );
        }
        last
    }

    /// From here on the guardian thaws it, if nobody else does.
    fn arm(&self, qga: &Qga) -> Result<(), GuestError> {
        record::write(&self.record, &self.name, &self.socket).map_err(|source| GuestError::Host {
            name: self.name.clone(),
            what: "its record could not be written".into(),
            source,
        })?;
        let guardian = |source| GuestError::Guardian { name: self.name.clone(), source };
        let armed = self.guardian.arm_guest(qga.stream(), self.limit + self.deadline);
        let taken = armed.and_then(|()| self.guardian.take(0));
        if taken.is_err() {
            record::remove(&self.record);
        }
        taken.map_err(guardian)
    }

    /// Freezes it, and writes out what the host's page cache holds of its disks.
    fn freeze(&self, qga: &mut Qga) -> Result<u64, GuestError> {
        let agent = |source| GuestError::Agent { name: self.name.clone(), source };
        let count = qga.freeze(Instant::now() + self.limit).map_err(agent)?;
        if count == 0 {
            let why = "no filesystem of it could be frozen".into();
            return Err(GuestError::Thawed { name: self.name.clone(), why });
        }
        for disk in &self.disks {
            File::open(disk).and_then(|device| device.sync_all()).map_err(|source| GuestError::Host {
                name: self.name.clone(),
                what: format!("{} could not be written out", disk.display()),
                source,
            })?;
        }
        Ok(count)
    }

    /// Thaws it. Where that is not confirmed, the guardian stays answerable.
    fn end(&self, qga: &mut Qga) -> Result<u64, super::qga::QgaError> {
        let count = qga.thaw(Instant::now() + THAW)?;
        let _ = self.guardian.release(0);
        Ok(count)
    }
}
