//! `backups`, `restore` and `verify`: they read a repository and need no running site, so that the last copy
//! can be brought back when nothing else works.

mod onto;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use model::VmName;
use repository::{BackupInfo, DamagedRange, Repository, RestoreOptions, VerifyOptions};
use serde_json::{Value, json};
use site::{Code, Config, Failure, Progress};

use crate::Said;
use crate::args::{Arguments, Format, Restore};
use crate::progress::Bar;
use crate::show;

/// How often a person is shown how far it is.
const SHOW_INTERVAL: Duration = Duration::from_millis(100);

/// Opens a repository of the site in `dir`.
pub fn open(dir: &Path, name: &str) -> Result<Repository, Failure> {
    site::open_repository(dir, &Config::load(dir)?, name)
}

/// Runs what takes a while on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
}

/// Runs what reads much on a thread of its own; SIGINT ends it.
pub async fn run<T: Send + 'static>(
    arguments: &Arguments,
    what: &str,
    work: impl FnOnce(&dyn Fn(repository::Progress), &AtomicBool) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (shown, what) = (Arc::new(std::sync::Mutex::new(repository::Progress::default())), what.to_owned());
    let working = tokio::task::spawn_blocking({
        let (shown, cancel) = (shown.clone(), cancel.clone());
        move || {
            let show = move |progress| {
                if let Ok(mut shown) = shown.lock() {
                    *shown = progress;
                }
            };
            work(&show, &cancel)
        }
    });
    let bar = Bar::new(arguments);
    tokio::pin!(working);
    let mut looks = tokio::time::interval(SHOW_INTERVAL);
    let outcome = loop {
        tokio::select! {
            outcome = &mut working => break outcome,
            _ = looks.tick() => {
                let now = shown.lock().map(|shown| *shown).unwrap_or_default();
                let (done_bytes, total_bytes) = (now.done_bytes, now.total_bytes);
                bar.show(&Progress { message: what.clone(), done_bytes, total_bytes });
            }
            _ = tokio::signal::ctrl_c() => cancel.store(true, Ordering::SeqCst),
        }
    };
    bar.clear();
    outcome.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
}

/// The backups there are.
pub async fn list(dir: &Path, repository: &str, vm: Option<&VmName>) -> Result<Said, Failure> {
    let (dir, repository, vm) = (dir.to_owned(), repository.to_owned(), vm.cloned());
    let listed = tokio::task::spawn_blocking(move || {
        let mut backups = open(&dir, &repository)?.backups(None).map_err(Failure::from)?;
        backups.retain(|backup| vm.as_ref().is_none_or(|vm| backup.vm_name == *vm));
        Ok::<_, Failure>(backups)
    });
    let backups = listed.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))??;
    let shown: Vec<Value> = backups.iter().map(describe).collect();
    let text = table(&shown);
    Ok(Said::new(json!({ "backups": shown }), text))
}

/// A backup as `backups` lists it.
fn describe(backup: &BackupInfo) -> Value {
    json!({
        "id": backup.id, "vm": backup.vm_name, "point": backup.point.id, "number": backup.point.number,
        "taken_at": site::rfc3339(backup.point.taken_at), "made_at": site::rfc3339(backup.made_at),
        "consistency": backup.point.consistency, "bytes": backup.disk_bytes(),
        "bytes_read": backup.bytes_read, "bytes_added": backup.bytes_added, "seconds": backup.seconds,
        "parent": backup.parent, "policy": backup.policy,
        "disks": backup.disks.iter().map(|disk| json!({
            "name": disk.name, "size_bytes": disk.size_bytes, "digest": disk.digest,
        })).collect::<Vec<_>>(),
    })
}

fn table(backups: &[Value]) -> String {
    if backups.is_empty() {
        return "No backups.".into();
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rows: Vec<_> = backups
        .iter()
        .map(|backup| {
            vec![
                text(&backup["id"]).chars().take(8).collect(),
                text(&backup["vm"]),
                show::moment(&backup["taken_at"]),
                text(&backup["consistency"]),
                show::bytes(&backup["bytes"]),
                show::bytes(&backup["bytes_added"]),
                if backup["parent"].is_null() { "full" } else { "incremental" }.to_owned(),
            ]
        })
        .collect();
    show::table(&["BACKUP", "VM", "AS IT WAS AT", "CONSISTENCY", "DISKS", "ADDED", "KIND"], &rows)
}

/// Restores a backup to a folder, or onto what is there.
pub async fn restore(arguments: &Arguments, restore: &Restore) -> Result<Said, Failure> {
    let Some(to) = &restore.to else { return onto::restore(arguments, restore).await };
    let options = RestoreOptions {
        to: to.clone(),
        format: match restore.format {
            Format::Raw => repository::Format::Raw,
            Format::Qcow2 => repository::Format::Qcow2,
            Format::Vhdx => repository::Format::Vhdx,
        },
        disks: (!restore.disks.is_empty()).then(|| restore.disks.clone()),
        keep_going: restore.keep_going,
        overwrite: restore.overwrite,
    };
    let (dir, name) = (arguments.dir.clone(), restore.repository.repository.clone());
    let (vm, wanted) = (restore.vm.clone(), restore.backup.clone());
    let (backup, report) = run(arguments, "restoring", move |progress, cancel| {
        let repository = open(&dir, &name)?;
        let backup = site::find_backup(&repository, &vm, &wanted)?;
        let report = repository.restore(&backup, &options, progress, cancel)?;
        Ok((backup, report))
    })
    .await?;
    let mut json = json!(report);
    json["backup"] = json!(backup.id);
    json["point"] = json!(backup.point.id);
    json["taken_at"] = json!(site::rfc3339(backup.point.taken_at));
    let mut text = format!("{} as it was at {}:\n", restore.vm, show::moment(&json["taken_at"]));
    for disk in &report.disks {
        text.push_str(&format!("  {}  {}\n", disk.path.display(), show::bytes(&json!(disk.size_bytes))));
    }
    text.push_str(&damages(&report.damaged));
    // Whoever asked to keep going has what could be saved, and is not told that all is well.
    let status = u8::from(!report.damaged.is_empty());
    Ok(Said { json, text, status })
}

/// What could not be restored, for a person.
fn damages(damaged: &[DamagedRange]) -> String {
    let line = |DamagedRange { disk, offset, len, why }: &DamagedRange| {
        format!("  DAMAGED: disk {disk} at offset {offset}, {len} bytes left as zeros: {why}\n")
    };
    damaged.iter().map(line).collect()
}

/// Reads backups and compares them with their checksums.
pub async fn verify(
    arguments: &Arguments,
    repository: &str,
    vm: Option<&VmName>,
    backup: Option<&str>,
) -> Result<Said, Failure> {
    let (dir, name) = (arguments.dir.clone(), repository.to_owned());
    let (vm, wanted) = (vm.cloned(), backup.map(str::to_owned));
    let report = run(arguments, "verifying", move |progress, cancel| {
        let repository = open(&dir, &name)?;
        let backup = wanted.map(|id| repository.find(&id)).transpose()?.map(|backup| backup.id);
        let vm =
            vm.map(|vm| site::find_backup(&repository, &vm, "latest")).transpose()?.map(|backup| backup.vm);
        Ok(repository.verify(&VerifyOptions { vm, backup, read_data: true }, progress, cancel)?)
    })
    .await?;
    let mut text = format!(
        "{} backups, {} chunks, {} read in {:.1} s: ",
        report.backups,
        report.chunks,
        show::bytes(&json!(report.bytes_read)),
        report.seconds
    );
    let Some(first) = report.damaged.first() else {
        text.push_str("all is as it was written.");
        return Ok(Said::new(json!(report), text));
    };
    let what = match (&first.vm_name, &first.disk) {
        (Some(vm), Some(disk)) => format!("VM {vm}, disk {disk}, offset {}: {}", first.offset, first.why),
        (Some(vm), None) => format!("VM {vm}: {}", first.why),
        _ => first.why.clone(),
    };
    let count = report.damaged.len();
    let message = format!("{text}{count} damaged ranges; the first: {what}");
    Err(Failure::new(Code::Damaged, message))
}
