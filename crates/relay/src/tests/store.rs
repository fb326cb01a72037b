//! What a store must do, over a relay.

use super::support::Site;
use crate::{Request, request::UploadId, server::UPLOADS_MAX};
use futures::TryStreamExt;
use object_store::{
    Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, path::Path,
};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

fn create() -> PutOptions {
    PutOptions { mode: PutMode::Create, ..PutOptions::default() }
}

#[tokio::test]
async fn objects_are_put_read_listed_and_deleted() {
    let site = Site::new().await;
    let (relay, client) = site.relay(HOUR);
    let path = Path::from("machines/m/manifest/1");
    client.put_opts(&path, "first".into(), create()).await.unwrap();
    let again = client.put_opts(&path, "second".into(), create()).await.unwrap_err();
    assert!(matches!(again, Error::AlreadyExists { .. }), "{again:?}");
    assert_eq!(client.get(&path).await.unwrap().bytes().await.unwrap(), "first");
    // Where it lies.
    let there = Path::from(format!("relays/{relay}/machines/m/manifest/1"));
    assert_eq!(site.store.get(&there).await.unwrap().bytes().await.unwrap(), "first");

    client.put(&path, "0123456789".into()).await.unwrap();
    let meta = client.head(&path).await.unwrap();
    assert_eq!((meta.size, &meta.location), (10, &path));
    assert_eq!(client.get_range(&path, 3..7).await.unwrap(), "3456");
    assert_eq!(client.get_range(&path, 7..70).await.unwrap(), "789");
    for (range, expected) in [(GetRange::Offset(8), "89"), (GetRange::Suffix(3), "789")] {
        let got = client.get_opts(&path, GetOptions::default().with_range(Some(range))).await.unwrap();
        assert_eq!((got.meta.size, got.bytes().await.unwrap()), (10, expected.into()));
    }
    let behind = client.get_range(&path, 10..12).await.unwrap_err();
    assert!(behind.to_string().contains("behind the end"), "{behind}");
    assert!(client.get_range(&path, 3..3).await.is_err());
    client.put(&Path::from("empty"), PutPayload::default()).await.unwrap();
    assert_eq!(client.get(&Path::from("empty")).await.unwrap().bytes().await.unwrap().len(), 0);

    for missing in
        [client.get(&Path::from("no")).await.map(drop), client.head(&Path::from("no")).await.map(drop)]
    {
        assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    }
    client.delete(&path).await.unwrap();
    assert!(matches!(client.get(&path).await, Err(Error::NotFound { .. })));
    // What the other side cannot keep under its name is not sent.
    assert!(client.put(&Path::from("a b"), "x".into()).await.is_err());
}

#[tokio::test]
async fn listings_are_whole_and_sorted() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    let (_, other) = site.relay(HOUR);
    other.put(&Path::from("a/theirs"), "x".into()).await.unwrap();
    for name in ["a/3", "a/1", "a/2", "b/c/1", "b/d", "top"] {
        client.put(&Path::from(name), name.into()).await.unwrap();
    }
    let names = async |prefix: Option<&str>, after: Option<&str>| -> Vec<String> {
        let (prefix, after) = (prefix.map(Path::from), after.map(Path::from));
        let listed = match &after {
            Some(after) => client.list_with_offset(prefix.as_ref(), after),
            None => client.list(prefix.as_ref()),
        };
        listed.map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap()
    };
    assert_eq!(names(None, None).await, ["a/1", "a/2", "a/3", "b/c/1", "b/d", "top"]);
    assert_eq!(names(Some("a"), None).await, ["a/1", "a/2", "a/3"]);
    assert_eq!(names(Some("a"), Some("a/1")).await, ["a/2", "a/3"]);
    assert!(names(Some("no"), None).await.is_empty());
    let folders = client.list_with_delimiter(Some(&Path::from("b"))).await.unwrap();
    assert_eq!(folders.common_prefixes, [Path::from("b/c")]);
    assert_eq!(folders.objects[0].location, Path::from("b/d"));
    assert_eq!(client.list_with_delimiter(None).await.unwrap().common_prefixes.len(), 2);
    // More than a page.
    for n in 0..crate::page::PAGE_NAMES_MAX + 10 {
        let path = Path::from(format!("{}many/{n:05}", client_prefix(&site, &client).await));
        site.store.put(&path, "x".into()).await.unwrap();
    }
    assert_eq!(names(Some("many"), None).await.len(), crate::page::PAGE_NAMES_MAX + 10);
    let folders = client.list_with_delimiter(Some(&Path::from("many"))).await.unwrap();
    assert_eq!(folders.objects.len(), crate::page::PAGE_NAMES_MAX + 10);
}

/// Where the objects of a relay lie, found by one that only it has.
async fn client_prefix(site: &Site, client: &crate::Client) -> String {
    client.put(&Path::from("own"), "x".into()).await.unwrap();
    let all: Vec<_> = site.store.list(None).try_collect().await.unwrap();
    let own = all.iter().find(|meta| meta.location.filename() == Some("own")).unwrap();
    own.location.as_ref().strip_suffix("own").unwrap().to_owned()
}

#[tokio::test]
async fn uploads_are_whole_or_nothing() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    let path = Path::from("machines/m/segments/s.seg");
    let part = |n: u8| vec![n; 300_000];
    let mut upload = client.put_multipart(&path).await.unwrap();
    // Put at once, in whatever order they are waited for.
    let (one, two) = (upload.put_part(part(1).into()), upload.put_part(part(2).into()));
    let (two, one) = tokio::join!(two, one);
    one.and(two).unwrap();
    assert!(matches!(client.head(&path).await, Err(Error::NotFound { .. })));
    upload.put_part(part(3).into()).await.unwrap();
    upload.complete().await.unwrap();
    let whole = client.get(&path).await.unwrap().bytes().await.unwrap();
    assert!(whole == [part(1), part(2), part(3)].concat());

    let path = Path::from("machines/m/segments/t.seg");
    let mut upload = client.put_multipart(&path).await.unwrap();
    upload.put_part(part(1).into()).await.unwrap();
    upload.abort().await.unwrap();
    assert!(upload.complete().await.unwrap_err().to_string().contains("not known"));
    assert!(matches!(client.head(&path).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn requests_of_an_upload_may_be_repeated() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    let name: crate::Name = "a/b".parse().unwrap();
    let upload = UploadId(7);
    let tell =
        async |request: Request, body: &'static str| client.tell(&request, body.into()).await.map(drop);
    let begin = || Request::Begin { name: name.clone(), upload };
    let part = |part| Request::Part { name: name.clone(), upload, part };
    let complete = |parts, bytes| Request::Complete { name: name.clone(), upload, parts, bytes };
    tell(begin(), "").await.unwrap();
    tell(begin(), "").await.unwrap();
    tell(part(0), "one ").await.unwrap();
    tell(part(0), "one ").await.unwrap();
    assert!(tell(part(0), "eno ").await.is_err(), "another part of the same number");
    assert!(tell(part(2), "three").await.is_err(), "one is left out");
    tell(part(1), "two").await.unwrap();
    assert!(tell(complete(2, 8), "").await.is_err(), "a byte is missing");
    tell(complete(2, 7), "").await.unwrap();
    tell(complete(2, 7), "").await.unwrap();
    assert_eq!(client.get(&Path::from("a/b")).await.unwrap().bytes().await.unwrap(), "one two");
    let elsewhere = Request::Begin { name: "a/c".parse().unwrap(), upload };
    assert!(tell(elsewhere, "").await.is_err());
    // Nobody else's, though the id is the same.
    let (_, other) = site.relay(HOUR);
    let theirs = Request::Part { name: name.clone(), upload, part: 2 };
    assert_eq!(other.tell(&theirs, "x".into()).await.unwrap_err().code(), 1607);
}

#[tokio::test]
async fn uploads_are_bounded_in_number() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    let begin = |n: usize| Request::Begin { name: "a/b".parse().unwrap(), upload: UploadId(n as u128) };
    for n in 0..UPLOADS_MAX {
        client.tell(&begin(n), "".into()).await.unwrap();
    }
    let refused = client.attempt(&begin(UPLOADS_MAX), &"".into(), true).await.err().unwrap();
    assert_eq!(refused.code(), 1609);
    client
        .tell(&Request::Abort { name: "a/b".parse().unwrap(), upload: UploadId(3) }, "".into())
        .await
        .unwrap();
    client.tell(&begin(UPLOADS_MAX), "".into()).await.unwrap();
}
