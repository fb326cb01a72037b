//! The client as an object store.

use super::{Client, content, upload};
use crate::{Name, RelayError, Request, page::Page};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream, stream::BoxStream};
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result, path::Path,
};
use std::fmt;

/// Deletes at once.
const DELETES: usize = 8;

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the collector at {}:{}", self.0.address.host, self.0.address.port)
    }
}

fn named(path: &Path) -> Result<Name> {
    Name::try_from(path).map_err(|error| Error::Generic { store: "relay", source: error.into() })
}

fn not_implemented(operation: &str) -> Error {
    Error::NotImplemented { operation: operation.to_owned(), implementer: "a relay".to_owned() }
}

pub(super) fn put_result() -> PutResult {
    PutResult { e_tag: None, version: None, extensions: object_store::Extensions::new() }
}

impl Client {
    /// One page, and where the next one begins.
    async fn page(
        &self,
        prefix: Option<&Name>,
        after: Option<Name>,
        folders: bool,
    ) -> Result<(Page, Option<Name>)> {
        let request = Request::List { prefix: prefix.cloned(), after, folders };
        let failed = |error: RelayError| Error::Generic { store: "relay", source: error.into() };
        let answer = self.tell(&request, Bytes::new()).await.map_err(failed)?;
        let bad = || failed(RelayError::BadAnswer("a page of a listing"));
        let page: Page = serde_json::from_slice(&answer).map_err(|_| bad())?;
        let Request::List { after, .. } = &request else { return Err(bad()) };
        let last: Option<Name> = page.last().map(str::parse).transpose().map_err(failed)?;
        // Or it would never end.
        if page.more && last.as_ref() <= after.as_ref() {
            return Err(bad());
        }
        let next = last.filter(|_| page.more);
        Ok((page, next))
    }

    fn listed(&self, prefix: Option<&Path>, after: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let name = |path: Option<&Path>| path.filter(|path| !path.as_ref().is_empty()).map(named).transpose();
        let (prefix, after) = match (name(prefix), name(after)) {
            (Ok(prefix), Ok(after)) => (prefix, after),
            (Err(error), _) | (_, Err(error)) => return stream::once(async { Err(error) }).boxed(),
        };
        let pages = stream::try_unfold(
            (self.clone(), prefix, after, false),
            |(client, prefix, after, done)| async move {
                if done {
                    return Ok(None);
                }
                let (page, next) = client.page(prefix.as_ref(), after, false).await?;
                let done = next.is_none();
                let entries = page.objects.into_iter().map(|entry| {
                    entry.meta().map_err(|error| Error::Generic { store: "relay", source: error.into() })
                });
                Ok::<_, Error>(Some((stream::iter(entries), (client, prefix, next, done))))
            },
        );
        pages.try_flatten().boxed()
    }
}

#[async_trait]
impl ObjectStore for Client {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let name = named(path)?;
        let create = match options.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => return Err(not_implemented("a conditional update")),
        };
        let request = Request::Put { name: name.clone(), create };
        self.tell(&request, payload.into()).await.map_err(|error| error.of_store(&name))?;
        Ok(put_result())
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        upload::begin(self, named(path)?).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let name = named(path)?;
        let conditional = options.if_match.is_some()
            || options.if_none_match.is_some()
            || options.if_modified_since.is_some()
            || options.if_unmodified_since.is_some()
            || options.version.is_some();
        if conditional {
            return Err(not_implemented("a conditional get"));
        }
        if matches!(&options.range, Some(GetRange::Bounded(range)) if range.is_empty()) {
            return Err(RelayError::Range(name.to_string()).of_store(&name));
        }
        let request = match options.head {
            true => Request::Head { name: name.clone() },
            false => Request::Get { name: name.clone(), range: options.range },
        };
        let got = async {
            let open = self.ask(&request, &Bytes::new()).await?;
            let (meta, start) = content::described(&open.response, &name)?;
            if options.head {
                open.whole().await?;
                return Ok((meta, 0..0, None));
            }
            let bytes = hyper::body::Body::size_hint(open.response.body()).exact();
            let end = bytes.and_then(|bytes| start.checked_add(bytes)).filter(|end| *end <= meta.size);
            let end = end.ok_or(RelayError::BadAnswer("the length of a content"))?;
            Ok((meta, start..end, Some(open)))
        };
        let (meta, range, open) = got.await.map_err(|error: RelayError| error.of_store(&name))?;
        let content = match open {
            Some(open) => content::stream(self.clone(), name, range.clone(), open).boxed(),
            None => stream::empty().boxed(),
        };
        Ok(GetResult {
            payload: GetResultPayload::Stream(content),
            meta,
            range,
            attributes: Attributes::new(),
            extensions: object_store::Extensions::new(),
        })
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let client = self.clone();
        let delete = move |path: Result<Path>| {
            let client = client.clone();
            async move {
                let path = path?;
                let name = named(&path)?;
                let told = client.tell(&Request::Delete { name: name.clone() }, Bytes::new()).await;
                told.map(|_| path).map_err(|error| error.of_store(&name))
            }
        };
        paths.map(delete).buffered(DELETES).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listed(prefix, None)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listed(prefix, Some(offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let prefix = prefix.filter(|path| !path.as_ref().is_empty()).map(named).transpose()?;
        let mut all = ListResult {
            common_prefixes: vec![],
            objects: vec![],
            extensions: object_store::Extensions::new(),
        };
        let mut after = None;
        loop {
            let (page, next) = self.page(prefix.as_ref(), after, true).await?;
            for folder in &page.folders {
                let folder: Name = folder
                    .parse()
                    .map_err(|error: RelayError| Error::Generic { store: "relay", source: error.into() })?;
                all.common_prefixes.push(folder.path());
            }
            for entry in &page.objects {
                let meta = entry.meta();
                all.objects
                    .push(meta.map_err(|error| Error::Generic { store: "relay", source: error.into() })?);
            }
            if next.is_none() {
                return Ok(all);
            }
            after = next;
        }
    }

    async fn copy_opts(&self, _from: &Path, _to: &Path, _options: CopyOptions) -> Result<()> {
        Err(not_implemented("a copy"))
    }
}
