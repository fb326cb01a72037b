//! Uploads under way, of one relay. They live in memory: a crash of this side ends them all, and what the store keeps of them is for
//! its own rules, as with every interrupted upload.
//!
//! A client may repeat each request, not knowing whether it was heard: a begin of what was begun, the part that was put last, and a
//! completion do nothing the second time, and are answered alike.

use crate::{Name, RelayError, request::UploadId};
use object_store::{MultipartUpload, ObjectStore, PutPayload};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Uploads of one relay at once.
pub const UPLOADS_MAX: usize = 256;
/// One that nothing is asked of for so long is given up: a delta may be open for some minutes without progress.
pub const UPLOAD_IDLE_MAX: Duration = Duration::from_secs(15 * 60);
/// What was completed is remembered for so long, for clients that ask again.
const COMPLETED_MAX: Duration = Duration::from_secs(5 * 60);
/// Stores have such a limit.
const PARTS_MAX: u64 = 10_000;

#[derive(Default)]
pub(super) struct Uploads(Mutex<HashMap<UploadId, Arc<Upload>>>);

struct Upload {
    name: Name,
    /// When something was asked of it last, and whether it is complete.
    seen: Mutex<(Instant, bool)>,
    work: tokio::sync::Mutex<Work>,
}

#[derive(Default)]
struct Work {
    state: State,
    parts: u64,
    bytes: u64,
    /// Length and checksum of the last part.
    last: Option<(u64, u32)>,
}

#[derive(Default)]
enum State {
    #[default]
    NotBegun,
    Open(Box<dyn MultipartUpload>),
    Complete,
    /// Failed, or given up.
    Gone,
}

impl Uploads {
    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<UploadId, Arc<Upload>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &Name, id: UploadId) -> Result<Arc<Upload>, RelayError> {
        let found = self.table().get(&id).filter(|upload| upload.name == *name).cloned();
        let upload = found.ok_or_else(|| RelayError::UploadGone(name.to_string()))?;
        upload.touch(None);
        Ok(upload)
    }

    pub(super) async fn begin(
        &self,
        store: &dyn ObjectStore,
        name: &Name,
        id: UploadId,
    ) -> Result<(), RelayError> {
        let upload = {
            let mut table = self.table();
            if let Some(known) = table.get(&id) {
                if known.name != *name {
                    return Err(RelayError::BadRequest("the upload is one of another object"));
                }
                known.clone()
            } else {
                let open = table.values().filter(|upload| !upload.seen().1).count();
                if open >= UPLOADS_MAX {
                    return Err(RelayError::Busy("too many uploads of one relay"));
                }
                // Complete ones are remembered for who asks twice; the oldest of too many is least likely to be asked for.
                if table.len() >= 4 * UPLOADS_MAX {
                    let complete = table.iter().filter(|(_, upload)| upload.seen().1);
                    let oldest = complete.min_by_key(|(_, upload)| upload.seen().0).map(|(id, _)| *id);
                    oldest.and_then(|id| table.remove(&id));
                }
                let upload = Arc::new(Upload {
                    name: name.clone(),
                    seen: Mutex::new((Instant::now(), false)),
                    work: tokio::sync::Mutex::default(),
                });
                table.insert(id, upload.clone());
                upload
            }
        };
        let mut work = upload.work.lock().await;
        match work.state {
            State::NotBegun => match store.put_multipart_opts(&name.path(), Default::default()).await {
                Ok(begun) => {
                    work.state = State::Open(begun);
                    Ok(())
                }
                Err(error) => {
                    work.state = State::Gone;
                    self.table().remove(&id);
                    Err(RelayError::Store(error.to_string()))
                }
            },
            State::Open(_) | State::Complete => Ok(()),
            State::Gone => Err(RelayError::UploadGone(name.to_string())),
        }
    }

    pub(super) async fn part(
        &self,
        name: &Name,
        id: UploadId,
        part: u64,
        payload: PutPayload,
        crc: u32,
    ) -> Result<(), RelayError> {
        let upload = self.find(name, id)?;
        let mut work = upload.work.lock().await;
        let this = (payload.content_length() as u64, crc);
        let Work { state: State::Open(open), parts, bytes, last } = &mut *work else {
            return Err(RelayError::UploadGone(name.to_string()));
        };
        if part + 1 == *parts && *last == Some(this) {
            return Ok(());
        }
        if part != *parts || part >= PARTS_MAX {
            return Err(RelayError::OutOfTurn("it is not the next one"));
        }
        match open.put_part(payload).await {
            Ok(()) => {
                (*parts, *bytes, *last) = (*parts + 1, *bytes + this.0, Some(this));
                upload.touch(None);
                Ok(())
            }
            Err(error) => {
                // Whether the store has counted it is not known.
                if let State::Open(mut open) = std::mem::replace(&mut work.state, State::Gone) {
                    let _ = open.abort().await;
                }
                drop(work);
                self.table().remove(&id);
                Err(RelayError::Store(error.to_string()))
            }
        }
    }

    pub(super) async fn complete(
        &self,
        name: &Name,
        id: UploadId,
        parts: u64,
        bytes: u64,
    ) -> Result<(), RelayError> {
        let upload = self.find(name, id)?;
        let mut work = upload.work.lock().await;
        if (work.parts, work.bytes) != (parts, bytes) {
            return Err(RelayError::OutOfTurn("others have come than are to be completed"));
        }
        match &mut work.state {
            State::Complete => return Ok(()),
            State::NotBegun | State::Gone => return Err(RelayError::UploadGone(name.to_string())),
            State::Open(open) => {
                if let Err(error) = open.complete().await {
                    // Asked again, it would not be known whether it is there after all.
                    work.state = State::Gone;
                    self.table().remove(&id);
                    return Err(RelayError::Store(error.to_string()));
                }
            }
        }
        work.state = State::Complete;
        upload.touch(Some(true));
        Ok(())
    }

    /// Waits for what is being done with it.
    pub(super) async fn abort(&self, name: &Name, id: UploadId) -> Result<(), RelayError> {
        let Ok(upload) = self.find(name, id) else { return Ok(()) };
        self.table().remove(&id);
        upload.give_up().await
    }

    pub(super) fn give_up_idle(&self) {
        let mut idle = Vec::new();
        self.table().retain(|_, upload| {
            let (seen, complete) = upload.seen();
            let keep = seen.elapsed() < if complete { COMPLETED_MAX } else { UPLOAD_IDLE_MAX };
            if !keep {
                idle.push(upload.clone());
            }
            keep
        });
        for upload in idle {
            tokio::spawn(async move {
                // What cannot be given up is left to the store's own rules.
                let _ = upload.give_up().await;
            });
        }
    }
}

impl Upload {
    fn seen(&self) -> (Instant, bool) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self, complete: Option<bool>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = (Instant::now(), complete.unwrap_or(seen.1));
    }

    async fn give_up(&self) -> Result<(), RelayError> {
        match std::mem::replace(&mut self.work.lock().await.state, State::Gone) {
            State::Open(mut open) => open.abort().await.map_err(|error| RelayError::Store(error.to_string())),
            _ => Ok(()),
        }
    }
}
