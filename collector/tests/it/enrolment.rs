//! Tokens buy certificates, once.

use crate::support::Site;
use highwater_delta::DiskId;
use highwater_wire::enroll::{ENROL_PATH, Token, enroll};
use highwater_wire::identity::Csr;
use highwater_wire::{WireError, certificate};
use std::time::Duration;
use zeroize::Zeroizing;

fn status(result: Result<highwater_wire::enroll::Enrolled, WireError>) -> (u16, String) {
    match result {
        Err(WireError::EnrolRefused { status, cause, .. }) => (status, cause[..7].to_owned()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolled_machine_can_connect_to_what_it_was_told() {
    let site = Site::new().await;
    let token = site.token(Duration::from_secs(60)).await;
    let enrolled = enroll(&site.url(), &token, "db1").await.unwrap();
    assert_eq!(enrolled.endpoint, site.running.ingest.to_string());
    let machine = site.vault().await.machine(enrolled.identity.machine).await.unwrap();
    assert_eq!(machine.host_name, "db1");
    let disk = DiskId::new();
    site.agent(&enrolled.identity, disk).await.deliver(disk, 0, &[1]).await;
    assert_eq!(status(enroll(&site.url(), &token, "db2").await), (409, "HW-1321".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_and_expired_tokens_buy_nothing() {
    let site = Site::new().await;
    let expired = site.token(Duration::ZERO).await;
    assert_eq!(status(enroll(&site.url(), &expired, "h").await), (403, "HW-1322".to_owned()));
    let good = site.token(Duration::from_secs(60)).await;
    let mut unknown = good.clone();
    unknown.id[3] ^= 1;
    let mut wrong = good.clone();
    let mut secret = *wrong.secret;
    secret[31] ^= 1;
    wrong.secret = Zeroizing::new(secret);
    for bad in [unknown, wrong] {
        assert_eq!(status(enroll(&site.url(), &bad, "h").await), (403, "HW-1320".to_owned()));
    }
    assert_eq!(status(enroll(&site.url(), &good, "").await), (400, "HW-1323".to_owned()));
    assert!(site.vault().await.machines().await.unwrap().is_empty());
    enroll(&site.url(), &good, "h").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_used_many_times_at_once_enrols_one_machine() {
    let site = Site::new().await;
    let token = site.token(Duration::from_secs(60)).await;
    let tries: Vec<_> = (0..12)
        .map(|n| {
            let (url, token) = (site.url(), token.clone());
            tokio::spawn(async move { enroll(&url, &token, &format!("h{n}")).await })
        })
        .collect();
    let mut won = 0;
    for attempt in tries {
        match attempt.await.unwrap() {
            Ok(_) => won += 1,
            other => assert_eq!(status(other).0, 409),
        }
    }
    assert_eq!(won, 1);
    assert_eq!(site.vault().await.machines().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_is_not_shown_to_another_collector() {
    let (site, impostor) = (Site::new().await, Site::new().await);
    let token = site.token(Duration::from_secs(60)).await;
    let error = enroll(&impostor.url(), &token, "h").await.unwrap_err();
    assert_eq!(error.code(), 1117, "{error:?}");
    let by_name = format!("https://localhost:{}", site.running.management.port());
    assert_eq!(enroll(&by_name, &token, "h").await.unwrap_err().code(), 1117, "a name that is not certified");
    enroll(&site.url(), &token, "h").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn enrolments_are_rationed() {
    let site = Site::with(|config| config.enrolments_per_second = 1).await;
    let token = site.token(Duration::ZERO).await;
    let mut statuses = Vec::new();
    for _ in 0..8 {
        statuses.push(status(enroll(&site.url(), &token, "h").await).0);
    }
    assert_eq!(statuses[0], 403);
    assert!(statuses.contains(&429), "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_uses_up_its_own_rate_and_nobody_elses() {
    let site = Site::with(|config| config.enrolments_per_second = 1).await;
    let request = || {
        let head = format!(
            "POST {ENROL_PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        head.into_bytes()
    };
    let mut refused = 0;
    // From more addresses, too, than all together may enrol in that time.
    for n in 0..48 {
        let from = if n < 12 { 2 } else { n };
        let answer = http_from([127, 0, 0, from], &site, request()).await;
        refused += u32::from(answer.starts_with("HTTP/1.1 429"));
    }
    assert!((5..=8).contains(&refused), "{refused} of twelve, and none of those who came once");
    enroll(&site.url(), &site.token(Duration::from_secs(60)).await, "h").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_holds_a_token_uses_up_its_tries_and_nobody_elses() {
    let site = Site::with(|config| config.enrolments_per_second = 1).await;
    let (token, spent) =
        (site.token(Duration::from_secs(60)).await, site.token(Duration::from_secs(60)).await);
    enroll(&site.url(), &spent, "h").await.unwrap();
    let csr = Csr::create().unwrap().csr_pem;
    let request = |token: &Token, csr_pem: &str| {
        let body = serde_json::json!({
            "token_id": certificate::hex(&token.id),
            "secret": certificate::hex(token.secret.as_ref()),
            "csr_pem": csr_pem,
            "host_name": "h",
        });
        let (body, close) = (body.to_string(), "Host: x\r\nConnection: close");
        format!("POST {ENROL_PATH} HTTP/1.1\r\n{close}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            .into_bytes()
    };
    // More than all together may enrol in that time, each from an address of its own: for what cannot be certified, and with a
    // token that was used.
    let mut statuses = Vec::new();
    for n in 0..48 {
        let bad = http_from([127, 0, 1, n], &site, request(&token, "no request")).await;
        let used = http_from([127, 0, 2, n], &site, request(&spent, &csr)).await;
        assert!(used.starts_with("HTTP/1.1 409"), "{used}");
        statuses.push(bad[9..12].to_owned());
    }
    assert!(statuses[..5].iter().all(|status| status == "400"), "{statuses:?}");
    assert!(statuses[6..].iter().all(|status| status == "429"), "{statuses:?}");
    enroll(&site.url(), &site.token(Duration::from_secs(60)).await, "h").await.unwrap();
    assert_eq!(status(enroll(&site.url(), &token, "h").await).0, 429);
}

async fn http(site: &Site, request: Vec<u8>) -> String {
    http_from([127, 0, 0, 1], site, request).await
}

/// A raw request; answers the status line and the body.
async fn http_from(from: [u8; 4], site: &Site, request: Vec<u8>) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(site.running.shared.authority.cert().clone()).unwrap();
    let provider = std::sync::Arc::new(highwater_wire::tls::provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let stream = socket.connect(site.running.management).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let mut stream = connector.connect("127.0.0.1".try_into().unwrap(), stream).await.unwrap();
    // The server may answer and close before everything is sent.
    let _ = stream.write_all(&request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_bounded() {
    let site = Site::new().await;
    let head = |body: usize| {
        format!(
            "POST {ENROL_PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {body}\r\n\r\n"
        )
    };
    let mut long = head(17 * 1024).into_bytes();
    long.resize(long.len() + 17 * 1024, b'x');
    assert!(http(&site, long).await.starts_with("HTTP/1.1 400"));
    let mut nonsense = head(3).into_bytes();
    nonsense.extend(b"{}x");
    assert!(http(&site, nonsense).await.contains("HW-1323"));
    let health = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec();
    assert!(http(&site, health).await.starts_with("HTTP/1.1 200"));
    let elsewhere = b"GET /v1/machines HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec();
    assert!(http(&site, elsewhere).await.starts_with("HTTP/1.1 404"));
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_and_keys_do_not_lie_open_in_the_vault() {
    let site = Site::new().await;
    let token = site.token(Duration::from_secs(60)).await;
    let mut files = vec![site.vault_dir()];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let content = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&content);
        assert!(!text.contains("PRIVATE KEY") && !text.contains(&certificate::hex(token.secret.as_ref())));
        seen += 1;
    }
    assert!(seen >= 3);
}
