use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn tokens_come_back(id: [u8; 16], secret: [u8; 32], ca_fingerprint: [u8; 32]) {
        let token = Token { id, secret: Zeroizing::new(secret), ca_fingerprint };
        prop_assert_eq!(format!(" {token}\n").parse::<Token>().unwrap(), token);
    }

    #[test]
    fn what_is_no_token_is_told(text in ".{0,200}") {
        prop_assert_eq!(text.parse::<Token>().unwrap_err().code(), 1115);
    }
}

#[test]
fn a_token_is_not_printed_by_accident() {
    let token = Token { id: [1; 16], secret: Zeroizing::new([0xab; 32]), ca_fingerprint: [2; 32] };
    assert!(!format!("{token:?}").contains("abab"));
}

#[test]
fn urls() {
    let host = |url| host_of_url(url).unwrap();
    assert_eq!(host("https://dr.example"), ("dr.example".to_owned(), 443));
    assert_eq!(host("https://dr.example:8443/"), ("dr.example".to_owned(), 8443));
    assert_eq!(host("https://[::1]:8443"), ("::1".to_owned(), 8443));
    assert_eq!(host("https://[::1]"), ("::1".to_owned(), 443));
    for bad in [
        "http://a",
        "a",
        "https://",
        "https://a/b",
        "https://a:x",
        "https://u@a",
        "https://::1",
        "https://:1",
    ] {
        assert_eq!(host_of_url(bad).unwrap_err().code(), 1112, "{bad}");
    }
}

#[test]
fn a_refusal_is_told_once_with_what_the_collector_says_to_do() {
    let answer = br#"{"code":"HW-1303","cause":"the token is used up","action":"create another"}"#;
    let error = refusal(403, answer);
    let text = error.to_string();
    assert!(text.ends_with("403: HW-1303: the token is used up") && !text.contains("create"), "{text}");
    assert_eq!((error.code(), error.action().as_str()), (1116, "create another"));
    assert_eq!(refusal(500, b"<html>").code(), 1116);
    assert_eq!(
        " \n".parse::<Token>().unwrap_err().to_string(),
        "the enrolment token is malformed: it is empty"
    );
}

/// A port of something else: nothing is said about certificates.
#[tokio::test]
async fn what_is_no_collector_is_told_as_such() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = [0; 64];
        stream.read_exact(&mut hello).await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        while stream.read(&mut hello).await.is_ok_and(|bytes| bytes > 0) {}
    });
    let token = Token { id: [1; 16], secret: Zeroizing::new([2; 32]), ca_fingerprint: [3; 32] };
    let error = enroll(&url, &token, "host").await.unwrap_err();
    assert_eq!(error.code(), 1120, "{error}");
}
