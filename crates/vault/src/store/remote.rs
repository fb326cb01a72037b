//! Buckets of object stores, by their locations. Credentials come from where each provider's own tools look for them:
//!
//! - Amazon: `AWS_…` in the environment; else the section `profile` (or `AWS_PROFILE`, or `default`) of
//!   `~/.aws/credentials` and `~/.aws/config`; else the role of the machine or container.
//! - Azure: `AZURE_STORAGE_…` and `AZURE_…` in the environment; else the machine's identity.
//! - Google: `GOOGLE_…` in the environment, the file named by `GOOGLE_APPLICATION_CREDENTIALS`, the one that `gcloud` left; else
//!   the machine's identity.
//!
//! A request that fails is tried again with a growing pause, for [`RETRY_MAX`] at most; then it is the caller's.

use super::{
    object_lock::{ObjectLock, S3Lock},
    profile,
};
use crate::{
    Result, VaultError,
    location::{Bucket, Provider},
};
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    path::Path,
    prefix::PrefixStore,
};
use std::{sync::Arc, time::Duration};

/// So long is a request tried again.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A request as a whole: a part of 5 MiB passes at 45 KiB/s.
const REQUEST_MAX: Duration = Duration::from_secs(120);

/// A bucket, and what locks its objects, if that is wanted.
type Opened = (Arc<dyn ObjectStore>, Option<Arc<dyn ObjectLock>>);

/// Opens a bucket, and with it what locks its objects, if that is wanted. Nothing is asked of it yet.
pub(super) fn open(bucket: &Bucket) -> Result<Opened> {
    let refuse =
        |e: object_store::Error| VaultError::Location { location: bucket.to_string(), cause: e.to_string() };
    let plain = bucket.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let client = ClientOptions::new()
        .with_allow_http(plain)
        .with_connect_timeout(CONNECT_MAX)
        .with_timeout(REQUEST_MAX);
    // Time is the limit, not a number: refused connections use a number up within seconds.
    let backoff = BackoffConfig { max_backoff: PAUSE_MAX, ..BackoffConfig::default() };
    let retry = RetryConfig { backoff, max_retries: usize::MAX, retry_timeout: RETRY_MAX };
    let prefix = Path::parse(&bucket.prefix).map_err(|e| refuse(e.into()))?;
    let objects = match bucket.provider {
        Provider::S3 => {
            let builder = amazon(bucket)?.with_client_options(client.clone()).with_retry(retry);
            let store = builder.build().map_err(refuse)?;
            let lock = bucket.lock.map(|mode| S3Lock::new(store.clone(), &client, prefix.clone(), mode));
            let lock = lock.transpose().map_err(refuse)?;
            let lock = lock.map(|lock| -> Arc<dyn ObjectLock> { Arc::new(lock) });
            return Ok((within(store, prefix), lock));
        }
        Provider::Azure => within(
            azure(bucket).with_client_options(client).with_retry(retry).build().map_err(refuse)?,
            prefix,
        ),
        Provider::Google => within(
            google(bucket).with_client_options(client).with_retry(retry).build().map_err(refuse)?,
            prefix,
        ),
    };
    Ok((objects, None))
}

pub(super) fn within(store: impl ObjectStore, prefix: Path) -> Arc<dyn ObjectStore> {
    if prefix.as_ref().is_empty() { Arc::new(store) } else { Arc::new(PrefixStore::new(store, prefix)) }
}

fn amazon(bucket: &Bucket) -> Result<AmazonS3Builder> {
    // One at a time: what a bulk deletion refuses is told in words only, and some S3 servers have none.
    let mut builder =
        AmazonS3Builder::from_env().with_bucket_name(&bucket.name).with_disable_bulk_delete(true);
    let from_environment =
        |keys: &[AmazonS3ConfigKey]| keys.iter().any(|key| builder.get_config_value(key).is_some());
    let keys_known = from_environment(&[AmazonS3ConfigKey::AccessKeyId]);
    let region_known = from_environment(&[AmazonS3ConfigKey::Region, AmazonS3ConfigKey::DefaultRegion]);
    let endpoint_known = from_environment(&[AmazonS3ConfigKey::Endpoint, AmazonS3ConfigKey::S3Endpoint]);
    let profile = profile::load(bucket.profile.as_deref())?;
    // Who names a profile means its keys, whatever the environment holds.
    if let Some(keys) = profile.keys.as_ref().filter(|_| bucket.profile.is_some() || !keys_known) {
        // As a whole: a token of the environment does not belong to these keys.
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(AwsCredential {
            key_id: keys.id.clone(),
            secret_key: keys.secret.to_string(),
            token: keys.session_token.as_ref().map(|token| token.to_string()),
        })));
    }
    if let Some(region) = bucket.region.as_ref().or(profile.region.as_ref().filter(|_| !region_known)) {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = bucket.endpoint.as_ref().or(profile.endpoint.as_ref().filter(|_| !endpoint_known))
    {
        builder = builder.with_endpoint(endpoint);
    }
    Ok(builder)
}

fn azure(bucket: &Bucket) -> MicrosoftAzureBuilder {
    let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(&bucket.name);
    if let Some(account) = &bucket.account {
        builder = builder.with_account(account);
    }
    match &bucket.endpoint {
        Some(endpoint) => builder.with_endpoint(endpoint.clone()),
        None => builder,
    }
}

fn google(bucket: &Bucket) -> GoogleCloudStorageBuilder {
    let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&bucket.name);
    match &bucket.endpoint {
        Some(endpoint) => builder.with_base_url(endpoint),
        None => builder,
    }
}
