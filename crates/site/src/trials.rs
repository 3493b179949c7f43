//! Test failovers: any point of a replica, with a writable layer that is gone afterwards, and a VM in it that nothing
//! gets out of. Replication goes on, and so does everything else; any number may be open at once.
//!
//! They end with the site. What a site that was killed has left is ended at its next start.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use boot::Instance;
use model::{GroupName, PointRef, Timestamp, VmName};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::checks::Checks;
use crate::clock::{now, rfc3339};
use crate::exports::{Exports, Shown};
use crate::failure::{Code, Failure};
use crate::request::{Export, Exported};

/// The test failovers of a site.
pub(crate) struct Trials {
    dir: PathBuf,
    exports: Arc<Exports>,
    open: Mutex<BTreeMap<String, Trial>>,
}

struct Trial {
    vm: VmName,
    /// It is one of several that were begun together.
    group: Option<GroupName>,
    since: Timestamp,
    shown: Shown,
    instance: Option<Instance>,
}

impl Trials {
    /// Ends what a run before this one has left in the folder.
    pub fn open(dir: PathBuf, exports: Arc<Exports>) -> Result<Self, Failure> {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            boot::end_leftover(&entry.path());
        }
        remove(&dir)?;
        Ok(Self { dir, exports, open: Mutex::default() })
    }

    /// Begins one: disks to look at or to start a VM from, and, if so wished, that VM.
    pub async fn begin(
        &self,
        checks: &Checks,
        vm: VmName,
        point: Option<PointRef>,
        start: bool,
    ) -> Result<Value, Failure> {
        let shown = self.show(&vm, point).await?;
        self.take_up(checks, vm, None, shown, start).await
    }

    /// Shows the disks of one that is to be taken up.
    pub async fn show(&self, vm: &VmName, point: Option<PointRef>) -> Result<Shown, Failure> {
        let what = Exported::Point { vm: vm.clone(), point };
        self.exports.add(Export { what, writable: true }).await
    }

    /// Gives up what was shown, and never taken up.
    pub async fn discard(&self, shown: Shown) {
        if let Err(failure) = self.exports.remove(&shown.id).await {
            tracing::warn!(export = shown.id, error = failure.message, "an export could not be ended");
        }
    }

    /// Starts the VM, if so wished, from disks that are shown.
    pub async fn take_up(
        &self,
        checks: &Checks,
        vm: VmName,
        group: Option<GroupName>,
        shown: Shown,
        start: bool,
    ) -> Result<Value, Failure> {
        let instance = match start {
            true => match checks.start(&vm, &shown, self.folder(&shown.id)).await {
                Ok(instance) => Some(instance),
                Err(failure) => {
                    self.exports.remove(&shown.id).await?;
                    remove(&self.folder(&shown.id))?;
                    return Err(failure);
                }
            },
            false => None,
        };
        let mut trial = Trial { vm, group, since: now(), shown, instance };
        let answer = trial.shown();
        self.open.lock().await.insert(trial.shown.id.clone(), trial);
        Ok(answer)
    }

    /// Ends one; nothing of it stays.
    pub async fn end(&self, id: &str) -> Result<Value, Failure> {
        let trial = self.open.lock().await.remove(id).ok_or_else(|| {
            let message = format!(
                "there is no test failover {id}; it was ended, or the site was restarted. 'afterimage failover tests' lists those there are"
            );
            Failure::new(Code::NoSuchExport, message)
        })?;
        if let Some(instance) = trial.instance {
            instance.end().await;
        }
        self.exports.remove(id).await?;
        remove(&self.folder(id))?;
        Ok(json!({ "ended": id, "vm": trial.vm }))
    }

    /// Ends all that were begun together.
    pub async fn end_group(&self, group: &GroupName) -> Result<Value, Failure> {
        let open = self.open.lock().await;
        let of_group = open.iter().filter(|(_, trial)| trial.group.as_ref() == Some(group));
        let ids: Vec<String> = of_group.map(|(id, _)| id.clone()).collect();
        drop(open);
        let mut ended = Vec::new();
        for id in ids {
            ended.push(self.end(&id).await?);
        }
        Ok(json!({ "group": group, "tests": ended }))
    }

    /// Those there are.
    pub async fn list(&self, vm: Option<&VmName>) -> Value {
        let mut open = self.open.lock().await;
        let wanted = open.values_mut().filter(|trial| vm.is_none_or(|vm| trial.vm == *vm));
        json!({ "tests": wanted.map(Trial::shown).collect::<Vec<_>>() })
    }

    /// Ends all of them.
    pub async fn end_all(&self) {
        let ids: Vec<String> = self.open.lock().await.keys().cloned().collect();
        for id in ids {
            if let Err(failure) = self.end(&id).await {
                tracing::warn!(test = id, error = failure.message, "a test failover could not be ended");
            }
        }
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }
}

impl Trial {
    fn shown(&mut self) -> Value {
        let mut shown = self.shown.shown();
        let running = self.instance.as_mut().is_some_and(Instance::is_running);
        shown["test"] = shown["export"].take();
        shown["vm"] = json!(self.vm);
        shown["group"] = json!(self.group);
        shown["point"] = json!(self.shown.seen);
        shown["since"] = json!(rfc3339(self.since));
        shown["running"] = json!(running);
        shown["vnc"] = json!(self.instance.as_ref().and_then(Instance::vnc));
        if let Some(shown) = shown.as_object_mut() {
            shown.remove("export");
        }
        shown
    }
}

fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::io("remove", folder, &error))
        }
        _ => Ok(()),
    }
}
