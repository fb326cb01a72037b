//! One request, and its answer.

use super::{
    Gate, Relays,
    area::{Area, Taken},
    body::{self, Answer},
};
use crate::{
    Name, RelayError, Request, SMALL_BODY_BYTES_MAX,
    headers::{MODIFIED, SIZE, START},
    page::{Entry, PAGE_MEMORY_BYTES, Page},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue},
};
use object_store::{
    GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use std::{io, sync::Arc};

type Done = Result<Response<Answer>, RelayError>;

/// Never fails: what cannot be answered is refused.
pub(super) async fn answer(
    relays: Arc<Relays>,
    area: Arc<Area>,
    gate: Arc<dyn Gate>,
    request: hyper::Request<Incoming>,
) -> Result<Response<Answer>, std::convert::Infallible> {
    let done = respond(&relays, &area, &*gate, request).await;
    Ok(done.unwrap_or_else(|error| {
        if !matches!(error, RelayError::NotFound(_) | RelayError::Exists(_)) {
            relays.meter.refused(area.relay, &error);
        }
        refuse(&error)
    }))
}

async fn respond(
    relays: &Arc<Relays>,
    area: &Arc<Area>,
    gate: &dyn Gate,
    request: hyper::Request<Incoming>,
) -> Done {
    gate.admits()?;
    let target = request.uri().path_and_query().map_or("", |target| target.as_str());
    if request.uri().authority().is_some() {
        return Err(RelayError::BadRequest("its target is a whole address"));
    }
    let asked = Request::parse(request.method(), target)?;
    relays.meter.request(asked.kind());
    let incoming = request.into_body();
    let length = body::length(&incoming)?;
    if length > 0 && !asked.has_body() {
        return Err(RelayError::BadRequest("it has a body"));
    }
    let bytes_max = if asked == Request::Renew { SMALL_BODY_BYTES_MAX } else { relays.body_bytes_max() };
    if length > bytes_max {
        return Err(RelayError::TooLarge { bytes: length, bytes_max });
    }
    let taken = if asked.has_body() { Some(relays.take(area, length).await?) } else { None };
    let (payload, crc) = body::read(incoming, length, |bytes| relays.meter.received(bytes)).await?;
    match asked {
        Request::Renew => {
            let csr = String::from_utf8(Bytes::from(payload).into())
                .map_err(|_| RelayError::BadRequest("the body"))?;
            Ok(text(gate.renew(&csr).await?))
        }
        Request::Get { name, range } => get(relays, area, name, range).await,
        Request::Head { name } => {
            let meta = area.store.head(&name.path()).await.map_err(|e| of_store(&name, e))?;
            let mut head = empty();
            describe(&mut head, &Entry::from(&meta), 0);
            Ok(head)
        }
        Request::List { prefix, after, folders } => list(relays, area, prefix, after, folders).await,
        changing => change(area, changing, payload, crc, taken).await,
    }
}

/// What changes something is done whether or not its client stays.
async fn change(
    area: &Arc<Area>,
    asked: Request,
    payload: PutPayload,
    crc: u32,
    taken: Option<Taken>,
) -> Done {
    if let Request::Put { name, .. } | Request::Begin { name, .. } = &asked
        && !name.may_be_object()
    {
        return Err(RelayError::Name(name.to_string()));
    }
    let area = area.clone();
    let work = tokio::spawn(async move {
        let _taken = taken;
        let store = &*area.store;
        match asked {
            Request::Put { name, create } => {
                let mode = if create { PutMode::Create } else { PutMode::Overwrite };
                let options = PutOptions { mode, ..PutOptions::default() };
                store.put_opts(&name.path(), payload, options).await.map(drop).map_err(|e| of_store(&name, e))
            }
            Request::Delete { name } => store.delete(&name.path()).await.map_err(|e| of_deletion(&name, e)),
            Request::Begin { name, upload } => area.uploads.begin(store, &name, upload).await,
            Request::Part { name, upload, part } => {
                area.uploads.part(&name, upload, part, payload, crc).await
            }
            Request::Complete { name, upload, parts, bytes } => {
                area.uploads.complete(&name, upload, parts, bytes).await
            }
            Request::Abort { name, upload } => area.uploads.abort(&name, upload).await,
            _ => Err(RelayError::BadRequest("it changes nothing")),
        }
    });
    work.await.map_err(|_| RelayError::Store("its work was ended".to_owned()))??;
    Ok(empty())
}

async fn get(relays: &Arc<Relays>, area: &Area, name: Name, range: Option<GetRange>) -> Done {
    let options = GetOptions { range: range.clone(), ..GetOptions::default() };
    let got = match area.store.get_opts(&name.path(), options).await {
        Ok(got) => got,
        Err(error @ object_store::Error::Generic { .. }) if range.is_some() => {
            // Not each store tells a range that cannot be from a failure.
            let meta = area.store.head(&name.path()).await.map_err(|e| of_store(&name, e))?;
            let from = match range {
                Some(GetRange::Bounded(range)) => range.start,
                Some(GetRange::Offset(from)) => from,
                _ => 0,
            };
            let behind = from >= meta.size;
            return Err(if behind { RelayError::Range(name.to_string()) } else { of_store(&name, error) });
        }
        Err(error) => return Err(of_store(&name, error)),
    };
    let (entry, range) = (Entry::from(&got.meta), got.range.clone());
    let body = content(relays, got);
    let mut response = Response::new(body);
    describe(&mut response, &entry, range.start);
    response.headers_mut().insert(CONTENT_LENGTH, (range.end - range.start).into());
    Ok(response)
}

fn content(relays: &Arc<Relays>, got: GetResult) -> Answer {
    let meter = relays.meter.clone();
    let stream = got.into_stream().map_ok(move |data| {
        meter.sent(data.len() as u64);
        Frame::data(data)
    });
    // An answer that breaks off is seen as such by its length.
    BodyExt::boxed_unsync(StreamBody::new(stream.map_err(io::Error::other)))
}

async fn list(
    relays: &Arc<Relays>,
    area: &Area,
    prefix: Option<Name>,
    after: Option<Name>,
    folders: bool,
) -> Done {
    let _memory = relays.take(area, PAGE_MEMORY_BYTES.min(relays.body_bytes_max())).await?;
    let path = prefix.as_ref().map(Name::path);
    let failed = |e: object_store::Error| RelayError::Store(e.to_string());
    let page = if folders && prefix.as_ref().is_some_and(Name::is_machines) {
        // All are in memory at once: only folders, and each has cost its client objects within.
        let listed = area.store.list_with_delimiter(path.as_ref()).await.map_err(failed)?;
        Page::of_folders(&listed.objects, &listed.common_prefixes, after.as_ref())
    } else if folders {
        let listed = area.store.list(path.as_ref());
        Page::by_folders(listed.boxed(), prefix.as_ref(), after.as_ref()).await.map_err(failed)?
    } else {
        let listed = match &after {
            Some(after) => area.store.list_with_offset(path.as_ref(), &after.path()),
            None => area.store.list(path.as_ref()),
        };
        Page::of(listed.boxed(), after.as_ref()).await.map_err(failed)?
    };
    let text = serde_json::to_vec(&page).map_err(|_| RelayError::Store("a page".to_owned()))?;
    Ok(with_type(full(text), "application/json"))
}

/// What a store does not delete now, because something there protects it, is not tried again by the client for a minute.
fn of_deletion(name: &Name, error: object_store::Error) -> RelayError {
    use object_store::Error::{AlreadyExists, PermissionDenied, Precondition};
    match error {
        PermissionDenied { .. } | Precondition { .. } | AlreadyExists { .. } => {
            RelayError::Kept(name.to_string())
        }
        other => of_store(name, other),
    }
}

fn of_store(name: &Name, error: object_store::Error) -> RelayError {
    match error {
        object_store::Error::NotFound { .. } => RelayError::NotFound(name.to_string()),
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            RelayError::Exists(name.to_string())
        }
        other => RelayError::Store(other.to_string()),
    }
}

fn describe(response: &mut Response<Answer>, entry: &Entry, start: u64) {
    let headers = response.headers_mut();
    headers.insert(SIZE, entry.bytes.into());
    headers.insert(START, start.into());
    headers.insert(MODIFIED, entry.modified_ms.into());
}

fn refuse(error: &RelayError) -> Response<Answer> {
    let body = serde_json::to_vec(&error.refusal()).unwrap_or_default();
    let mut response = with_type(full(body), "application/json");
    *response.status_mut() = error.status();
    response
}

fn text(text: String) -> Response<Answer> {
    with_type(full(text), "text/plain")
}

fn empty() -> Response<Answer> {
    let mut response = full(Vec::new());
    *response.status_mut() = StatusCode::OK;
    response
}

fn full(body: impl Into<Bytes>) -> Response<Answer> {
    Response::new(Full::new(body.into()).map_err(|never| match never {}).boxed_unsync())
}

fn with_type(mut response: Response<Answer>, content_type: &'static str) -> Response<Answer> {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
