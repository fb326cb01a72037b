//! A store whose answers are as long as they say. What comes short is the store's failure, known and worth another try; without
//! this it would be taken for damage of the object, and where several ranges are read at once, cut where there is nothing.

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream, stream::BoxStream};
use object_store::{path::Path, *};
use std::{fmt, ops::Range, sync::Arc};

#[derive(Debug)]
pub(super) struct Exact(pub(super) Arc<dyn ObjectStore>);

impl fmt::Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Exact {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let only_head = options.head;
        let mut got = self.0.get_opts(path, options).await?;
        if !only_head && let GetResultPayload::Stream(bytes) = got.payload {
            let expected = got.range.end.saturating_sub(got.range.start);
            got.payload = GetResultPayload::Stream(counted(bytes, expected, path.clone()));
        }
        Ok(got)
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let fetch = |range: Range<u64>| async move {
            let expected = range.end.saturating_sub(range.start);
            let bytes = self.get_range(path, range).await?;
            if bytes.len() as u64 == expected {
                return Ok(bytes);
            }
            // An object that was cut off: the pieces would be cut out of what is not there.
            let source = format!("{path} ends within a range that was asked for").into();
            Err(Error::Generic { store: "store", source })
        };
        coalesce_ranges(ranges, fetch, OBJECT_STORE_COALESCE_DEFAULT).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

/// The same bytes, and an error behind them if they are not as many.
fn counted(
    bytes: BoxStream<'static, Result<Bytes>>,
    expected: u64,
    path: Path,
) -> BoxStream<'static, Result<Bytes>> {
    let counted = stream::unfold(Some((bytes, 0)), move |state| {
        let path = path.clone();
        async move {
            let (mut bytes, mut count) = state?;
            match bytes.next().await {
                Some(Ok(part)) => {
                    count += part.len() as u64;
                    Some((Ok(part), Some((bytes, count))))
                }
                Some(Err(error)) => Some((Err(error), None)),
                None if count != expected => {
                    let source = format!("{count} of {expected} bytes of {path} came");
                    Some((Err(Error::Generic { store: "store", source: source.into() }), None))
                }
                None => None,
            }
        }
    });
    counted.boxed()
}
