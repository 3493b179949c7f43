//! What must hold after a crash.

use std::path::{Path, PathBuf};

use rig::{Result, state_of_exports, state_of_files, wait_for};
use serde_json::Value;

use super::pair::{DISKS, Pair, Side, trouble};
use crate::common::{LONG, VM, in_qemu, path};

/// What was known before a crash.
#[derive(Debug, Clone)]
pub struct Expect {
    acked: u64,
    backups: Vec<String>,
    resyncs: usize,
}

/// In the log of a site that finds that both sides must be compared.
const RESYNC: &str = "resynchronization is required";

impl Pair {
    /// What no crash may take.
    pub fn expect(&self) -> Result<Expect> {
        Ok(Expect {
            acked: self.branch.run(&["status", VM])?.json["vms"][0]["acked"].as_u64().unwrap_or(0),
            backups: self.backups()?,
            resyncs: self.branch.log().matches(RESYNC).count(),
        })
    }

    /// Everything that must hold with both sites running again. `resync`: the sides may have been compared.
    pub fn check(&mut self, expect: &Expect, resync: bool, thorough: bool) -> Result<()> {
        self.check_acked(expect, resync)?;
        self.sync()?;
        if !resync && self.branch.log().matches(RESYNC).count() > expect.resyncs {
            return Err(trouble(format!("it had to be resynchronized: {}", self.logs())));
        }
        self.settle()?;
        self.check_points()?;
        self.check_backups(expect, thorough)?;
        self.check_leftovers()
    }

    fn check_acked(&self, expect: &Expect, resync: bool) -> Result<()> {
        let received = self.head.vm(VM)?["received"].as_u64().unwrap_or(0);
        // A VM that was protected anew, or compared, counts anew.
        if received < expect.acked && !resync {
            let acked = expect.acked;
            return Err(trouble(format!(
                "log {acked} was acknowledged, and the replica's newest is {received}"
            )));
        }
        Ok(())
    }

    /// Waits until the replica has nothing more to do.
    fn settle(&self) -> Result<()> {
        let idle = |vm: &Value| {
            let applied = vm["applied"] == vm["received"] || self.points != "0";
            vm["apply"] == "idle" && applied && vm["state"] == "replicating"
        };
        self.head.wait_vm(VM, "to rest", LONG, idle).map(drop)
    }

    /// Every point is a moment of the VM.
    pub fn check_points(&self) -> Result<()> {
        let points = self.head.ok(&["points", VM])?["points"].as_array().cloned().unwrap_or_default();
        if points.is_empty() {
            return Err(trouble("there is no recovery point"));
        }
        for point in &points {
            let shown = self.head.run(&["export", VM, "--point", text(&point["id"])])?;
            if shown.code() == Some("no-such-point") {
                continue; // it was dropped since it was listed
            }
            let disks = shown.json["disks"].as_array().cloned().unwrap_or_default();
            let uri =
                |name: &str| disks.iter().find(|disk| disk["name"] == name).map(|disk| text(&disk["uri"]));
            let uris: Vec<&str> = DISKS.iter().filter_map(|(name, _)| uri(name)).collect();
            if uris.len() != DISKS.len() {
                return Err(trouble(format!("point {point} cannot be shown: {shown:?}")));
            }
            let state = state_of_exports(&self.script, self.begun(), &uris);
            state.map_err(|violation| trouble(format!("point {point}: {violation}")))?;
            self.head.ok(&["unexport", text(&shown.json["export"])])?;
        }
        Ok(())
    }

    fn backups(&self) -> Result<Vec<String>> {
        let backups = self.head.ok(&["backups", VM])?["backups"].as_array().cloned().unwrap_or_default();
        Ok(backups.iter().map(|backup| text(&backup["id"]).to_owned()).collect())
    }

    /// No backup that was listed is gone, every one that is listed is whole, and the next one succeeds.
    fn check_backups(&self, expect: &Expect, thorough: bool) -> Result<()> {
        let job = wait_for("the jobs to end", LONG, || {
            let jobs = self.head.ok(&["jobs"])?["jobs"].as_array().cloned().unwrap_or_default();
            let open = |job: &Value| matches!(text(&job["state"]), "waiting" | "running");
            Ok((!jobs.iter().any(open)).then(|| jobs.into_iter().next()))
        })?;
        if let Some(failed) = job.filter(|job| job["state"] == "failed") {
            return Err(trouble(format!("the backup job did not come home: {failed}")));
        }
        let listed = self.backups()?;
        if let Some(gone) = expect.backups.iter().find(|id| !listed.contains(id)) {
            return Err(trouble(format!("backup {gone} was listed and is gone")));
        }
        let made = self.head.ok(&["backup", VM])?;
        let id = text(&made["backup"]).to_owned();
        if thorough {
            self.head.ok(&["verify", VM])?;
            for id in listed.iter().filter(|id| !expect.backups.contains(id)) {
                self.check_backup(id)?;
            }
            self.check_backup(&id)?;
        }
        Ok(())
    }

    /// All backups, one by one.
    pub fn check_all_backups(&self) -> Result<usize> {
        let listed = self.backups()?;
        self.head.ok(&["verify", VM])?;
        listed.iter().try_for_each(|id| self.check_backup(id))?;
        Ok(listed.len())
    }

    fn check_backup(&self, id: &str) -> Result<()> {
        let to = self.dir.path().join(format!("restored-{}", &id[..8]));
        self.head.ok(&["restore", VM, "--backup", id, "--to", path(&to), "--overwrite"])?;
        let images: Vec<PathBuf> = DISKS.iter().map(|(name, _)| to.join(format!("{name}.raw"))).collect();
        let state = state_of_files(&self.script, self.begun(), &images);
        state.map_err(|violation| trouble(format!("backup {id}: {violation}")))?;
        std::fs::remove_dir_all(&to).map_err(trouble)
    }

    /// Nothing lies about that belongs to nobody.
    fn check_leftovers(&mut self) -> Result<()> {
        let names = DISKS.map(|(name, _)| name);
        let mut found = Vec::new();
        let ours = in_qemu(&self.daemon.second_qmp(), &names);
        if ours.len() != DISKS.len() || !ours.iter().all(|item| item.starts_with("bitmap: ")) {
            found.push(format!("in QEMU: {ours:?}"));
        }
        let storage = self.storage()?;
        let (head, branch) = (self.head.dir(), self.branch.dir());
        let mut left: Vec<PathBuf> = self.homes().filter(|home| *home != storage).collect();
        for folder in [
            storage.join("incoming"),
            branch.join("scratch"),
            head.join("repository/locks"),
            head.join("seeds/new"),
            head.join("seeds/ready"),
        ] {
            left.extend(files(&folder));
        }
        if self.points == "0" {
            left.extend(files(&storage.join("logs")));
        }
        let gone = [storage.join("failover"), head.join("repository.partial")];
        left.extend(gone.into_iter().filter(|path| path.exists()));
        for folder in [head.join("repository"), storage.clone()] {
            left.extend(all_files(&folder).into_iter().filter(|path| is_half_written(path)));
        }
        found.extend(left.iter().map(|path| path.display().to_string()));
        if found.is_empty() { Ok(()) } else { Err(trouble(format!("left over: {found:#?}"))) }
    }

    /// Where replicas are kept, and where they can be moved to.
    fn parents(&self) -> [PathBuf; 2] {
        [self.head.dir().join("vms"), self.beside(Side::Head, "moved")]
    }

    /// The folders of all VMs.
    fn homes(&self) -> impl Iterator<Item = PathBuf> {
        self.parents().into_iter().flat_map(|parent| files(&parent))
    }

    /// Where the replica is.
    pub fn storage(&self) -> Result<PathBuf> {
        Ok(PathBuf::from(text(&self.head.vm(VM)?["storage"])))
    }

    /// The same without asking anybody.
    pub fn storage_known(&self) -> PathBuf {
        self.homes().next().unwrap_or_default()
    }

    /// Where it is not.
    pub fn other_storage(&self) -> Result<PathBuf> {
        let [home, moved] = self.parents();
        Ok(if self.storage()?.starts_with(&home) { moved } else { home })
    }
}

fn is_half_written(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.contains("-tmp-") || [".new", ".merging", ".partial"].iter().any(|end| name.ends_with(end))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn all_files(folder: &Path) -> Vec<PathBuf> {
    let inner = |path: PathBuf| if path.is_dir() { all_files(&path) } else { vec![path] };
    files(folder).into_iter().flat_map(inner).collect()
}
