//! An object in parts. The parts go one after another, in the order in which they were put; dropped unfinished, an upload is given up by
//! the other side after a while.

use super::{Client, store::put_result};
use crate::{Name, RelayError, Request, request::UploadId};
use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use highwater_wire::identity::random;
use object_store::{Error, MultipartUpload, PutPayload, PutResult, Result, UploadPart};
use tokio::sync::oneshot;

#[derive(Debug)]
struct Upload {
    client: Client,
    name: Name,
    id: UploadId,
    parts: u64,
    bytes: u64,
    /// When the part before is put.
    before: Option<oneshot::Receiver<()>>,
}

pub(super) async fn begin(client: &Client, name: Name) -> Result<Box<dyn MultipartUpload>> {
    let begun = async {
        let id = UploadId(u128::from_be_bytes(random()?));
        let request = Request::Begin { name: name.clone(), upload: id };
        client.tell(&request, Bytes::new()).await?;
        Ok::<_, RelayError>(id)
    };
    let id = begun.await.map_err(|error| error.of_store(&name))?;
    Ok(Box::new(Upload { client: client.clone(), name, id, parts: 0, bytes: 0, before: None }))
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (done, this) = oneshot::channel();
        let before = self.before.replace(this);
        let (client, name) = (self.client.clone(), self.name.clone());
        let request = Request::Part { name: name.clone(), upload: self.id, part: self.parts };
        self.parts += 1;
        self.bytes += data.content_length() as u64;
        async move {
            if let Some(before) = before {
                let failed = |_| RelayError::OutOfTurn("the part before it failed").of_store(&name);
                before.await.map_err(failed)?;
            }
            client.tell(&request, data.into()).await.map_err(|error| error.of_store(&name))?;
            // Nobody may be waiting.
            let _ = done.send(());
            Ok::<_, Error>(())
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let Self { name, id, parts, bytes, .. } = self;
        let request = Request::Complete { name: name.clone(), upload: *id, parts: *parts, bytes: *bytes };
        self.client.tell(&request, Bytes::new()).await.map_err(|error| error.of_store(&self.name))?;
        Ok(put_result())
    }

    async fn abort(&mut self) -> Result<()> {
        let request = Request::Abort { name: self.name.clone(), upload: self.id };
        self.client.tell(&request, Bytes::new()).await.map_err(|error| error.of_store(&self.name))?;
        Ok(())
    }
}
