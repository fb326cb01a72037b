//! Buckets with Object Lock, over those of a directory. As with Amazon, a deletion only hides what is locked, so that whoever may undo
//! deletions gets it back; what is not locked is gone, as if all its versions were deleted too.

use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
    CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput,
    DeleteObjectInput, DeleteObjectOutput, GetObjectInput, GetObjectLockConfigurationInput,
    GetObjectLockConfigurationOutput, GetObjectOutput, GetObjectRetentionInput, GetObjectRetentionOutput,
    HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, ObjectLockConfiguration,
    ObjectLockEnabled, ObjectLockRetention, PutObjectInput, PutObjectOutput, PutObjectRetentionInput,
    PutObjectRetentionOutput, Timestamp, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use std::{fs, io};

/// The folder of what is hidden, beside the buckets.
const HIDDEN: &str = ".hidden";

/// Which objects are locked: by bucket and name.
#[derive(Clone, Debug, Default)]
pub struct Locks(Arc<Mutex<HashMap<PathBuf, ObjectLockRetention>>>);

impl Locks {
    fn all(&self) -> MutexGuard<'_, HashMap<PathBuf, ObjectLockRetention>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn of(&self, object: &Path) -> Option<ObjectLockRetention> {
        self.all().get(object).filter(|lock| lock.retain_until_date > Some(now())).cloned()
    }
    /// So many objects are locked now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all().len()
    }
    /// Locks those of which there is a lock for so much longer, as a bucket's own rule might.
    pub fn prolong(&self, by: Duration) {
        for lock in self.all().values_mut() {
            lock.retain_until_date = Some((SystemTime::now() + by).into());
        }
    }
}

fn now() -> Timestamp {
    SystemTime::now().into()
}

/// See the module.
pub(super) struct Locking {
    pub(super) files: FileSystem,
    pub(super) root: PathBuf,
    pub(super) locks: Locks,
}

/// Undoes all deletions.
pub(super) fn undelete(root: &Path) -> io::Result<()> {
    let hidden = root.join(HIDDEN);
    let mut dirs = vec![hidden.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let Ok(name) = path.strip_prefix(&hidden) else { continue };
            if path.is_dir() {
                dirs.push(path);
            } else {
                move_to(&path, &root.join(name))?;
            }
        }
    }
    Ok(())
}

fn move_to(from: &Path, to: &Path) -> io::Result<()> {
    to.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::rename(from, to)
}

#[async_trait::async_trait]
impl S3 for Locking {
    async fn get_object_lock_configuration(
        &self,
        _: S3Request<GetObjectLockConfigurationInput>,
    ) -> S3Result<S3Response<GetObjectLockConfigurationOutput>> {
        let enabled = Some(ObjectLockEnabled::from_static(ObjectLockEnabled::ENABLED));
        let configuration = ObjectLockConfiguration { object_lock_enabled: enabled, rule: None };
        let told = GetObjectLockConfigurationOutput { object_lock_configuration: Some(configuration) };
        Ok(S3Response::new(told))
    }

    async fn put_object_retention(
        &self,
        asked: S3Request<PutObjectRetentionInput>,
    ) -> S3Result<S3Response<PutObjectRetentionOutput>> {
        let object = Path::new(&asked.input.bucket).join(&asked.input.key);
        if !self.root.join(&object).is_file() {
            return Err(s3_error!(NoSuchKey));
        }
        let Some(wanted) = asked.input.retention.filter(|lock| lock.retain_until_date > Some(now())) else {
            return Err(s3_error!(InvalidRequest, "the date must be in the future"));
        };
        if self.locks.of(&object).is_some_and(|known| known.retain_until_date > wanted.retain_until_date) {
            return Err(s3_error!(AccessDenied, "a lock cannot be shortened"));
        }
        self.locks.all().insert(object, wanted);
        Ok(S3Response::new(PutObjectRetentionOutput::default()))
    }

    async fn get_object_retention(
        &self,
        asked: S3Request<GetObjectRetentionInput>,
    ) -> S3Result<S3Response<GetObjectRetentionOutput>> {
        let object = Path::new(&asked.input.bucket).join(&asked.input.key);
        match self.locks.of(&object) {
            Some(lock) => Ok(S3Response::new(GetObjectRetentionOutput { retention: Some(lock) })),
            None => Err(s3_error!(NoSuchObjectLockConfiguration)),
        }
    }

    async fn delete_object(
        &self,
        asked: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let object = Path::new(&asked.input.bucket).join(&asked.input.key);
        let path = self.root.join(&object);
        if self.locks.of(&object).is_some() && path.is_file() {
            move_to(&path, &self.root.join(HIDDEN).join(&object)).map_err(|e| s3_error!(e, InternalError))?;
            return Ok(S3Response::new(DeleteObjectOutput::default()));
        }
        self.files.delete_object(asked).await
    }

    async fn get_object(&self, asked: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        self.files.get_object(asked).await
    }
    async fn head_object(&self, asked: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        self.files.head_object(asked).await
    }
    async fn put_object(&self, asked: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        self.files.put_object(asked).await
    }
    async fn list_objects_v2(
        &self,
        asked: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        self.files.list_objects_v2(asked).await
    }
    async fn create_multipart_upload(
        &self,
        asked: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.files.create_multipart_upload(asked).await
    }
    async fn upload_part(&self, asked: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.files.upload_part(asked).await
    }
    async fn complete_multipart_upload(
        &self,
        asked: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.files.complete_multipart_upload(asked).await
    }
    async fn abort_multipart_upload(
        &self,
        asked: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.files.abort_multipart_upload(asked).await
    }
}
