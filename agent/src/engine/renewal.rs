//! The renewal of this machine's certificate, within the session that the present one made possible.
//!
//! Once a third of its validity is left, a new key and a request are made, and the collector is asked. Its answer becomes
//! the identity of the next connection; the present one goes on. At most one attempt a day (a thirtieth of the validity, if
//! that is less), whatever comes of it.
//!
//! **Crash.** The new key exists in memory only until its certificate has come; then both replace the old ones in one file, by
//! one rename. Before it the old identity holds and is valid; after it the new one does. A certificate whose key was lost
//! expires unused.
//!
//! **Freeze.** The file may lie on a filesystem that is frozen just now: it is written on a thread that may wait for that.

use highwater_wire::{
    Identity, WireError,
    identity::Csr,
    message::{AgentMessage, Refusal},
};
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// An attempt that failed is repeated after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(86_400);

/// Who this machine is, and how that is renewed.
pub struct Renewal {
    /// Directory of the identity.
    dir: PathBuf,
    held: Mutex<Held>,
    /// When to ask next, in milliseconds since 1970.
    next_ms: AtomicU64,
}

struct Held {
    identity: Arc<Identity>,
    /// The key whose certificate was asked for in this session.
    asked: Option<Csr>,
}

impl Renewal {
    /// Of the identity that was loaded from `dir`.
    ///
    /// # Errors
    /// Its certificate cannot be read.
    pub fn new(dir: PathBuf, identity: Identity) -> Result<Self, WireError> {
        let due_ms = identity.credential()?.renewal_due_ms();
        let held = Mutex::new(Held { identity: Arc::new(identity), asked: None });
        Ok(Self { dir, held, next_ms: AtomicU64::new(due_ms) })
    }

    /// For the next connection, which knows nothing of what was asked in the one before.
    pub fn connecting(&self) -> Arc<Identity> {
        let mut held = self.held();
        held.asked = None;
        held.identity.clone()
    }

    /// Who this machine is now.
    pub fn identity(&self) -> Arc<Identity> {
        self.held().identity.clone()
    }

    /// How long until [`Renewal::ask`] has something to say.
    pub fn due_in(&self, now_ms: u64) -> Duration {
        Duration::from_millis(self.next_ms.load(Ordering::Relaxed).saturating_sub(now_ms))
    }

    /// What to say to the collector, if it is time.
    pub fn ask(&self, now_ms: u64) -> Option<AgentMessage> {
        if !self.due_in(now_ms).is_zero() {
            return None;
        }
        let mut held = self.held();
        let validity = held.identity.credential().map_or(AGAIN_AFTER, |credential| credential.validity());
        let again = AGAIN_AFTER.min(validity / 30).max(Duration::from_millis(100));
        self.next_ms.store(now_ms + again.as_millis() as u64, Ordering::Relaxed);
        match Csr::create() {
            Ok(csr) => {
                let message = AgentMessage::Renew { csr_pem: csr.csr_pem.clone() };
                held.asked = Some(csr);
                Some(message)
            }
            Err(error) => {
                tell(error.code(), &error.to_string(), &error.action());
                None
            }
        }
    }

    /// The collector has certified the key.
    pub fn renewed(self: &Arc<Self>, cert_pem: String) {
        let this = Arc::clone(self);
        // Not waited for: neither this session nor the next one depends on it.
        tokio::task::spawn_blocking(move || match this.keep(&cert_pem) {
            Ok(()) => {}
            Err(error) => tell(error.code(), &error.to_string(), &error.action()),
        });
    }

    /// The collector has refused.
    pub fn refused(&self, refusal: &Refusal) {
        self.held().asked = None;
        tell(refusal.code, &refusal.cause, &refusal.action);
    }

    fn keep(&self, cert_pem: &str) -> Result<(), WireError> {
        let (old, csr) = {
            let mut held = self.held();
            let csr =
                held.asked.take().ok_or(WireError::Unexpected("a certificate that was not asked for"))?;
            (held.identity.clone(), csr)
        };
        let new = old.renewed(&csr.key_pem, cert_pem)?;
        let credential = new.credential()?;
        if !new.replace(&self.dir, &old)? {
            tracing::info!("this machine was enrolled again: its former certificate is not renewed");
            // Nothing to renew until the agent is started with the new identity.
            self.next_ms.store(u64::MAX, Ordering::Relaxed);
            return Ok(());
        }
        self.held().identity = Arc::new(new);
        // A collector that only has short ones to give is not asked without a pause.
        self.next_ms.fetch_max(credential.renewal_due_ms(), Ordering::Relaxed);
        let days = Duration::from_millis(credential.expires_ms.saturating_sub(now_ms())).as_secs() / 86_400;
        tracing::info!(
            serial = credential.serial,
            valid_days = days,
            "the machine's certificate was renewed"
        );
        Ok(())
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(code: u16, cause: &str, action: &str) {
    tracing::warn!(
        code = format!("HW-{code:04}"),
        cause,
        action,
        "the machine's certificate was not renewed"
    );
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use highwater_delta::MachineId;
    use highwater_wire::identity::{Authority, Grant};

    const DAY_MS: u64 = 86_400_000;

    struct Machine {
        ca: Authority,
        dir: tempfile::TempDir,
        renewal: Arc<Renewal>,
    }

    fn machine(days: u64) -> Machine {
        let (ca, dir) = (Authority::create("test").unwrap(), tempfile::tempdir().unwrap());
        let csr = Csr::create().unwrap();
        let cert = ca.certify(&csr.csr_pem, grant(MachineId::new(), days)).unwrap();
        let identity = Identity::from_pems(&csr.key_pem, &cert, ca.cert_pem()).unwrap();
        identity.save(dir.path()).unwrap();
        let renewal = Arc::new(Renewal::new(dir.path().to_owned(), identity).unwrap());
        Machine { ca, dir, renewal }
    }

    fn grant(machine: MachineId, days: u64) -> Grant {
        Grant { machine, generation: 0, validity: Duration::from_millis(days * DAY_MS) }
    }

    impl Machine {
        fn stored(&self) -> Identity {
            Identity::load(self.dir.path()).unwrap()
        }
        fn certify(&self, asked: &AgentMessage, days: u64) -> String {
            let AgentMessage::Renew { csr_pem } = asked else { panic!("{asked:?}") };
            self.ca.recertify(csr_pem, grant(self.stored().machine, days)).unwrap()
        }
    }

    #[test]
    fn it_is_asked_for_when_a_third_is_left_and_then_once_a_day() {
        let machine = machine(90);
        let now = now_ms();
        assert!(machine.renewal.ask(now).is_none());
        assert!(machine.renewal.ask(now + 59 * DAY_MS).is_none());
        let then = now + 61 * DAY_MS;
        assert!(machine.renewal.ask(then).is_some());
        assert!(
            machine.renewal.ask(then + DAY_MS - 1000).is_none(),
            "the first attempt is under way or failed"
        );
        assert!(machine.renewal.ask(then + DAY_MS).is_some());
        assert_eq!(machine.renewal.due_in(then + DAY_MS), Duration::from_millis(DAY_MS));
    }

    #[test]
    fn what_was_renewed_is_the_identity_of_the_next_connection() {
        let machine = machine(90);
        let before = machine.renewal.connecting();
        let then = now_ms() + 61 * DAY_MS;
        let asked = machine.renewal.ask(then).unwrap();
        machine.renewal.keep(&machine.certify(&asked, 200)).unwrap();
        let after = machine.renewal.connecting();
        assert_ne!(before.cert_chain, after.cert_chain);
        assert_ne!(before.key, after.key, "a new key");
        assert_eq!(
            (machine.stored().cert_chain.clone(), machine.stored().key.secret_der().to_vec()),
            (after.cert_chain.clone(), after.key.secret_der().to_vec())
        );
        assert!(machine.renewal.ask(then + DAY_MS).is_none(), "not before a third of the new one is left");
        assert_eq!(machine.renewal.keep("").unwrap_err().code(), 1109, "one answer to one question");
    }

    #[test]
    fn a_useless_answer_changes_nothing() {
        let machine = machine(90);
        let before = machine.renewal.connecting();
        let asked = machine.renewal.ask(now_ms() + 61 * DAY_MS).unwrap();
        let AgentMessage::Renew { csr_pem } = &asked else { panic!() };
        let others = machine.ca.certify(csr_pem, grant(MachineId::new(), 90)).unwrap();
        assert_eq!(machine.renewal.keep(&others).unwrap_err().code(), 1113);
        assert_eq!(machine.stored().cert_chain, before.cert_chain);
        assert_eq!(machine.renewal.connecting().cert_chain, before.cert_chain);
        // The answer of an earlier session's question, too.
        let asked = machine.renewal.ask(now_ms() + 70 * DAY_MS).unwrap();
        let cert = machine.certify(&asked, 90);
        machine.renewal.connecting();
        assert_eq!(machine.renewal.keep(&cert).unwrap_err().code(), 1109);
        assert_eq!(machine.stored().cert_chain, before.cert_chain);
    }

    #[test]
    fn a_machine_that_was_enrolled_again_keeps_its_new_identity() {
        let machine = machine(90);
        let asked = machine.renewal.ask(now_ms() + 61 * DAY_MS).unwrap();
        let cert = machine.certify(&asked, 90);
        let csr = Csr::create().unwrap();
        let other = machine.ca.certify(&csr.csr_pem, grant(MachineId::new(), 90)).unwrap();
        let other = Identity::from_pems(&csr.key_pem, &other, machine.ca.cert_pem()).unwrap();
        other.save(machine.dir.path()).unwrap();
        machine.renewal.keep(&cert).unwrap();
        assert_eq!(machine.stored().machine, other.machine);
        assert!(machine.renewal.ask(now_ms() + 89 * DAY_MS).is_none());
    }
}
