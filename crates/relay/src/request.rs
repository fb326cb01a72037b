//! What a relay may ask, as method and target of an HTTP request. Pure; what is written is read alike, and nothing else is read.
//!
//! | request | meaning |
//! |---|---|
//! | `PUT /objects/NAME?create=1` | puts an object that must not exist; `create=0`: one that may |
//! | `GET /objects/NAME`, `?from=A&to=B`, `?from=A`, `?last=N` | an object, or a part of it |
//! | `HEAD /objects/NAME` | its size and time |
//! | `DELETE /objects/NAME` | deletes it |
//! | `POST /uploads/NAME?upload=ID` | begins an upload; the id is the client's, 32 hexadecimal digits |
//! | `PUT /uploads/NAME?upload=ID&part=N` | its part N, from 0, in order |
//! | `POST /uploads/NAME?upload=ID&parts=N&bytes=B` | completes it |
//! | `DELETE /uploads/NAME?upload=ID` | gives it up |
//! | `GET /list?prefix=NAME&after=NAME&folders=1` | a page of names, sorted; `prefix` and `after` may be left out |
//! | `POST /renew` | the certificate for a new key, whose signing request is the body |

use crate::{Name, RelayError};
use hyper::Method;
use object_store::GetRange;

/// Most bytes of a request's target.
pub const TARGET_BYTES_MAX: usize = 4096;

/// The client's name of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UploadId(pub u128);

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// An object as a whole.
    Put {
        /// Which.
        name: Name,
        /// Refused if it exists.
        create: bool,
    },
    /// Its content.
    Get {
        /// Which.
        name: Name,
        /// What of it.
        range: Option<GetRange>,
    },
    /// Its size.
    Head {
        /// Which.
        name: Name,
    },
    /// Away with it.
    Delete {
        /// Which.
        name: Name,
    },
    /// Begins an upload; does nothing if it was begun.
    Begin {
        /// Of which object.
        name: Name,
        /// The upload.
        upload: UploadId,
    },
    /// A part of it.
    Part {
        /// Of which object.
        name: Name,
        /// The upload.
        upload: UploadId,
        /// From 0.
        part: u64,
    },
    /// All parts are there.
    Complete {
        /// Of which object.
        name: Name,
        /// The upload.
        upload: UploadId,
        /// How many.
        parts: u64,
        /// Of them all.
        bytes: u64,
    },
    /// Gives it up.
    Abort {
        /// Of which object.
        name: Name,
        /// The upload.
        upload: UploadId,
    },
    /// A page of a listing.
    List {
        /// Beneath which name.
        prefix: Option<Name>,
        /// Behind which name.
        after: Option<Name>,
        /// Only what lies directly there, and the folders.
        folders: bool,
    },
    /// A new certificate.
    Renew,
}

impl Request {
    /// What it is called in metrics.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Put { .. } => "put",
            Self::Get { .. } => "get",
            Self::Head { .. } => "head",
            Self::Delete { .. } => "delete",
            Self::Begin { .. } => "begin",
            Self::Part { .. } => "part",
            Self::Complete { .. } => "complete",
            Self::Abort { .. } => "abort",
            Self::List { .. } => "list",
            Self::Renew => "renew",
        }
    }

    /// The object it is about.
    #[must_use]
    pub const fn name(&self) -> Option<&Name> {
        match self {
            Self::Put { name, .. }
            | Self::Get { name, .. }
            | Self::Head { name }
            | Self::Delete { name }
            | Self::Begin { name, .. }
            | Self::Part { name, .. }
            | Self::Complete { name, .. }
            | Self::Abort { name, .. } => Some(name),
            Self::List { .. } | Self::Renew => None,
        }
    }

    /// Whether it comes with a body.
    #[must_use]
    pub const fn has_body(&self) -> bool {
        matches!(self, Self::Put { .. } | Self::Part { .. } | Self::Renew)
    }

    /// Method and target.
    #[must_use]
    pub fn encode(&self) -> (Method, String) {
        match self {
            Self::Put { name, create } => {
                (Method::PUT, format!("/objects/{name}?create={}", u8::from(*create)))
            }
            Self::Get { name, range } => {
                let range = match range {
                    None => String::new(),
                    Some(GetRange::Bounded(range)) => format!("?from={}&to={}", range.start, range.end),
                    Some(GetRange::Offset(from)) => format!("?from={from}"),
                    Some(GetRange::Suffix(last)) => format!("?last={last}"),
                };
                (Method::GET, format!("/objects/{name}{range}"))
            }
            Self::Head { name } => (Method::HEAD, format!("/objects/{name}")),
            Self::Delete { name } => (Method::DELETE, format!("/objects/{name}")),
            Self::Begin { name, upload } => {
                (Method::POST, format!("/uploads/{name}?upload={:032x}", upload.0))
            }
            Self::Part { name, upload, part } => {
                (Method::PUT, format!("/uploads/{name}?upload={:032x}&part={part}", upload.0))
            }
            Self::Complete { name, upload, parts, bytes } => (
                Method::POST,
                format!("/uploads/{name}?upload={:032x}&parts={parts}&bytes={bytes}", upload.0),
            ),
            Self::Abort { name, upload } => {
                (Method::DELETE, format!("/uploads/{name}?upload={:032x}", upload.0))
            }
            Self::List { prefix, after, folders } => {
                let mut target = format!("/list?folders={}", u8::from(*folders));
                for (key, name) in [("prefix", prefix), ("after", after)] {
                    if let Some(name) = name {
                        target.push_str(&format!("&{key}={name}"));
                    }
                }
                (Method::GET, target)
            }
            Self::Renew => (Method::POST, "/renew".to_owned()),
        }
    }

    /// Reads method and target.
    ///
    /// # Errors
    /// [`RelayError::Name`], [`RelayError::BadRequest`].
    pub fn parse(method: &Method, target: &str) -> Result<Self, RelayError> {
        if target.len() > TARGET_BYTES_MAX {
            return Err(RelayError::BadRequest("its target is too long"));
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut query = Query::of(query)?;
        let request = if let Some(name) = path.strip_prefix("/objects/") {
            Self::of_object(method, name.parse()?, &mut query)?
        } else if let Some(name) = path.strip_prefix("/uploads/") {
            Self::of_upload(method, name.parse()?, &mut query)?
        } else if path == "/list" && method == Method::GET {
            let name = |text: Option<&str>| text.map(str::parse).transpose();
            Self::List {
                prefix: name(query.take("prefix"))?,
                after: name(query.take("after"))?,
                folders: query.flag("folders")?,
            }
        } else if path == "/renew" && method == Method::POST {
            Self::Renew
        } else {
            return Err(RelayError::BadRequest("there is no such thing"));
        };
        query.end()?;
        Ok(request)
    }

    fn of_object(method: &Method, name: Name, query: &mut Query<'_>) -> Result<Self, RelayError> {
        Ok(match *method {
            Method::PUT => Self::Put { name, create: query.flag("create")? },
            Method::GET => {
                let (from, to, last) = (query.number("from")?, query.number("to")?, query.number("last")?);
                let range = match (from, to, last) {
                    (None, None, None) => None,
                    (Some(from), Some(to), None) if from < to => Some(GetRange::Bounded(from..to)),
                    (Some(from), None, None) => Some(GetRange::Offset(from)),
                    (None, None, Some(last)) => Some(GetRange::Suffix(last)),
                    _ => return Err(RelayError::BadRequest("the range is none")),
                };
                Self::Get { name, range }
            }
            Method::HEAD => Self::Head { name },
            Method::DELETE => Self::Delete { name },
            _ => return Err(RelayError::BadRequest("the method")),
        })
    }

    fn of_upload(method: &Method, name: Name, query: &mut Query<'_>) -> Result<Self, RelayError> {
        const NO_UPLOAD: RelayError = RelayError::BadRequest("the upload");
        let id = query.take("upload").ok_or(NO_UPLOAD)?;
        let digits = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if id.len() != 32 || !id.bytes().all(digits) {
            return Err(NO_UPLOAD);
        }
        let upload = UploadId(u128::from_str_radix(id, 16).map_err(|_| NO_UPLOAD)?);
        Ok(match *method {
            Method::POST => match (query.number("parts")?, query.number("bytes")?) {
                (None, None) => Self::Begin { name, upload },
                (Some(parts), Some(bytes)) => Self::Complete { name, upload, parts, bytes },
                _ => return Err(RelayError::BadRequest("the number of parts or of bytes is missing")),
            },
            Method::PUT => {
                let part = query.number("part")?.ok_or(RelayError::BadRequest("the part's number"))?;
                Self::Part { name, upload, part }
            }
            Method::DELETE => Self::Abort { name, upload },
            _ => return Err(RelayError::BadRequest("the method")),
        })
    }
}

/// Keys and values; each key once.
struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    fn of(text: &'a str) -> Result<Self, RelayError> {
        let mut pairs = Vec::new();
        for pair in text.split('&').filter(|_| !text.is_empty()) {
            let pair = pair.split_once('=').ok_or(RelayError::BadRequest("a key without a value"))?;
            if pairs.len() == 4 || pairs.iter().any(|(key, _)| *key == pair.0) {
                return Err(RelayError::BadRequest("a key too many"));
            }
            pairs.push(pair);
        }
        Ok(Self(pairs))
    }

    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(known, _)| *known == key)?;
        Some(self.0.remove(at).1)
    }

    fn number(&mut self, key: &str) -> Result<Option<u64>, RelayError> {
        let bad = RelayError::BadRequest("a number");
        match self.take(key) {
            None => Ok(None),
            // One way of writing each: no sign, no zeros in front.
            Some(text)
                if text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit())) =>
            {
                text.parse().map(Some).map_err(|_| bad)
            }
            Some(_) => Err(bad),
        }
    }

    fn flag(&mut self, key: &str) -> Result<bool, RelayError> {
        match self.take(key) {
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            _ => Err(RelayError::BadRequest("0 or 1 is expected")),
        }
    }

    fn end(&self) -> Result<(), RelayError> {
        if self.0.is_empty() { Ok(()) } else { Err(RelayError::BadRequest("a key that is not known")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name() -> impl Strategy<Value = Name> {
        "[a-z0-9._-]{0,3}[a-z0-9]{1,9}(/[A-Z_]{1,3}){0,3}".prop_map(|text| text.parse().unwrap())
    }

    fn request() -> impl Strategy<Value = Request> {
        let upload = || any::<u128>().prop_map(UploadId);
        prop_oneof![
            (name(), any::<bool>()).prop_map(|(name, create)| Request::Put { name, create }),
            name().prop_map(|name| Request::Get { name, range: None }),
            (name(), 0..9_u64, 9..99_u64)
                .prop_map(|(name, a, b)| Request::Get { name, range: Some(GetRange::Bounded(a..b)) }),
            (name(), any::<u64>())
                .prop_map(|(name, from)| Request::Get { name, range: Some(GetRange::Offset(from)) }),
            (name(), any::<u64>())
                .prop_map(|(name, last)| Request::Get { name, range: Some(GetRange::Suffix(last)) }),
            name().prop_map(|name| Request::Head { name }),
            name().prop_map(|name| Request::Delete { name }),
            (name(), upload()).prop_map(|(name, upload)| Request::Begin { name, upload }),
            (name(), upload(), any::<u64>()).prop_map(|(name, upload, part)| Request::Part {
                name,
                upload,
                part
            }),
            (name(), upload(), any::<u64>(), any::<u64>())
                .prop_map(|(name, upload, parts, bytes)| Request::Complete { name, upload, parts, bytes }),
            (name(), upload()).prop_map(|(name, upload)| Request::Abort { name, upload }),
            (prop::option::of(name()), prop::option::of(name()), any::<bool>())
                .prop_map(|(prefix, after, folders)| { Request::List { prefix, after, folders } }),
            Just(Request::Renew),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(request in request()) {
            let (method, target) = request.encode();
            prop_assert_eq!(Request::parse(&method, &target).unwrap(), request);
        }
    }

    #[test]
    fn nothing_else_is_read() {
        let id = "0123456789abcdef0123456789abcdef";
        let targets = [
            (Method::GET, "/".to_owned()),
            (Method::GET, "*".to_owned()),
            (Method::GET, "http://other/objects/a".to_owned()),
            (Method::GET, "/objects/".to_owned()),
            (Method::GET, "/objects/../vault.json".to_owned()),
            (Method::GET, "/objects//etc/passwd".to_owned()),
            (Method::GET, "/objects/%2e%2e/a".to_owned()),
            (Method::GET, "/objects/a?from=2&to=2".to_owned()),
            (Method::GET, "/objects/a?to=2".to_owned()),
            (Method::GET, "/objects/a?from=1&last=2".to_owned()),
            (Method::GET, "/objects/a?from=-1".to_owned()),
            (Method::GET, "/objects/a?from=18446744073709551616".to_owned()),
            (Method::GET, "/objects/a?x=1".to_owned()),
            (Method::GET, "/objects/a?from=1&from=2".to_owned()),
            (Method::PUT, "/objects/a".to_owned()),
            (Method::PUT, "/objects/a?create=2".to_owned()),
            (Method::POST, "/objects/a".to_owned()),
            (Method::POST, "/uploads/a".to_owned()),
            (Method::POST, format!("/uploads/a?upload={}", &id[1..])),
            (Method::POST, format!("/uploads/a?upload={}", id.to_uppercase())),
            (Method::POST, format!("/uploads/a?upload={id}&parts=1")),
            (Method::PUT, format!("/uploads/a?upload={id}")),
            (Method::GET, "/list".to_owned()),
            (Method::GET, "/list?folders=1&prefix=..".to_owned()),
            (Method::GET, "/renew".to_owned()),
            (Method::GET, format!("/objects/{}", "a/".repeat(9000))),
        ];
        for (method, target) in targets {
            assert!(Request::parse(&method, &target).is_err(), "{method} {target}");
        }
    }
}
