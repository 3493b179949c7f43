//! Making a site in an empty folder.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use catalog::Catalog;
use repository::Repository;
use serde::Serialize;
use steps::durable_step;
use wire::{Identity, IdentityError};

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
/// The config comes last: without it there is no site yet, and what was cut off can be begun again.
pub fn init(dir: &Path, name: &str, listen: SocketAddr) -> Result<Made, Failure> {
    name.parse::<model::VmName>()
        .map_err(|error| Failure::new(Code::Usage, error.to_string().replace("VM name", "site name")))?;
    let config = dir.join("config.toml");
    if config.exists() {
        let message =
            format!("there is a site in {} already; choose another folder with --dir", dir.display());
        return Err(Failure::new(Code::SiteExists, message));
    }
    make_folder(dir, 0o700)?;
    // It may have been there, open to others: from now on it holds a key and the disks of guests.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .map_err(|error| Failure::io("protect the folder", dir, &error))?;
    let no_identity = |error: IdentityError| Failure::new(Code::Io, error.to_string());
    let identity = match Identity::load(dir) {
        Ok(identity) => identity,
        Err(_) => {
            Identity::put_aside(dir).map_err(no_identity)?;
            Identity::create(dir, name).map_err(no_identity)?
        }
    };
    Catalog::open(dir.join("catalog.sqlite"))?;
    make_repository(dir)?;
    durable_step("site::init::configuring");
    write_new(&config, template(name, listen).as_bytes(), 0o600)?;
    durable_step("site::init::configured");
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
            durable_step("site::init::password");
            write_new(&password_file, password.as_bytes(), 0o600)?;
            durable_step("site::init::password-written");
            password
        }
    };
    if path.exists() {
        return Ok(());
    }
    // Under another name until it is whole: one with keys and no config would be nobody's.
    let partial = path.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|error| Failure::io("remove", &partial, &error))?;
    }
    Repository::create(&partial, password.trim())?;
    let failed = |error: io::Error| Failure::io("name", &path, &error);
    durable_step("site::init::repository");
    fs::rename(&partial, &path).map_err(failed)?;
    durable_step("site::init::repository-named");
    fs::File::open(dir).and_then(|folder| folder.sync_all()).map_err(failed)?;
    durable_step("site::init::repository-settled");
    Ok(())
}

/// Makes a folder, and those that it lies in, so that all their names are durable.
pub(crate) fn make_folder(path: &Path, mode: u32) -> Result<(), Failure> {
    let missing: Vec<&Path> = path.ancestors().take_while(|folder| !folder.exists()).collect();
    for folder in missing.into_iter().rev().filter(|folder| !folder.as_os_str().is_empty()) {
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
        let made = match fs::DirBuilder::new().mode(mode).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::File::open(parent.unwrap_or(Path::new("."))),
        };
        durable_step("site::folder::made");
        made.and_then(|parent| parent.sync_all())
            .map_err(|error| Failure::io("make the folder", folder, &error))?;
        durable_step("site::folder::settled");
    }
    Ok(())
}

/// Writes a file that is whole or absent, and durable.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
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
