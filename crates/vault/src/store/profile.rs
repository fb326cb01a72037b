//! Amazon's files of profiles, `~/.aws/credentials` and `~/.aws/config`: a section a profile, `key = value` lines.
//!
//! Understood are static keys, `region` and `endpoint_url`. A profile that gets its credentials otherwise (`role_arn`,
//! `sso_…`, `credential_process`) is refused when it is asked for by name, and passed over when it is merely there.

use crate::{Result, VaultError};
use std::{collections::HashMap, env, fs, io, path::PathBuf};
use zeroize::Zeroizing;

/// Most bytes of such a file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a profile says.
#[derive(Default)]
pub(super) struct Profile {
    pub(super) keys: Option<Keys>,
    pub(super) region: Option<String>,
    pub(super) endpoint: Option<String>,
}

/// Erased when they go.
pub(super) struct Keys {
    pub(super) id: String,
    pub(super) secret: Zeroizing<String>,
    pub(super) session_token: Option<Zeroizing<String>>,
}

/// Reads the profile of this name, or the one that the environment names, or `default`. Files that are not there say nothing; a
/// profile asked for by `name` must be there and have keys.
pub(super) fn load(name: Option<&str>) -> Result<Profile> {
    let from_environment = env::var("AWS_PROFILE").ok().filter(|name| !name.is_empty());
    let wanted = name.map(str::to_owned).or(from_environment).unwrap_or_else(|| "default".to_owned());
    let credentials = read("AWS_SHARED_CREDENTIALS_FILE", "credentials")?;
    let config = read("AWS_CONFIG_FILE", "config")?;
    // A bare section name in the one file, `profile NAME` in the other, but for `default`.
    let mut settings = section(&config, &format!("profile {wanted}"));
    if wanted == "default" {
        settings.extend(section(&config, "default"));
    }
    settings.extend(section(&credentials, &wanted));
    let mut take = |key: &str| settings.remove(key);
    let secret = take("aws_secret_access_key").map(Zeroizing::new);
    let session_token = take("aws_session_token").map(Zeroizing::new);
    let keys = take("aws_access_key_id").zip(secret).map(|(id, secret)| Keys { id, secret, session_token });
    if let Some(name) = name.filter(|_| keys.is_none()) {
        let cause =
            "it has no aws_access_key_id and aws_secret_access_key in ~/.aws/credentials or ~/.aws/config";
        return Err(VaultError::Location { location: format!("profile {name}"), cause: cause.to_owned() });
    }
    Ok(Profile { keys, region: take("region"), endpoint: take("endpoint_url") })
}

fn read(variable: &str, name: &str) -> Result<Zeroizing<String>> {
    let path = match (env::var_os(variable), env::var_os("HOME")) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(home)) => PathBuf::from(home).join(".aws").join(name),
        (None, None) => return Ok(Zeroizing::default()),
    };
    let failed = |e| VaultError::io(&path, e);
    match fs::metadata(&path) {
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is larger than any such file")))
        }
        Ok(_) => fs::read_to_string(&path).map(Zeroizing::new).map_err(failed),
        // A service's user often has no home that it may read.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(Zeroizing::default())
        }
        Err(e) => Err(failed(e)),
    }
}

/// The settings of one section. Of a key given twice the last wins; nested settings (indented) are passed over.
fn section(text: &str, wanted: &str) -> HashMap<String, String> {
    let mut settings = HashMap::new();
    let mut within = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            within = name.split_whitespace().eq(wanted.split_whitespace());
        } else if within
            && !line.starts_with([' ', '\t', '#', ';'])
            && let Some((key, value)) = trimmed.split_once('=')
        {
            settings.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_told_apart() {
        let text = "# of the site\n[default]\nregion=eu-central-1\n\n[profile  dr]\nregion = eu-west-1\ns3 =\n  \
                    addressing_style = path\nAWS_Access_Key_Id = AKIA\n; region = x\n[profile dr2]\nregion=us-east-1\n";
        let dr = section(text, "profile dr");
        assert_eq!(dr.get("region").map(String::as_str), Some("eu-west-1"));
        assert_eq!(dr.get("aws_access_key_id").map(String::as_str), Some("AKIA"));
        assert!(!dr.contains_key("addressing_style"));
        assert_eq!(section(text, "default").len(), 1);
        assert!(section(text, "profile d").is_empty());
    }
}
