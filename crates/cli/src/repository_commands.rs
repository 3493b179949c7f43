//! `repository …`: what is done with a repository as a whole. No site needs to run for it.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use repository::{BackupId, BackupInfo, PruneOptions, Repository, Secret};
use serde_json::{Value, json};
use site::{Code, Config, Failure, RepositorySettings, named};

use crate::Said;
use crate::args::Arguments;
use crate::repositories::{blocking, open, run};
use crate::repository_args::{KeyCommand, RepositoryCommand};
use crate::show;

/// Does what is asked of a repository.
pub async fn command(arguments: &Arguments, command: &RepositoryCommand) -> Result<Said, Failure> {
    let dir = arguments.dir.as_path();
    match command {
        RepositoryCommand::List => list(dir).await,
        RepositoryCommand::Init(repository) => init(dir, &repository.name).await,
        RepositoryCommand::Check { repository, read_data } => {
            check(arguments, &repository.name, *read_data).await
        }
        RepositoryCommand::Forget { repository, backups } => forget(dir, &repository.name, backups).await,
        RepositoryCommand::Prune { repository, forget, unused, wait } => {
            let options = PruneOptions { unused_percent: *unused, patience: *wait };
            prune(arguments, &repository.name, forget, options).await
        }
        RepositoryCommand::Copy { from, to, backups } => copy(arguments, from, to, backups).await,
        RepositoryCommand::Password { repository, new } => password(dir, &repository.name, new).await,
        RepositoryCommand::Key(command) => key(dir, command).await,
        RepositoryCommand::Unlock { repository, all } => unlock(dir, &repository.name, *all).await,
    }
}

async fn list(dir: &Path) -> Result<Said, Failure> {
    let config = Config::load(dir)?;
    let dir = dir.to_owned();
    let shown = blocking(move || {
        let describe = |name: &String| {
            let settings = config.repository(&dir, name)?;
            let at = settings.path.map(|path| path.display().to_string()).or(settings.url);
            let found = site::open_repository(&dir, &config, name)
                .and_then(|repository| Ok(repository.backups(None)?.len()));
            Ok(match found {
                Ok(backups) => json!({ "name": name, "at": at, "backups": backups, "error": null }),
                Err(failure) => json!({ "name": name, "at": at, "backups": null, "error": failure }),
            })
        };
        config.repositories.keys().map(describe).collect::<Result<Vec<Value>, Failure>>()
    })
    .await?;
    let rows: Vec<_> = shown
        .iter()
        .map(|shown| {
            let text = |field: &str| shown[field].as_str().unwrap_or("-").to_owned();
            let state = match shown["error"]["message"].as_str() {
                Some(why) => why.to_owned(),
                None => format!("{} backups", shown["backups"]),
            };
            vec![text("name"), text("at"), state]
        })
        .collect();
    let text = show::table(&["REPOSITORY", "AT", "STATE"], &rows);
    Ok(Said::new(json!({ "repositories": shown }), text))
}

async fn init(dir: &Path, name: &str) -> Result<Said, Failure> {
    let settings = Config::load(dir)?.repository(dir, name)?;
    let owned = name.to_owned();
    let at = blocking(move || {
        let location = settings.location()?;
        let at = location.to_string();
        Repository::create(location, settings.password()?.expose())
            .map_err(|error| named(&owned, error.into()))?;
        Ok(at)
    })
    .await?;
    let text = format!(
        "Repository {name} is ready at {at}. Keep a copy of its password elsewhere: without it no backup can be read."
    );
    Ok(Said::new(json!({ "name": name, "at": at }), text))
}

async fn check(arguments: &Arguments, name: &str, read_data: bool) -> Result<Said, Failure> {
    let (dir, name) = (arguments.dir.clone(), name.to_owned());
    let report = run(arguments, "checking", move |progress, cancel| {
        Ok(open(&dir, &name)?.check(read_data, progress, cancel)?)
    })
    .await?;
    let backups = &report.backups;
    let mut text = format!(
        "{} backups, {} chunks, {} packs with {}{}\n",
        backups.backups,
        backups.chunks,
        report.packs.files,
        show::bytes(&json!(report.packs.bytes)),
        if read_data { ", every byte read" } else { "" }
    );
    if report.unindexed.files > 0 {
        let bytes = show::bytes(&json!(report.unindexed.bytes));
        text.push_str(&format!(
            "{} packs with {bytes} are left of runs that were cut off; 'repository prune' removes them.\n",
            report.unindexed.files
        ));
    }
    report.locks.iter().for_each(|lock| text.push_str(&format!("locked by {lock}\n")));
    if report.is_well() {
        text.push_str("All is as it was written.");
        return Ok(Said::new(json!(report), text));
    }
    for pack in &report.missing {
        text.push_str(&format!("DAMAGED: pack {pack} is missing\n"));
    }
    for damage in &backups.damaged {
        let vm = damage.vm_name.as_ref().map_or("-", |name| name.as_str());
        let disk = damage.disk.as_ref().map_or("-", |disk| disk.as_str());
        text.push_str(&format!(
            "DAMAGED: backup {}, VM {vm}, disk {disk}, offset {}, {} bytes: {}\n",
            damage.backup.map_or_else(|| "-".into(), |id| id.short()),
            damage.offset,
            damage.len,
            damage.why
        ));
    }
    Ok(Said { json: json!(report), text, status: 1 })
}

/// The backups that a person names.
fn found(repository: &Repository, wanted: &[String]) -> Result<Vec<BackupInfo>, Failure> {
    wanted.iter().map(|id| Ok(repository.find(id)?)).collect()
}

fn ids(backups: &[BackupInfo]) -> Vec<BackupId> {
    backups.iter().map(|backup| backup.id).collect()
}

async fn forget(dir: &Path, name: &str, wanted: &[String]) -> Result<Said, Failure> {
    let (dir, name, wanted) = (dir.to_owned(), name.to_owned(), wanted.to_owned());
    let forgotten = blocking(move || {
        let repository = open(&dir, &name)?;
        Ok(repository.forget(&ids(&found(&repository, &wanted)?))?)
    })
    .await?;
    let text = format!("{} backups forgotten; 'repository prune' gives back their room.", forgotten.len());
    Ok(Said::new(json!({ "forgotten": forgotten }), text))
}

async fn prune(
    arguments: &Arguments,
    name: &str,
    wanted: &[String],
    options: PruneOptions,
) -> Result<Said, Failure> {
    let (dir, name, wanted) = (arguments.dir.clone(), name.to_owned(), wanted.to_owned());
    let (forgotten, report) = run(arguments, "pruning", move |_, cancel| {
        let repository = open(&dir, &name)?;
        let forgotten = match &wanted[..] {
            [] => Vec::new(),
            wanted => repository.forget(&ids(&found(&repository, wanted)?))?,
        };
        Ok((forgotten, repository.prune(&options, cancel)?))
    })
    .await?;
    let freed = report.bytes_before.saturating_sub(report.bytes);
    let text = format!(
        "{} backups forgotten; {} packs with {} left, {} freed in {:.1} s.",
        forgotten.len(),
        report.packs,
        show::bytes(&json!(report.bytes)),
        show::bytes(&json!(freed)),
        report.seconds
    );
    let mut json = json!(report);
    json["forgotten"] = json!(forgotten);
    Ok(Said::new(json, text))
}

async fn copy(arguments: &Arguments, from: &str, to: &str, wanted: &[String]) -> Result<Said, Failure> {
    if from == to {
        return Err(Failure::new(Code::Usage, "--from and --to name the same repository"));
    }
    let dir = arguments.dir.clone();
    let (from, to, wanted) = (from.to_owned(), to.to_owned(), wanted.to_owned());
    let report = run(arguments, "copying", move |progress, cancel| {
        let (source, target) = (open(&dir, &from)?, open(&dir, &to)?);
        let backups = if wanted.is_empty() { source.backups(None)? } else { found(&source, &wanted)? };
        Ok(source.copy(&backups, &target, progress, cancel)?)
    })
    .await?;
    let mut text = format!(
        "{} backups copied, {} there already; {} read, {} added in {:.1} s.\n",
        report.copied.len(),
        report.there.len(),
        show::bytes(&json!(report.bytes_read)),
        show::bytes(&json!(report.bytes_added)),
        report.seconds
    );
    for (backup, why) in &report.damaged {
        text.push_str(&format!("DAMAGED, not copied: backup {}: {why}\n", backup.short()));
    }
    let status = u8::from(!report.damaged.is_empty());
    Ok(Said { json: json!(report), text, status })
}

/// The first line of a file, or of standard input.
fn new_password(file: &Path) -> Result<Secret, Failure> {
    let text = if file == Path::new("-") {
        let mut text = String::new();
        let read = std::io::stdin().read_to_string(&mut text);
        read.map(|_| text)
            .map_err(|error| Failure::io("read the new password from", Path::new("-"), &error))?
    } else {
        std::fs::read_to_string(file)
            .map_err(|error| Failure::io("read the new password in", file, &error))?
    };
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret::new(line.to_owned())),
        _ => Err(Failure::new(Code::Usage, format!("{} has no password in its first line", file.display()))),
    }
}

/// In this order either password opens the repository at any time, and the config's always does.
async fn password(dir: &Path, name: &str, file: &Path) -> Result<Said, Failure> {
    let settings = Config::load(dir)?.repository(dir, name)?;
    let new = new_password(file)?;
    let owned = name.to_owned();
    let (key, removed, written) = blocking(move || {
        let old = Repository::open(settings.location()?, settings.password()?.expose())
            .map_err(|error| named(&owned, error.into()))?;
        let replaced = old.keys()?.into_iter().find(|key| key.current);
        let user = replaced.as_ref().map_or("afterimage", |key| key.user.as_str());
        let key = old.add_key(new.expose(), if user.is_empty() { "afterimage" } else { user })?;
        let written = write_password(&settings, &new)?;
        // Only what was opened with the new one may take the old one away.
        let opened = Repository::open(settings.location()?, new.expose())?;
        let removed = replaced.map(|key| opened.remove_key(&key.id.to_string())).transpose()?;
        Ok((key, removed, written))
    })
    .await?;
    let mut text = format!("The password of repository {name} is changed.");
    if !written {
        text.push_str(" The config takes it from a program or a variable: let that give the new one now.");
    }
    Ok(Said::new(json!({ "repository": name, "key": key, "removed": removed }), text))
}

/// Puts the new password into the file that the config names, if it names one.
fn write_password(settings: &RepositorySettings, password: &Secret) -> Result<bool, Failure> {
    let Some(path) = &settings.password_file else { return Ok(false) };
    let partial = path.with_extension("partial");
    let written = (|| {
        let mut file =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        std::io::Write::write_all(&mut file, password.expose().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        std::fs::File::open(path.parent().unwrap_or(path))?.sync_all()
    })();
    written.map(|()| true).map_err(|error| Failure::io("write the new password to", path, &error))
}

async fn key(dir: &Path, command: &KeyCommand) -> Result<Said, Failure> {
    match command {
        KeyCommand::List(repository) => keys(dir, &repository.name).await,
        KeyCommand::Add { repository, new, user } => {
            let (password, user) = (new_password(new)?, user.clone());
            let (dir, name) = (dir.to_owned(), repository.name.clone());
            let key = blocking(move || Ok(open(&dir, &name)?.add_key(password.expose(), &user)?)).await?;
            let text = format!("Key {} of repository {} is made.", key.short(), repository.name);
            Ok(Said::new(json!({ "key": key }), text))
        }
        KeyCommand::Remove { repository, key } => {
            let (dir, name, key) = (dir.to_owned(), repository.name.clone(), key.clone());
            let key = blocking(move || Ok(open(&dir, &name)?.remove_key(&key)?)).await?;
            let text = format!("Key {} of repository {} is removed.", key.short(), repository.name);
            Ok(Said::new(json!({ "removed": key }), text))
        }
    }
}

async fn keys(dir: &Path, name: &str) -> Result<Said, Failure> {
    let (dir, name) = (dir.to_owned(), name.to_owned());
    let keys = blocking(move || Ok(open(&dir, &name)?.keys()?)).await?;
    let rows: Vec<_> = keys
        .iter()
        .map(|key| {
            let mark = if key.current { "*" } else { "" };
            let created = key.created.chars().take(19).collect();
            vec![format!("{}{mark}", key.id.short()), key.user.clone(), key.host.clone(), created]
        })
        .collect();
    let text = show::table(&["KEY", "FOR", "MADE ON", "AT"], &rows);
    Ok(Said::new(json!({ "keys": keys }), text))
}

async fn unlock(dir: &Path, name: &str, all: bool) -> Result<Said, Failure> {
    let (dir, name) = (dir.to_owned(), name.to_owned());
    let unlocked = blocking(move || Ok(open(&dir, &name)?.unlock(all)?)).await?;
    let mut text = format!("{} locks removed.\n", unlocked.removed.len());
    for holder in &unlocked.kept {
        text.push_str(&format!("Still locked by {holder}.\n"));
    }
    Ok(Said::new(json!(unlocked), text))
}
