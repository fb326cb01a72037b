//! Reads certificates. Says nothing about who issued them.

use crate::WireError;
use rustls_pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::FromDer};

/// URI name in a collector's certificate.
pub const COLLECTOR_URI: &str = "urn:highwater:collector";
/// Beginning of the URI name in a machine's certificate; the machine's id follows.
pub const MACHINE_URI_PREFIX: &str = "urn:highwater:machine:";
/// Beginning of the URI name in a relay's certificate; the relay's id follows.
pub const RELAY_URI_PREFIX: &str = "urn:highwater:relay:";

/// Whether a certificate is a collector's. Says nothing about who issued it.
pub fn is_collector_cert(cert: &CertificateDer<'_>) -> bool {
    uris(cert).is_ok_and(|uris| uris.iter().any(|uri| uri == COLLECTOR_URI))
}

/// A certificate's serial number, in lower-case hexadecimal.
pub fn serial_of(cert: &CertificateDer<'_>) -> Result<String, WireError> {
    Ok(hex(parse(cert)?.raw_serial()))
}

/// SHA-256 of a certificate.
#[must_use]
pub fn fingerprint(cert: &CertificateDer<'_>) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, cert);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) fn parse<'a>(
    cert: &'a CertificateDer<'_>,
) -> Result<x509_parser::certificate::X509Certificate<'a>, WireError> {
    x509_parser::certificate::X509Certificate::from_der(cert)
        .map(|(_, parsed)| parsed)
        .map_err(|e| WireError::identity("a certificate", e))
}

pub(crate) fn uris(cert: &CertificateDer<'_>) -> Result<Vec<String>, WireError> {
    let parsed = parse(cert)?;
    let names = parsed.subject_alternative_name().map_err(|e| WireError::identity("a certificate", e))?;
    Ok(names.map_or_else(Vec::new, |names| {
        names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            })
            .collect()
    }))
}
