//! The repositories of a site: what the config says of each, its secrets, and those that stay open.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use repository::{Access, Location, Repository, Secret};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::failure::{Code, Failure};

/// One repository, as the config says it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RepositorySettings {
    /// The folder of a local one; a relative path starts at the site's folder.
    pub path: Option<PathBuf>,
    /// Where it is on a server: `rest:…`, `s3:…` or `sftp:…`.
    pub url: Option<String>,
    /// The file with its password; a relative path starts at the site's folder.
    pub password_file: Option<PathBuf>,
    /// A program and its arguments; the password is the first line that it prints.
    pub password_command: Option<Vec<String>>,
    /// The variable of the environment that has its password.
    pub password_env: Option<String>,
    /// Who the server knows us as: a user, or the id of an access key.
    pub user: Option<String>,
    /// What the server is shown, from a file.
    pub secret_file: Option<PathBuf>,
    /// The same from a program.
    pub secret_command: Option<Vec<String>>,
    /// The same from a variable.
    pub secret_env: Option<String>,
    /// The certificate authorities to trust instead of the machine's, in PEM.
    pub ca_file: Option<PathBuf>,
    /// The region of S3.
    pub region: Option<String>,
    /// More arguments for `ssh`.
    pub ssh_options: Vec<String>,
    /// How long the answer to one request may take.
    pub timeout_s: Option<u64>,
}

/// One of the three places of a secret.
enum Source<'a> {
    File(&'a Path),
    Command(&'a [String]),
    Variable(&'a str),
}

impl RepositorySettings {
    /// The same, with paths that start at `dir` made whole.
    pub(crate) fn within(&self, dir: &Path) -> Self {
        let whole = |path: &Option<PathBuf>| path.as_ref().map(|path| dir.join(path));
        Self {
            path: whole(&self.path),
            password_file: whole(&self.password_file),
            secret_file: whole(&self.secret_file),
            ca_file: whole(&self.ca_file),
            ..self.clone()
        }
    }

    /// What cannot be used of it, if anything.
    pub(crate) fn check(&self) -> Result<(), String> {
        match (&self.path, &self.url) {
            (None, None) => return Err("set 'path' to a folder, or 'url' to a place on a server".into()),
            (Some(_), Some(_)) => return Err("set 'path' or 'url', not both".into()),
            (Some(_), None) => {}
            (None, Some(url)) => {
                Location::remote(url, Access::default()).map_err(|error| error.to_string())?;
            }
        }
        if source("password", &self.password_file, &self.password_command, &self.password_env)?.is_none() {
            return Err("set one of 'password-file', 'password-command' and 'password-env'".into());
        }
        source("secret", &self.secret_file, &self.secret_command, &self.secret_env)?;
        if self.timeout_s == Some(0) {
            return Err("timeout-s must be at least 1".into());
        }
        Ok(())
    }

    /// Its password.
    pub fn password(&self) -> Result<Secret, Failure> {
        let found = source("password", &self.password_file, &self.password_command, &self.password_env);
        match found.map_err(|why| Failure::new(Code::Config, why))? {
            Some(source) => secret(&source),
            None => Err(Failure::new(Code::Config, "no password is set")),
        }
    }

    /// Where it is and how to get in.
    pub fn location(&self) -> Result<Location, Failure> {
        if let Some(path) = &self.path {
            return Ok(Location::local(path));
        }
        let found = source("secret", &self.secret_file, &self.secret_command, &self.secret_env);
        let found = found.map_err(|why| Failure::new(Code::Config, why))?;
        let access = Access {
            user: self.user.clone(),
            secret: found.as_ref().map(secret).transpose()?,
            ca_file: self.ca_file.clone(),
            region: self.region.clone(),
            ssh_options: self.ssh_options.clone(),
            timeout: self.timeout_s.map_or(Access::default().timeout, Duration::from_secs),
        };
        Ok(Location::remote(self.url.as_deref().unwrap_or_default(), access)?)
    }
}

/// The one place of a secret that is set, if any is.
fn source<'a>(
    what: &str,
    file: &'a Option<PathBuf>,
    command: &'a Option<Vec<String>>,
    variable: &'a Option<String>,
) -> Result<Option<Source<'a>>, String> {
    match (file, command, variable) {
        (None, None, None) => Ok(None),
        (Some(file), None, None) => Ok(Some(Source::File(file))),
        (None, Some(command), None) if command.is_empty() => Err(format!("{what}-command names no program")),
        (None, Some(command), None) => Ok(Some(Source::Command(command))),
        (None, None, Some(variable)) => Ok(Some(Source::Variable(variable))),
        _ => Err(format!("set only one of '{what}-file', '{what}-command' and '{what}-env'")),
    }
}

/// Fetches a secret. No error shows anything of it.
fn secret(source: &Source<'_>) -> Result<Secret, Failure> {
    let text = match source {
        Source::File(path) => std::fs::read_to_string(path)
            .map_err(|error| Failure::io("read the password or secret in", path, &error))?,
        Source::Command(command) => printed(command)?,
        Source::Variable(name) => std::env::var(name).map_err(|_| {
            Failure::new(Code::Config, format!("the variable {name} with the password or secret is not set"))
        })?,
    };
    // The first line: what else a file or a program says is not it.
    Ok(Secret::new(text.lines().next().unwrap_or_default().to_owned()))
}

/// What a program prints. It gets nothing to read, and may say on our standard error why it fails.
fn printed(command: &[String]) -> Result<String, Failure> {
    let (program, arguments) = command.split_first().map_or(("", &[][..]), |(first, rest)| (first, rest));
    let failed = |why: String| {
        let message = format!("the program {program:?} that should give a password or secret {why}");
        // It may ask a service that is away for a while.
        Failure::transient(Code::Repository, message)
    };
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::new(Code::Config, format!("there is no program {program:?}")),
        _ => failed(format!("cannot be started: {error}")),
    })?;
    if !output.status.success() {
        return Err(failed(format!("ended with {}", output.status)));
    }
    String::from_utf8(output.stdout).map_err(|_| failed("printed what is no text".into()))
}

/// Opens a repository of the site in `dir` by its name in the config. Blocks for some tenths of a second.
pub fn open_repository(dir: &Path, config: &Config, name: &str) -> Result<Repository, Failure> {
    let settings = config.repository(dir, name)?;
    let opened = Repository::open(settings.location()?, settings.password()?.expose());
    opened.map_err(|error| named(name, error.into()))
}

/// The same failure with the repository's name in it.
pub fn named(name: &str, failure: Failure) -> Failure {
    Failure { message: format!("repository {name}: {}", failure.message), ..failure }
}

/// Repositories that stay open from one use to the next, the same for all who use one at a time: to try a password is slow on purpose, and the
/// index of a large repository is worth keeping.
pub(crate) struct OpenRepositories {
    dir: PathBuf,
    config: Arc<Config>,
    slots: Mutex<Vec<Slot>>,
}

/// The place of one repository, by its name. The one used last comes last.
#[derive(Clone)]
struct Slot {
    name: String,
    open: Arc<Mutex<Option<Open>>>,
}

struct Open {
    password: Secret,
    repository: Arc<Repository>,
}

/// Beside the one used last, only so much memory is spent on others: some 700,000 chunks, 500 GB of backups.
const OTHERS_BYTES_MAX: usize = 32 << 20;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OpenRepositories {
    pub fn new(dir: PathBuf, config: Arc<Config>) -> Self {
        Self { dir, config, slots: Mutex::default() }
    }

    /// The open one, if its place and password are still what they were and it is still there; else it is opened.
    /// Several that want one at the same time get the same; a server that does not answer keeps nobody waiting who
    /// wants another. Blocks.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Repository>, Failure> {
        let settings = self.config.repository(&self.dir, name)?;
        let (location, password) = (settings.location()?, settings.password()?);
        let slot = self.slot(name);
        let repository = {
            let mut open = locked(&slot.open);
            let fits = |known: &Open| known.password == password && *known.repository.location() == location;
            let kept = open.take().filter(fits);
            let used = match kept {
                Some(kept) if kept.repository.is_there().map_err(|error| named(name, error.into()))? => kept,
                _ => {
                    let repository = Repository::open(location, password.expose());
                    let repository = Arc::new(repository.map_err(|error| named(name, error.into()))?);
                    Open { password, repository }
                }
            };
            open.insert(used).repository.clone()
        };
        self.make_room();
        Ok(repository)
    }

    /// After an error nothing that was kept in memory is trusted.
    pub(crate) fn forget(&self, name: &str) {
        locked(&self.slots).retain(|slot| slot.name != name);
    }

    fn slot(&self, name: &str) -> Slot {
        let mut slots = locked(&self.slots);
        let place = slots.iter().position(|slot| slot.name == name);
        let slot = place.map(|place| slots.remove(place));
        let slot = slot.unwrap_or_else(|| Slot { name: name.to_owned(), open: Arc::default() });
        slots.push(slot.clone());
        slot
    }

    /// Closes those that have not been used for the longest time.
    fn make_room(&self) {
        let mut bytes = 0;
        locked(&self.slots).iter().rev().skip(1).for_each(|slot| {
            // One that is just being opened will be used.
            let Ok(mut open) = slot.open.try_lock() else { return };
            bytes += open.as_ref().map_or(0, |open| open.repository.memory_bytes());
            if bytes > OTHERS_BYTES_MAX {
                *open = None;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<RepositorySettings, String> {
        let settings: RepositorySettings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map(|()| settings)
    }

    #[test]
    fn what_is_missing_or_said_twice_is_named() {
        let error = |text: &str| settings(text).unwrap_err();
        assert!(error("password-file = \"p\"").contains("'path'"));
        assert!(error("path = \"r\"").contains("'password-command'"));
        assert!(error("path = \"r\"\nurl = \"rest:http://h\"\npassword-env = \"P\"").contains("not both"));
        let twice = "path = \"r\"\npassword-env = \"P\"\npassword-file = \"p\"";
        assert!(error(twice).contains("only one of"));
        assert!(error("url = \"ftp:x\"\npassword-env = \"P\"").contains("'rest:'"));
        assert!(error("path = \"r\"\npassword-command = []").contains("no program"));
    }

    #[test]
    fn a_secret_comes_from_one_of_three_places_and_shows_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("p"), "from a file\nnot this\n").unwrap();
        let from = |text: &str| {
            let settings = settings(&format!("path = \"r\"\n{text}")).unwrap().within(folder.path());
            settings.password()
        };
        assert_eq!(from("password-file = \"p\"").unwrap().expose(), "from a file");
        let command = from("password-command = [\"printf\", \"a %s\\\\n\", \"b\"]").unwrap();
        assert_eq!(command.expose(), "a b");
        assert_eq!(from("password-env = \"PATH\"").unwrap().expose(), std::env::var("PATH").unwrap());
        assert!(from("password-env = \"NOT_SET\"").unwrap_err().message.contains("NOT_SET"));
        let failed = from("password-command = [\"sh\", \"-c\", \"echo hidden; exit 3\"]").unwrap_err();
        assert!(failed.transient && failed.message.contains("3") && !failed.message.contains("hidden"));
        assert!(from("password-command = [\"no-such-program\"]").unwrap_err().message.contains("no program"));
    }
}
