//! Headers of answers.

use hyper::header::HeaderName;

/// Size of the whole object.
pub(crate) const SIZE: HeaderName = HeaderName::from_static("highwater-size");
/// Where in the object the answer begins.
pub(crate) const START: HeaderName = HeaderName::from_static("highwater-start");
/// When the object was put, in milliseconds since 1970.
pub(crate) const MODIFIED: HeaderName = HeaderName::from_static("highwater-modified-ms");
