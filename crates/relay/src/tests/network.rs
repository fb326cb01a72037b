//! Answers that get lost, contents that break off, certificates that end.

use super::support::Site;
use highwater_wire::{RelayIdentity, identity::Authority};
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path};
use std::{sync::atomic::Ordering, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_create_whose_answer_is_lost_is_found_to_exist() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    client.put(&Path::from("warm"), "x".into()).await.unwrap();
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    site.cut_after(0);
    let put = client.put_opts(&Path::from("a"), "mine".into(), options).await;
    assert!(matches!(put, Err(Error::AlreadyExists { .. })), "{put:?}");
    assert_eq!(client.get(&Path::from("a")).await.unwrap().bytes().await.unwrap(), "mine");
    site.cut_after(0);
    client.delete(&Path::from("a")).await.unwrap();
}

#[tokio::test]
async fn uploads_go_on_when_answers_are_lost() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    let path = Path::from("s");
    site.cut_after(0);
    let mut upload = client.put_multipart(&path).await.unwrap();
    for n in 0..5_u8 {
        site.cut_after(0);
        upload.put_part(vec![n; 100_000].into()).await.unwrap();
    }
    site.cut_after(0);
    upload.complete().await.unwrap();
    let expected: Vec<u8> = (0..5).flat_map(|n| vec![n; 100_000]).collect();
    assert!(client.get(&path).await.unwrap().bytes().await.unwrap() == expected);
}

#[tokio::test]
async fn a_content_that_breaks_off_is_read_on() {
    let site = Site::new().await;
    let (relay, client) = site.relay(HOUR);
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n >> 3) as u8).collect();
    let there = Path::from(format!("relays/{relay}/s"));
    site.store.put(&there, content.clone().into()).await.unwrap();
    for cut in [0, 300, 100_000, 1_500_000, 2_999_999] {
        site.cut_after(cut);
        let got = client.get(&Path::from("s")).await.unwrap().bytes().await.unwrap();
        assert!(got == content, "cut after {cut}");
        site.cut_after(cut);
        let got = client.get_range(&Path::from("s"), 1000..2_900_000).await.unwrap();
        assert!(got == content[1000..2_900_000], "cut after {cut}");
    }
}

#[tokio::test]
async fn who_is_revoked_hears_it_at_once() {
    let site = Site::new().await;
    let (_, client) = site.relay(HOUR);
    client.put(&Path::from("a"), "x".into()).await.unwrap();
    site.faults.revoked.store(true, Ordering::Relaxed);
    let error = client.put(&Path::from("b"), "x".into()).await.unwrap_err();
    assert!(error.to_string().contains("HW-1121"), "{error}");
}

#[tokio::test]
async fn another_authority_is_not_tried_again() {
    let site = Site::new().await;
    let (relay, _) = site.relay(HOUR);
    let mut address = site.location(relay);
    address.host = "localhost".to_owned();
    let error = crate::Client::open(address).unwrap().head(&Path::from("a")).await.unwrap_err();
    assert!(error.to_string().contains("handshake"), "{error}");

    let other = Site { authority: Authority::create("b").unwrap().into(), ..Site::new().await };
    let (_, stranger) = other.relay(HOUR);
    let error = stranger.head(&Path::from("a")).await.unwrap_err();
    assert!(error.to_string().contains("handshake"), "{error}");
}

#[tokio::test]
async fn the_certificate_is_renewed_by_use() {
    let site = Site::new().await;
    // A third of it is left within moments.
    let (relay, client) = site.relay(Duration::from_secs(3));
    let dir = site.location(relay).identity;
    let first = RelayIdentity::load(&dir).unwrap().credential().unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        client.put(&Path::from("a"), "x".into()).await.unwrap();
        let now = RelayIdentity::load(&dir).unwrap().credential().unwrap();
        if now.serial != first.serial {
            assert_eq!(now.relay, relay);
            assert!(now.expires_ms > first.expires_ms);
            break;
        }
        assert!(std::time::Instant::now() < until, "not renewed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client.put(&Path::from("b"), "x".into()).await.unwrap();
}
