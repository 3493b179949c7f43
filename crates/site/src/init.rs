//! Making a site in an empty folder.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use catalog::Catalog;
use repository::Repository;
use serde::Serialize;
use wire::Identity;

use crate::config::template;
use crate::failure::{Code, Failure};
use crate::random;

/// What `init` made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Made {
    /// The site's name.
    pub name: String,
    /// Where it will listen.
    pub address: String,
    /// Its certificate.
    pub fingerprint: String,
}

/// Makes a site in `dir`: identity, config, catalog, and a local repository with a password of its own.
/// The config comes last, so that what was cut off can be begun again.
pub fn init(dir: &Path, name: &str, listen: SocketAddr) -> Result<Made, Failure> {
    name.parse::<model::VmName>()
        .map_err(|error| Failure::new(Code::Usage, error.to_string().replace("VM name", "site name")))?;
    let config = dir.join("config.toml");
    if config.exists() {
        let message =
            format!("there is a site in {} already; choose another folder with --dir", dir.display());
        return Err(Failure::new(Code::SiteExists, message));
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| Failure::io("make the folder", dir, &error))?;
    let identity = match Identity::load(dir) {
        Ok(identity) => identity,
        Err(_) => Identity::create(dir, name).map_err(|error| Failure::new(Code::Io, error.to_string()))?,
    };
    Catalog::open(dir.join("catalog.sqlite"))?;
    make_repository(dir)?;
    write_new(&config, template(name, listen).as_bytes(), 0o600)?;
    Ok(Made {
        name: name.to_owned(),
        address: listen.to_string(),
        fingerprint: identity.fingerprint().to_string(),
    })
}

/// The local repository. Its password is random and lies beside it: it guards what leaves this machine.
fn make_repository(dir: &Path) -> Result<(), Failure> {
    let (path, password_file) = (dir.join("repository"), dir.join("repository.password"));
    let password = match fs::read_to_string(&password_file) {
        Ok(password) => password,
        Err(_) => {
            let password = hex::encode(random::bytes::<24>()?);
            write_new(&password_file, password.as_bytes(), 0o600)?;
            password
        }
    };
    if !path.join("config").exists() {
        Repository::create(&path, password.trim())?;
    }
    Ok(())
}

/// Writes a file that is whole or absent, and durable.
fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
    let partial = path.with_extension("partial");
    let written = (|| {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        fs::File::open(path.parent().unwrap_or(path))?.sync_all()
    })();
    written.map_err(|error| Failure::io("write", path, &error))
}
