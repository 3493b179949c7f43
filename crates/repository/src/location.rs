//! Where a repository is and how to get in.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Error;

/// A secret: it can be used, and is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes it in.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret itself, for whom it is meant.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How a server is spoken to. Of a local repository nothing of it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Who asks: the user of a REST server, the id of an access key of S3.
    pub user: Option<String>,
    /// That user's password, or the secret of the access key.
    pub secret: Option<Secret>,
    /// The certificate authorities to trust instead of the machine's, in PEM.
    pub ca_file: Option<PathBuf>,
    /// The region of S3; `us-east-1` if nothing is said.
    pub region: Option<String>,
    /// More arguments for `ssh`, before the host.
    pub ssh_options: Vec<String>,
    /// How long the answer to one request may take.
    pub timeout: Duration,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            user: None,
            secret: None,
            ca_file: None,
            region: None,
            ssh_options: Vec::new(),
            timeout: Duration::from_secs(300),
        }
    }
}

/// A bucket and a place in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// `http://` or `https://`, with host and port.
    pub(crate) endpoint: String,
    /// Host and port as the header `Host` has them.
    pub(crate) host: String,
    pub(crate) name: String,
    /// Without slashes around it; may be empty.
    pub(crate) prefix: String,
}

/// A host with an SSH server, and a folder there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// `host` or `user@host`.
    pub(crate) name: String,
    pub(crate) port: Option<u16>,
    /// Absolute, or below the user's folder.
    pub(crate) folder: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Local(PathBuf),
    /// The URL, which ends in a slash.
    Rest(String),
    S3(Bucket),
    Sftp(Host),
}

/// Where a repository is: a local folder or a place on a server, and how to get in. Shown without any secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    place: Place,
    access: Access,
}

impl Location {
    /// A local folder.
    #[must_use]
    pub fn local(path: impl Into<PathBuf>) -> Self {
        Self { place: Place::Local(path.into()), access: Access::default() }
    }

    /// The folder, of a local one.
    #[must_use]
    pub fn local_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            _ => None,
        }
    }

    /// A place on a server, as restic writes it: `rest:http://host:8000/path/`, `s3:https://host/bucket/prefix`,
    /// `sftp:user@host:/folder` or `sftp://user@host:port//folder`. An error says what is wrong with it.
    pub fn remote(url: &str, access: Access) -> Result<Self, Error> {
        let place = match url.split_once(':') {
            Some(("rest", rest)) => rest_place(rest),
            Some(("s3", rest)) => s3_place(rest),
            Some(("sftp", rest)) => sftp_place(rest),
            _ => Err("it begins with none of 'rest:', 's3:' and 'sftp:'; a local folder is set with 'path'"),
        };
        // A URL with a password in it must not get into a message.
        let shown = if url.contains('@') && !url.starts_with("sftp") { "that is set" } else { url };
        let place = place.map_err(|why| Error::Unsupported {
            what: format!("the url {shown} of the repository cannot be used: {why}"),
        })?;
        Ok(Self { place, access })
    }

    /// The folder, of a local one.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            _ => None,
        }
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn access(&self) -> &Access {
        &self.access
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Local(path) => path.display().fmt(f),
            Place::Rest(base) => write!(f, "rest:{base}"),
            Place::S3(Bucket { endpoint, name, prefix, .. }) if prefix.is_empty() => {
                write!(f, "s3:{endpoint}/{name}")
            }
            Place::S3(Bucket { endpoint, name, prefix, .. }) => write!(f, "s3:{endpoint}/{name}/{prefix}"),
            Place::Sftp(Host { name, port: None, folder }) => write!(f, "sftp:{name}:{folder}"),
            Place::Sftp(Host { name, port: Some(port), folder }) => {
                write!(f, "sftp://{name}:{port}/{folder}")
            }
        }
    }
}

impl From<PathBuf> for Location {
    fn from(path: PathBuf) -> Self {
        Self::local(path)
    }
}

impl From<&Path> for Location {
    fn from(path: &Path) -> Self {
        Self::local(path)
    }
}

impl From<&str> for Location {
    fn from(path: &str) -> Self {
        Self::local(path)
    }
}

impl From<&PathBuf> for Location {
    fn from(path: &PathBuf) -> Self {
        Self::local(path)
    }
}

impl From<&Location> for Location {
    fn from(location: &Location) -> Self {
        location.clone()
    }
}

const NO_SECRETS: &str =
    "a user or a password does not belong into it; set 'user', and the secret in a file, command or variable";

fn rest_place(rest: &str) -> Result<Place, &'static str> {
    let (scheme, host, path) = http_parts(rest)?;
    let path = path.trim_matches('/');
    let slash = if path.is_empty() { "" } else { "/" };
    Ok(Place::Rest(format!("{scheme}://{host}/{path}{slash}")))
}

fn s3_place(rest: &str) -> Result<Place, &'static str> {
    let whole = if rest.contains("://") { rest.to_owned() } else { format!("https://{rest}") };
    let (scheme, host, path) = http_parts(&whole)?;
    let path = path.trim_matches('/');
    let (name, prefix) = path.split_once('/').unwrap_or((path, ""));
    if name.is_empty() {
        return Err("it names no bucket; write s3:https://HOST/BUCKET/PREFIX");
    }
    // What clients leave out of `Host` must not be in what is signed.
    let usual = if scheme == "https" { ":443" } else { ":80" };
    let host = host.strip_suffix(usual).unwrap_or(host).to_ascii_lowercase();
    Ok(Place::S3(Bucket {
        endpoint: format!("{scheme}://{host}"),
        host,
        name: name.to_owned(),
        prefix: prefix.trim_matches('/').to_owned(),
    }))
}

/// Scheme, host with port, path.
fn http_parts(url: &str) -> Result<(&str, &str, &str), &'static str> {
    let (scheme, rest) = url.split_once("://").ok_or("it has no http:// or https:// in it")?;
    if !matches!(scheme, "http" | "https") {
        return Err("its server can be spoken to by http:// and https:// alone");
    }
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.contains('@') {
        return Err(NO_SECRETS);
    }
    if host.is_empty() {
        return Err("it names no host");
    }
    if url.bytes().any(|byte| byte <= b' ' || matches!(byte, b'?' | b'#' | b'\\' | b'"' | 0x7f..)) {
        return Err("there is a letter in it that no such address has");
    }
    Ok((scheme, host, path))
}

fn sftp_place(rest: &str) -> Result<Place, &'static str> {
    let (name, port, folder) = if let Some(url) = rest.strip_prefix("//") {
        let (host, folder) = url.split_once('/').ok_or("it names no folder")?;
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().map_err(|_| "its port is no number")?)),
            None => (host, None),
        };
        (name, port, folder)
    } else {
        let (name, folder) = rest.split_once(':').ok_or("write sftp:USER@HOST:/FOLDER")?;
        (name, None, folder)
    };
    let user = name.rsplit_once('@').map_or("", |(user, _)| user);
    if user.contains(':') {
        return Err("a password does not belong into it; ssh takes a key ('ssh-options')");
    }
    if name.is_empty() || name.starts_with('-') || name.contains(char::is_whitespace) {
        return Err("it names no host");
    }
    if folder.is_empty() {
        return Err("it names no folder");
    }
    Ok(Place::Sftp(Host { name: name.to_owned(), port, folder: folder.trim_end_matches('/').to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> Result<String, String> {
        Location::remote(url, Access::default())
            .map(|location| location.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_are_read_as_restic_reads_them() {
        for (url, expected) in [
            ("rest:http://host:8000", "rest:http://host:8000/"),
            ("rest:https://host/a/b", "rest:https://host/a/b/"),
            ("s3:https://s3.example.org/bucket", "s3:https://s3.example.org/bucket"),
            ("s3:http://127.0.0.1:9000/bucket/a/b/", "s3:http://127.0.0.1:9000/bucket/a/b"),
            ("s3:s3.Example.org:443/bucket", "s3:https://s3.example.org/bucket"),
            ("sftp:me@host:/srv/backup", "sftp:me@host:/srv/backup"),
            ("sftp:host:backup/", "sftp:host:backup"),
            ("sftp://me@host:2222//srv/backup", "sftp://me@host:2222//srv/backup"),
        ] {
            assert_eq!(shown(url).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn what_cannot_be_used_is_told_without_its_secrets() {
        for (url, why) in [
            ("/srv/backup", "set with 'path'"),
            ("ftp:host", "set with 'path'"),
            ("rest:host/path", "no http://"),
            ("rest:ftp://host/path", "http:// and https:// alone"),
            ("rest:http://me:hidden@host/path", "'user'"),
            ("s3:https://host", "names no bucket"),
            ("s3:https://hidden@host/b", "'user'"),
            ("s3:https://host/a b", "a letter"),
            ("sftp:host", "write sftp:"),
            ("sftp:-oProxyCommand=x:/folder", "names no host"),
            ("sftp:me:hidden@host:/x", ""),
            ("sftp://me@host:port/x", "no number"),
        ] {
            let error = shown(url).err();
            if let Some(error) = error {
                assert!(error.contains(why), "{url}: {error}");
                assert!(url.starts_with("sftp") || !error.contains("hidden"), "{error}");
            } else {
                assert_eq!(url, "sftp:me:hidden@host:/x", "that is the folder hidden@host:/x on the host me");
            }
        }
        let access = Access { secret: Some(Secret::new("hidden".into())), ..Access::default() };
        assert!(!format!("{access:?}").contains("hidden"));
    }
}
