//! Amazon's Object Lock: an object that is retained cannot be deleted before a date, whoever has this store's credentials. In a bucket with
//! versions, as Amazon wants them for that, a deletion only hides it.
//!
//! The store's library knows nothing of it; its signed addresses are used, which need no credentials here.
//! Source: Amazon S3 API, `PutObjectRetention`, `GetObjectRetention` and `GetObjectLockConfiguration`.

use crate::{Result, VaultError, location::LockMode};
use async_trait::async_trait;
use aws_lc_rs::digest;
use base64::{Engine, prelude::BASE64_STANDARD};
use futures::StreamExt;
use http::{HeaderName, Method, StatusCode};
use object_store::{
    ClientOptions, HeaderValue,
    aws::AmazonS3,
    client::{HttpClient, HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector},
    path::Path,
    signer::{SignedUrlOptions, Signer},
};
use std::{fmt::Debug, time::Duration};

/// A signed address is used at once.
const SIGNED_FOR: Duration = Duration::from_secs(300);
/// Tries of a request that failed, or that the server was too busy for.
const TRIES: u32 = 6;
/// Before the second, and twice as long before each further one.
const PAUSE: Duration = Duration::from_millis(200);
/// Of an answer, no more is read.
const ANSWER_BYTES_MAX: usize = 64 << 10;
const CHECKSUM: HeaderName = HeaderName::from_static("x-amz-checksum-sha256");

/// Keeps objects from being deleted.
#[async_trait]
pub(crate) trait ObjectLock: Debug + Send + Sync {
    /// Sees whether the store can.
    ///
    /// # Errors
    /// [`VaultError::NoObjectLock`].
    async fn check(&self) -> Result<()>;

    /// Keeps an object until a moment, in milliseconds since 1970, or longer, if it is kept for longer already.
    ///
    /// # Errors
    /// [`VaultError::Missing`]; [`VaultError::NoObjectLock`]: it is refused.
    async fn retain(&self, path: &Path, until_ms: u64) -> Result<()>;
}

/// See the module.
#[derive(Debug)]
pub(super) struct S3Lock {
    store: AmazonS3,
    http: HttpClient,
    /// What all names begin with.
    prefix: Path,
    mode: LockMode,
}

impl S3Lock {
    pub(super) fn new(
        store: AmazonS3,
        options: &ClientOptions,
        prefix: Path,
        mode: LockMode,
    ) -> object_store::Result<Self> {
        let http = ReqwestConnector::default().connect(options)?;
        Ok(Self { store, http, prefix, mode })
    }

    fn whole(&self, path: &Path) -> Path {
        self.prefix.parts().chain(path.parts()).collect()
    }

    /// Asks once: status and the beginning of the answer.
    async fn ask(
        &self,
        method: &Method,
        path: &Path,
        what: &str,
        body: &str,
    ) -> Result<(StatusCode, String)> {
        let failed = |e: Box<dyn std::error::Error + Send + Sync>| {
            VaultError::Store(object_store::Error::Generic { store: "S3", source: e })
        };
        let mut options = SignedUrlOptions::default().with_query([(what, "")]);
        let sum = BASE64_STANDARD.encode(digest::digest(&digest::SHA256, body.as_bytes()));
        let sum = HeaderValue::from_str(&sum).map_err(|e| failed(e.into()))?;
        if !body.is_empty() {
            options = options.with_signed_header(CHECKSUM, sum.clone());
        }
        let address = self.store.signed_url_opts(method.clone(), path, SIGNED_FOR, &options).await?;
        let mut request = HttpRequest::new(HttpRequestBody::from(body.to_owned()));
        *request.method_mut() = method.clone();
        *request.uri_mut() = address.as_str().parse().map_err(|e: http::uri::InvalidUri| failed(e.into()))?;
        if !body.is_empty() {
            request.headers_mut().insert(CHECKSUM, sum);
        }
        let answer = self.http.execute(request).await.map_err(|e| failed(e.into()))?;
        let status = answer.status();
        let (mut text, mut parts) = (Vec::new(), answer.into_body().bytes_stream());
        while let Some(part) = parts.next().await {
            text.extend_from_slice(&part.map_err(|e| failed(e.into()))?);
            if text.len() > ANSWER_BYTES_MAX {
                return Err(failed("an answer is too long".into()));
            }
        }
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }

    /// Asks until there is an answer, or it was tried for long enough.
    async fn asked(
        &self,
        method: Method,
        path: &Path,
        what: &str,
        body: &str,
    ) -> Result<(StatusCode, String)> {
        let (mut pause, mut tried) = (PAUSE, 0);
        loop {
            tried += 1;
            match self.ask(&method, path, what, body).await {
                Ok((status, _)) if is_passing(status) && tried < TRIES => {}
                Ok((status, text)) if is_passing(status) => {
                    let source = format!("{status}: {}", cause(&text)).into();
                    return Err(VaultError::Store(object_store::Error::Generic { store: "S3", source }));
                }
                Err(VaultError::Store(_)) if tried < TRIES => {}
                answered => return answered,
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    /// Until when an object is retained, in milliseconds since 1970.
    async fn retained_until_ms(&self, path: &Path) -> Result<Option<u64>> {
        let (status, text) = self.asked(Method::GET, path, "retention", "").await?;
        let until = element(&text, "RetainUntilDate").filter(|_| status.is_success());
        let parsed = until.and_then(|until| chrono::DateTime::parse_from_rfc3339(until).ok());
        Ok(parsed.and_then(|until| u64::try_from(until.timestamp_millis()).ok()))
    }
}

#[async_trait]
impl ObjectLock for S3Lock {
    async fn check(&self) -> Result<()> {
        let (status, text) = self.asked(Method::GET, &Path::default(), "object-lock", "").await?;
        match status.is_success() && element(&text, "ObjectLockEnabled") == Some("Enabled") {
            true => Ok(()),
            false => Err(VaultError::NoObjectLock(cause(&text))),
        }
    }

    async fn retain(&self, path: &Path, until_ms: u64) -> Result<()> {
        let whole = self.whole(path);
        let (mode, until) = (self.mode.text().to_uppercase(), date(until_ms));
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>"
        );
        let (status, text) = self.asked(Method::PUT, &whole, "retention", &body).await?;
        if status.is_success() {
            return Ok(());
        }
        if status == StatusCode::NOT_FOUND {
            return Err(VaultError::Missing { object: path.to_string() });
        }
        // A lock cannot be shortened, or weakened: by the bucket's default it may last longer.
        match self.retained_until_ms(&whole).await? {
            Some(known) if known >= until_ms / 1000 * 1000 => Ok(()),
            _ => Err(VaultError::NoObjectLock(format!("{path}: {}", cause(&text)))),
        }
    }
}

/// Whether it may succeed later.
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
        || status == StatusCode::TOO_MANY_REQUESTS
}

/// The text of the first element of a name.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let from = xml.find(&format!("<{name}>"))? + name.len() + 2;
    let len = xml[from..].find(&format!("</{name}>"))?;
    Some(xml[from..from + len].trim())
}

/// What a server says is wrong, without what could steer a terminal.
fn cause(xml: &str) -> String {
    let said = element(xml, "Message").or_else(|| element(xml, "Code")).unwrap_or("it does not say why");
    said.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn date(ms: u64) -> String {
    let date = i64::try_from(ms).ok().and_then(chrono::DateTime::from_timestamp_millis);
    date.unwrap_or(chrono::DateTime::<chrono::Utc>::MAX_UTC).format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_dates_written() {
        let xml = "<?xml version=\"1.0\"?><Retention><Mode>GOVERNANCE</Mode><RetainUntilDate>2026-12-01T00:00:00Z</RetainUntilDate></Retention>";
        assert_eq!(element(xml, "RetainUntilDate"), Some("2026-12-01T00:00:00Z"));
        assert_eq!((element(xml, "Message"), element("<Message>", "Message")), (None, None));
        assert_eq!(cause("<Error><Code>X</Code><Message>no\x1b[2J lock</Message></Error>"), "no[2J lock");
        assert_eq!(date(1_796_083_200_999), "2026-12-01T00:00:00Z");
        assert!(is_passing(StatusCode::SERVICE_UNAVAILABLE) && !is_passing(StatusCode::NOT_IMPLEMENTED));
    }
}
