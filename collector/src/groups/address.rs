//! Where a member says that it is reached. Pure: what comes from a machine is handed to the other members of its group, who call there.

use std::net::{IpAddr, Ipv6Addr};

/// As `host:port`; an IPv6 address in brackets. None: it is no host, or no port.
#[must_use]
pub fn address(host: Option<&str>, from: IpAddr, port: u16) -> Option<String> {
    if port == 0 {
        return None;
    }
    let ip = match host {
        None => Some(from.to_canonical()),
        Some(host) => {
            let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
            match bare {
                // Only an IPv6 address stands in brackets.
                Some(bare) => Some(IpAddr::V6(bare.parse::<Ipv6Addr>().ok()?)),
                None => host.parse::<IpAddr>().ok(),
            }
        }
    };
    match ip {
        Some(ip) if ip.is_unspecified() || ip.is_multicast() => None,
        Some(IpAddr::V4(v4)) => Some(format!("{v4}:{port}")),
        Some(IpAddr::V6(v6)) => Some(format!("[{v6}]:{port}")),
        None => host.filter(|host| is_name(host)).map(|host| format!("{host}:{port}")),
    }
}

/// Whether it is a name as hosts have: letters, digits, hyphens and underscores, between dots; not one of digits and dots only, which would be
/// taken for an address.
fn is_name(host: &str) -> bool {
    let labels = host.strip_suffix('.').unwrap_or(host);
    let good = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.len() <= 253
        && labels.split('.').all(good)
        && !labels.split('.').next_back().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_and_nothing_else() {
        let from: IpAddr = "::ffff:192.0.2.7".parse().unwrap();
        let of = |host| address(host, from, 20004);
        assert_eq!(of(None).as_deref(), Some("192.0.2.7:20004"));
        for (host, expected) in [
            ("db-1.example.org", "db-1.example.org:20004"),
            ("db_1", "db_1:20004"),
            ("192.0.2.9", "192.0.2.9:20004"),
            ("2001:db8::1", "[2001:db8::1]:20004"),
            ("[2001:db8::1]", "[2001:db8::1]:20004"),
        ] {
            assert_eq!(of(Some(host)).as_deref(), Some(expected));
        }
        let long = "a".repeat(64);
        for host in [
            "",
            ".",
            "a..b",
            "-a",
            "a-",
            "a b",
            "a\nb",
            "a:1",
            "a/b",
            "ü",
            "1.2.3",
            "1",
            "0.0.0.0",
            "::",
            "[db-1]",
            "[1.2.3.4]",
            "224.0.0.1",
            "fe80::1%eth0",
            "user@host",
            &long,
        ] {
            assert_eq!(of(Some(host)), None, "{host:?}");
        }
        assert_eq!(address(Some("db-1"), from, 0), None);
        assert_eq!(address(None, "2001:db8::2".parse().unwrap(), 1).as_deref(), Some("[2001:db8::2]:1"));
    }
}
