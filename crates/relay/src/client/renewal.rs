//! The certificate's renewal, by whoever uses it: asked for once a third of its validity is left, now and then until it succeeds.

use super::Client;
use crate::{RelayError, Request, SMALL_BODY_BYTES_MAX};
use highwater_delta::Code;
use highwater_wire::{RelayIdentity, identity::Csr};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Between two tries, at most; a thirtieth of the validity, if that is shorter.
const TRY_EVERY: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct Renewal {
    due_ms: AtomicU64,
    every: Duration,
    tried: Mutex<Option<Instant>>,
}

impl Renewal {
    pub(super) fn of(identity: &RelayIdentity) -> Result<Self, RelayError> {
        let credential = identity.credential()?;
        let validity = Duration::from_millis(credential.expires_ms.saturating_sub(credential.not_before_ms));
        Ok(Self {
            due_ms: AtomicU64::new(credential.renewal_due_ms()),
            every: TRY_EVERY.min(validity / 30),
            tried: Mutex::default(),
        })
    }

    /// Whether to try now; then that counts as a try.
    fn is_due(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if now.as_millis() < u128::from(self.due_ms.load(Ordering::Relaxed)) {
            return false;
        }
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        let due = tried.is_none_or(|tried| tried.elapsed() >= self.every);
        if due {
            *tried = Some(Instant::now());
        }
        due
    }
}

impl Client {
    /// Begins to renew the certificate if that is due. Requests do not wait for it.
    pub(super) fn renew_if_due(&self, asked: &Request) {
        if *asked == Request::Renew || !self.0.renewal.is_due() {
            return;
        }
        let client = self.clone();
        tokio::spawn(async move {
            match client.renew().await {
                Ok(true) => tracing::info!("the relay's certificate was renewed"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(code = %Code(error.code()), action = error.action(), %error, "the relay's certificate was not renewed");
                }
            }
        });
    }

    /// False: somebody else has renewed it.
    async fn renew(&self) -> Result<bool, RelayError> {
        let (dir, renewal) = (&self.0.address.identity, &self.0.renewal);
        let old = RelayIdentity::load(dir)?;
        let due_ms = old.credential()?.renewal_due_ms();
        if due_ms > renewal.due_ms.load(Ordering::Relaxed) {
            renewal.due_ms.store(due_ms, Ordering::Relaxed);
            return Ok(false);
        }
        let csr = Csr::create()?;
        let answer = self.tell(&Request::Renew, csr.csr_pem.into()).await?;
        let bad = || RelayError::BadAnswer("the new certificate");
        let cert = std::str::from_utf8(&answer).ok().filter(|cert| cert.len() as u64 <= SMALL_BODY_BYTES_MAX);
        let new = old.renewed(&csr.key_pem, cert.ok_or_else(bad)?)?;
        let replaced = new.replace(dir, &old)?;
        renewal.due_ms.store(new.credential()?.renewal_due_ms(), Ordering::Relaxed);
        Ok(replaced)
    }
}
