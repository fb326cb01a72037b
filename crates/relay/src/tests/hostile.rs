//! Relays that do not keep to the rules, on the wire.

use super::support::{MEMORY, Site, door};
use crate::server::CONNECTIONS_MAX;
use futures::TryStreamExt;
use highwater_delta::RelayId;
use object_store::ObjectStore;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// A connection that has shown its certificate.
fn connect(site: &Site, relay: RelayId) -> DuplexStream {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (relays, gate) = (site.relays.clone(), door(&site.faults, &site.authority, relay));
    tokio::spawn(async move { relays.serve(relay, far, gate, std::future::pending()).await });
    near
}

async fn say(site: &Site, text: &str) -> String {
    let mut stream = connect(site, RelayId::new());
    let _ = stream.write_all(text.as_bytes()).await;
    let mut answer = Vec::new();
    // Time goes by only when nobody has anything to do.
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn everything(site: &Site) -> Vec<String> {
    site.store.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn nothing_but_names_and_lengths_within_bounds_passes() {
    let site = Site::new().await;
    let host = "host: x\r\n";
    for line in [
        "PUT /objects/../x?create=1",
        "PUT /objects/a/../../x?create=1",
        "PUT /objects//x?create=1",
        "PUT /objects/%2e%2e/x?create=1",
        "PUT /objects/a%00?create=1",
        "PUT /objects/a#1?create=1",
        "PUT /vault.json?create=1",
        "PUT http://b/objects/x?create=1",
    ] {
        let answer = say(&site, &format!("{line} HTTP/1.1\r\n{host}content-length: 1\r\n\r\nx")).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{line}: {answer}");
    }
    let put = "PUT /objects/x?create=1 HTTP/1.1\r\nhost: x\r\n";
    let huge = say(&site, &format!("{put}content-length: {}\r\n\r\nx", MEMORY + 1)).await;
    assert!(huge.starts_with("HTTP/1.1 413") && huge.contains("HW-1603"), "{huge}");
    let endless = say(&site, &format!("{put}content-length: 18446744073709551615\r\n\r\nx")).await;
    assert!(!endless.contains(" 200 "), "{endless}");
    let chunked = say(&site, &format!("{put}transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")).await;
    assert!(chunked.starts_with("HTTP/1.1 400"), "{chunked}");
    let smuggled = say(
        &site,
        &format!("{put}transfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n1\r\nx\r\n0\r\n\r\n"),
    )
    .await;
    assert!(!smuggled.contains(" 200 "), "{smuggled}");
    let half = say(&site, &format!("{put}content-length: 100\r\n\r\nonly this")).await;
    assert!(!half.contains(" 200 "), "{half}");
    say(&site, "PUT /objects/x?create=1 HT").await;
    let long = say(&site, &format!("GET /objects/{} HTTP/1.1\r\n{host}\r\n", "a".repeat(200_000))).await;
    assert!(!long.contains(" 200 "), "{}", &long[..long.len().min(100)]);
    assert!(say(&site, "\0\0\0\0 nonsense\r\n\r\n").await.contains("400"));
    let renewal = say(&site, &format!("POST /renew HTTP/1.1\r\n{host}content-length: 2\r\n\r\nno")).await;
    assert!(!renewal.contains(" 200 "), "{renewal}");
    let body = say(&site, &format!("GET /objects/x HTTP/1.1\r\n{host}content-length: 2\r\n\r\nno")).await;
    assert!(body.starts_with("HTTP/1.1 400"), "{body}");
    assert_eq!(everything(&site).await, [""; 0]);
    // And what is right is still served.
    assert!(say(&site, &format!("{put}content-length: 1\r\n\r\nx")).await.starts_with("HTTP/1.1 200"));
    assert_eq!(everything(&site).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn slow_bodies_are_given_up_and_their_memory_with_them() {
    let site = Site::new().await;
    let relay = RelayId::new();
    let half = MEMORY / 2;
    let mut slow = connect(&site, relay);
    let head = format!("PUT /objects/x?create=1 HTTP/1.1\r\nhost: x\r\ncontent-length: {half}\r\n\r\n");
    slow.write_all(head.as_bytes()).await.unwrap();
    // Its part is taken: the next one has to wait, and others do not.
    let mut next = connect(&site, relay);
    let small = "PUT /objects/y?create=1 HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx";
    tokio::time::sleep(Duration::from_millis(10)).await;
    next.write_all(small.as_bytes()).await.unwrap();
    let mut others = connect(&site, RelayId::new());
    others.write_all(small.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    others.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    assert_eq!(everything(&site).await.len(), 1);
    // A byte now and then is not enough.
    let dripping = tokio::spawn(async move {
        let mut answer = Vec::new();
        for _ in 0..1000 {
            if slow.write_all(b"x").await.is_err() {
                break;
            }
            let read = tokio::time::timeout(Duration::from_secs(5), slow.read_buf(&mut answer)).await;
            if matches!(read, Ok(Ok(0) | Err(_))) || answer.len() > 12 {
                break;
            }
        }
        let _ = slow.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    });
    let told = dripping.await.unwrap();
    assert!(told.contains("408") && told.contains("HW-1610"), "{told}");
    // The one that waited was told to come again, and can.
    next.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 503");
    let mut again = connect(&site, relay);
    again.write_all(small.as_bytes()).await.unwrap();
    again.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[tokio::test]
async fn connections_of_a_relay_are_bounded() {
    let site = Site::new().await;
    let relay = RelayId::new();
    let head = "HEAD /objects/x HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut stream = connect(&site, relay);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 404");
        held.push(stream);
    }
    let mut one_more = connect(&site, relay);
    let _ = one_more.write_all(head.as_bytes()).await;
    assert_eq!(one_more.read_to_end(&mut Vec::new()).await.unwrap_or(0), 0);
    drop(held);
    let mut other = connect(&site, RelayId::new());
    other.write_all(head.as_bytes()).await.unwrap();
    assert!(other.read(&mut [0; 12]).await.unwrap() > 0);
}
