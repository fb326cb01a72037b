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
