//! Instant recovery: a VM is started from a backup, without restoring it first, and moved to files of its own while
//! it runs.
//!
//! ```text
//!  start: a layer per disk over the backup's NBD export ─▶ QEMU ──move──▶ files of its own; nothing of ours is needed
//!                           │ drop: layers and VM are gone
//! ```
//!
//! Like a VM that was failed over it outlives the site: its QEMU waits for the export to come back, and the site shows
//! it again when it starts. What is known of it is in `DIR/recovered/VM`.

mod record;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use boot::{Live, LiveDisk};
use model::VmName;
use qemu::{Moving, Qmp, move_disk};
use repository::{BackupInfo, Repository};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::clock::rfc3339;
use crate::commands::Site;
use crate::control::Reporter;
use crate::events::Event;
use crate::exports::backup_export;
use crate::failure::{Code, Failure};
use crate::request::{Recover, RecoverRequest};
use crate::running::{Stop, shown as shown_start};
use record::{Place, RecoveredDisk, Recovery};

/// How long QEMU's monitor may take to answer.
const MONITOR: Duration = Duration::from_secs(10);
/// How long QEMU waits for the export when the site is gone, in seconds: as for a VM that was failed over.
const RECONNECT_S: u32 = 86_400;

/// The backup that a person means: `latest`, or the first digits of an id. It must be one of that VM. Blocks.
pub fn find_backup(repository: &Repository, vm: &VmName, wanted: &str) -> Result<BackupInfo, Failure> {
    if wanted == "latest" {
        let newest = repository.backups(None)?.into_iter().rfind(|backup| backup.vm_name == *vm);
        return newest.ok_or_else(|| {
            let message = format!("there is no backup of {vm}; 'afterimage backups' lists what there is");
            Failure::new(Code::NoSuchBackup, message)
        });
    }
    let backup = repository.find(wanted)?;
    if backup.vm_name == *vm {
        return Ok(backup);
    }
    let message = format!("backup {} is of {}, not of {vm}", backup.id.short(), backup.vm_name);
    Err(Failure::new(Code::NoSuchBackup, message))
}

impl Site {
    pub(crate) async fn recover(
        self: &Arc<Self>,
        request: RecoverRequest,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        match request {
            RecoverRequest::Start(recover) => self.recover_vm(recover).await,
            RecoverRequest::Stop { vm, within_s } => {
                let how = within_s.map_or(Stop::PullThePlug, |s| Stop::ShutDown(Duration::from_secs(s)));
                self.known_recovery(&vm)?;
                self.stop_live(&vm, &self.recovered(&vm), how).await
            }
            RecoverRequest::Move { vm, to } => self.move_recovered(&vm, to, reporter).await,
            RecoverRequest::Drop { vm } => self.drop_recovered(&vm).await,
            RecoverRequest::List => self.list_recovered(),
        }
    }

    fn recovered(&self, vm: &VmName) -> Live {
        Live::at(self.dir.join("recovered").join(vm.as_str()))
    }

    fn known_recovery(&self, vm: &VmName) -> Result<Recovery, Failure> {
        Recovery::read(&self.recovered(vm))?.ok_or_else(|| {
            let message = format!(
                "{vm} was not recovered here; 'afterimage recover start {vm} --backup ID' starts it from a backup"
            );
            Failure::new(Code::NoSuchVm, message)
        })
    }

    async fn recover_vm(self: &Arc<Self>, recover: Recover) -> Result<Value, Failure> {
        let Recover { vm, backup, repository, connect, only_show } = recover;
        let live = self.recovered(&vm);
        let began = Instant::now();
        let known = Recovery::read(&live)?;
        let is_new = known.is_none();
        let recovery = match (known, backup) {
            (None, Some(backup)) => self.begin_recovery(&vm, &live, backup, repository, connect).await?,
            (Some(known), None) => Recovery { connected: connect, ..known },
            (Some(known), Some(_)) => {
                let message = format!(
                    "{vm} is recovered already, from the backup of {}; 'afterimage recover drop {vm}' drops that and what it has written, \
                     'afterimage recover start {vm}' without --backup starts it again",
                    rfc3339(known.taken_at)
                );
                return Err(Failure::new(Code::Exists, message));
            }
            (None, None) => {
                let message =
                    format!("name the backup that {vm} is to be recovered from: --backup ID, or latest");
                return Err(Failure::new(Code::Usage, message));
            }
        };
        if !is_new && !recovery.is_moved() {
            self.show_recovery(&recovery).await?;
        }
        let shown_after = began.elapsed();
        let started = self.start_recovered(&recovery, &live, only_show).await;
        if is_new && (only_show || started.is_err()) {
            live.forget()?;
            self.exports.hide_backup(&recovery.export()).await;
        }
        let mut answer = started?;
        answer["shown_ms"] = json!(shown_after.as_secs_f64() * 1000.0);
        Ok(answer)
    }

    async fn start_recovered(
        self: &Arc<Self>,
        recovery: &Recovery,
        live: &Live,
        only_show: bool,
    ) -> Result<Value, Failure> {
        let vm = &recovery.vm;
        if recovery.connected && self.live(vm).process().is_some() {
            let message = format!("{vm} runs here already, after a failover; recover it without --connect");
            return Err(Failure::new(Code::Exists, message));
        }
        let live_disk = |disk: &RecoveredDisk| {
            let path = recovery.current(live, disk);
            (disk.boot_rank, LiveDisk { name: disk.name.to_string(), path })
        };
        let disks = recovery.disks.iter().map(live_disk).collect();
        let prepared = self.prepare(vm, live, &recovery.definition, disks, recovery.connected).await?;
        if !only_show {
            let named =
                |error: boot::Error| Failure::new(Code::Boot, format!("{vm} cannot be started: {error}"));
            live.start(&prepared.command).await.map_err(named)?;
            recovery.write(live)?;
            let what = format!("it was started from the backup of {}", rfc3339(recovery.taken_at));
            self.events.note(Event::new("vm-recovered", what).vm(vm)).await;
            if recovery.connected {
                self.give_addresses(vm.clone(), live.clone(), prepared.addresses.clone());
            }
        }
        let (start, mut answer) = (shown_start(vm, live, &prepared), recovery.shown(live));
        answer["networks"] = start["networks"].clone();
        answer["command"] = start["command"].clone();
        Ok(answer)
    }

    /// Makes the layers over a backup, and writes down what they are.
    async fn begin_recovery(
        self: &Arc<Self>,
        vm: &VmName,
        live: &Live,
        backup: String,
        repository: String,
        connected: bool,
    ) -> Result<Recovery, Failure> {
        let (site, name, wanted) = (self.clone(), vm.clone(), backup);
        let opened = tokio::task::spawn_blocking(move || {
            let (exports, opened) = (&site.exports, site.repositories.get(&repository)?);
            let backup = find_backup(&opened, &name, &wanted)?;
            // Damaged or not, it keeps nobody from the disks.
            let definition = opened.definition(&backup).unwrap_or_default();
            let mut recovery = Recovery {
                vm: name,
                backup: backup.id.to_string(),
                repository,
                taken_at: backup.point.taken_at,
                definition,
                connected,
                disks: Vec::new(),
                to: None,
            };
            let ranks = exports.show_backup(&recovery.export(), opened.reader(&backup)?)?;
            let disk = |(disk, boot_rank): (repository::BackupDisk, u8)| RecoveredDisk {
                name: disk.name,
                size_bytes: disk.size_bytes,
                boot_rank,
                place: Place::Layer,
            };
            recovery.disks = backup.disks.into_iter().zip(ranks).map(disk).collect();
            Ok::<_, Failure>(recovery)
        });
        let recovery = opened.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))??;
        let made = self.make_layers(live, &recovery).await;
        if let Err(failure) = made.and_then(|()| recovery.write(live)) {
            self.exports.hide_backup(&recovery.export()).await;
            let _ = live.forget();
            return Err(failure);
        }
        Ok(recovery)
    }

    async fn make_layers(&self, live: &Live, recovery: &Recovery) -> Result<(), Failure> {
        live.make_folder()?;
        for disk in &recovery.disks {
            let below = json!({
                "driver": "raw",
                "file": {
                    "driver": "nbd", "export": backup_export(&recovery.export(), disk.name.as_str()),
                    "reconnect-delay": RECONNECT_S,
                    "server": { "type": "unix", "path": self.exports.socket() },
                },
            });
            let (layer, below) = (Recovery::layer(live, disk), format!("json:{below}"));
            make_qcow2(&layer, disk.size_bytes, &["-u", "-F", "raw", "-b", &below]).await?;
        }
        Ok(())
    }

    /// Shows the backup below a recovered VM's layers.
    async fn show_recovery(self: &Arc<Self>, recovery: &Recovery) -> Result<(), Failure> {
        let (site, recovery) = (self.clone(), recovery.clone());
        let shown = tokio::task::spawn_blocking(move || {
            let (exports, opened) = (&site.exports, site.repositories.get(&recovery.repository)?);
            let backup = opened.find(&recovery.backup)?;
            exports.show_backup(&recovery.export(), opened.reader(&backup)?).map(drop)
        });
        shown.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
    }

    /// What is needed of recoveries of before this start: their backups are shown again, and moves go on.
    pub(crate) async fn take_up_recoveries(self: &Arc<Self>) {
        let folders = std::fs::read_dir(self.dir.join("recovered")).into_iter().flatten().flatten();
        for vm in folders.filter_map(|folder| folder.file_name().to_str()?.parse::<VmName>().ok()) {
            let recovery = match Recovery::read(&self.recovered(&vm)) {
                Ok(Some(recovery)) if !recovery.is_moved() => recovery,
                Ok(_) => continue,
                Err(failure) => {
                    self.events.note(Event::new("recovery-lost", failure.message).vm(&vm)).await;
                    continue;
                }
            };
            if let Err(failure) = self.show_recovery(&recovery).await {
                let what =
                    format!("the backup that it runs from cannot be shown to its QEMU: {}", failure.message);
                self.events.note(Event::new("recovery-not-shown", what).vm(&vm)).await;
            }
            if let Some(to) = recovery.to.filter(|_| self.recovered(&vm).process().is_some()) {
                let site = self.clone();
                tokio::spawn(async move {
                    let moved = site.move_recovered(&vm, to, &Reporter::to_nobody()).await;
                    if let Err(failure) = moved {
                        let what = format!("its move did not go on: {}", failure.message);
                        site.events.note(Event::new("recovery-not-moved", what).vm(&vm)).await;
                    }
                });
            }
        }
    }

    /// Moves the disks of a recovered VM to files of their own, while it runs.
    async fn move_recovered(
        self: &Arc<Self>,
        vm: &VmName,
        to: PathBuf,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let _turn = self.moves.lock().await;
        let (live, mut recovery) = (self.recovered(vm), self.known_recovery(vm)?);
        if let Some(other) = recovery.to.as_ref().filter(|other| **other != to) {
            let message = format!("{vm} is being moved to {} already", other.display());
            return Err(Failure::new(Code::Exists, message));
        }
        if live.process().is_none() {
            let message = format!(
                "{vm} does not run; it is moved while it runs: 'afterimage recover start {vm}' starts it ('afterimage restore' makes disks without it)"
            );
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        self.begin_move(&live, &mut recovery, to)?;
        let monitor = |error: qemu::Error| Failure::new(Code::Boot, format!("the QEMU of {vm}: {error}"));
        let qmp = Qmp::connect(&live.control(), MONITOR).await.map_err(monitor)?;
        for place in 0..recovery.disks.len() {
            self.move_one(&live, &mut recovery, place, &qmp, reporter).await?;
        }
        self.exports.hide_backup(&recovery.export()).await;
        let to = recovery.to.clone().unwrap_or_default();
        let what = format!("its disks are in {} now, and need nothing of this site any more", to.display());
        self.events.note(Event::new("recovery-moved", what).vm(vm)).await;
        Ok(recovery.shown(&live))
    }

    fn begin_move(&self, live: &Live, recovery: &mut Recovery, to: PathBuf) -> Result<(), Failure> {
        if recovery.to.is_none() {
            crate::init::make_folder(&to, 0o700)?;
            let taken =
                recovery.disks.iter().map(|disk| Recovery::target(&to, disk)).find(|path| path.exists());
            if let Some(path) = taken {
                let message = format!("{} is there already; choose another folder", path.display());
                return Err(Failure::new(Code::Exists, message));
            }
            recovery.to = Some(to);
            recovery.write(live)?;
        }
        Ok(())
    }

    async fn move_one(
        &self,
        live: &Live,
        recovery: &mut Recovery,
        place: usize,
        qmp: &Qmp,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let disk = recovery.disks[place].clone();
        let (vm, to) = (recovery.vm.clone(), recovery.to.clone().unwrap_or_default());
        let (layer, target) = (Recovery::layer(live, &disk), Recovery::target(&to, &disk));
        if disk.place == Place::Moved {
            return Ok(());
        }
        if !target.exists() {
            make_qcow2(&target, disk.size_bytes, &[]).await?;
        }
        let mut unwritten = None;
        let moved = move_disk(qmp, place, &layer, &target, |moving| {
            match moving {
                Moving::Copying(done, all) => {
                    reporter.progress(format!("{vm}: moving disk {}", disk.name), done, all);
                }
                // From now on the new file is the one that has everything, whatever becomes of us and of QEMU.
                Moving::Switching => {
                    recovery.disks[place].place = Place::Switching;
                    if let Err(failure) = recovery.write(live) {
                        let why = failure.message.clone();
                        unwritten = Some(failure);
                        return Err(qemu::Error::Answer { command: "job-complete".into(), why });
                    }
                }
            }
            Ok(())
        })
        .await;
        if let Some(failure) = unwritten {
            return Err(failure);
        }
        let at_monitor = |error: qemu::Error| Failure::new(Code::Boot, format!("the QEMU of {vm}: {error}"));
        if !moved.map_err(at_monitor)? {
            let message = format!("the QEMU of {vm} does not have {} open", layer.display());
            return Err(Failure::new(Code::Boot, message));
        }
        recovery.disks[place].place = Place::Moved;
        recovery.write(live)?;
        let _ = std::fs::remove_file(layer);
        Ok(())
    }

    /// Ends a recovery that has not been moved, with all that it has written; of one that was moved only what is known.
    async fn drop_recovered(&self, vm: &VmName) -> Result<Value, Failure> {
        let (live, recovery) = (self.recovered(vm), self.known_recovery(vm)?);
        if recovery.is_moved() && live.process().is_some() {
            let message = format!(
                "{vm} runs from {}, and would be forgotten while it does; stop it first",
                recovery.to.unwrap_or_default().display()
            );
            return Err(Failure::new(Code::Exists, message));
        }
        let ended = match live.pull_the_plug().await {
            Ok(()) => live.forget(),
            failed => failed,
        };
        ended.map_err(|error| Failure::new(Code::Boot, format!("{vm}: {error}")))?;
        if let Some(to) = recovery.to.as_ref().filter(|_| !recovery.is_moved()) {
            // What a move has begun is of no use without the rest.
            for disk in &recovery.disks {
                let _ = std::fs::remove_file(Recovery::target(to, disk));
            }
        }
        self.exports.hide_backup(&recovery.export()).await;
        self.events.note(Event::new("recovery-dropped", "its recovery was dropped").vm(vm)).await;
        Ok(json!({ "dropped": vm, "moved": recovery.is_moved(), "to": recovery.to }))
    }

    fn list_recovered(&self) -> Result<Value, Failure> {
        let recoveries = self.recoveries()?;
        let shown: Vec<Value> = recoveries.iter().map(|(live, recovery)| recovery.shown(live)).collect();
        Ok(json!({ "recoveries": shown }))
    }

    /// What there is, by the VMs' names.
    fn recoveries(&self) -> Result<Vec<(Live, Recovery)>, Failure> {
        let folders = std::fs::read_dir(self.dir.join("recovered")).into_iter().flatten().flatten();
        let mut names: Vec<VmName> =
            folders.filter_map(|folder| folder.file_name().to_str()?.parse().ok()).collect();
        names.sort();
        let mut found = Vec::new();
        for vm in names {
            let live = self.recovered(&vm);
            found.extend(Recovery::read(&live)?.map(|recovery| (live, recovery)));
        }
        Ok(found)
    }

    /// The backups in a repository that a VM runs from: nothing may take them away. What cannot be read is an error, for it
    /// may be one of them.
    pub(crate) fn backups_in_use(&self, repository: &str) -> Result<Vec<String>, Failure> {
        let of =
            |(_, recovery): (Live, Recovery)| (recovery.repository == repository).then_some(recovery.backup);
        Ok(self.recoveries()?.into_iter().filter_map(of).collect())
    }
}

async fn make_qcow2(path: &Path, size_bytes: u64, more: &[&str]) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).args(more).arg(path).arg(size_bytes.to_string());
    let failed = |why: String| Failure::new(Code::Io, format!("{} cannot be made: {why}", path.display()));
    let output = command
        .output()
        .await
        .map_err(|error| failed(format!("qemu-img: {error}; it is needed (apt-get install qemu-utils)")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}
