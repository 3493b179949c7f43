//! A real guest at one site and its replica at another.

#![allow(dead_code)] // each test program uses a part of it

pub mod moved;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use guest::{Acked, BOOT, Checked, DATA, Disk, Guest, GuestImage, Mode, SYSTEM};
use rig::{Line, Site};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{VM, path, sites};

/// A guest is a whole machine that is emulated: one test at a time is as much as two cores bear.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A guest that commits numbers, and its replica.
pub struct World {
    pub guest: Guest,
    pub branch: Site,
    pub head: Site,
    pub line: Line,
    pub image: GuestImage,
    pub dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// A guest that has begun to commit, protected, with cycles of changes under way.
    pub fn new(how: fn(&Guest) -> Vec<String>) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let image = GuestImage::build().unwrap();
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let vm = dir.path().join("vm");
        std::fs::create_dir(&vm).unwrap();
        let disks = image.install(&vm).unwrap();
        let guest = Guest::start(&image, &disks, Mode::Run, &vm).unwrap();
        let (mut head, branch, line) = sites(dir.path(), None);
        // KVM within a VM may run a firmware and fail at a kernel: a check would find that out, minutes later.
        head.stop();
        head.configure(&[("# accelerator = \"tcg\"", "accelerator = \"tcg\"")]).unwrap();
        head.serve().unwrap();
        guest.console().wait_for("ack relay-sqlite 3", BOOT).unwrap();
        let qmp = guest.qmp();
        let how = how(&guest);
        let mut arguments = vec!["protect", VM, "--qmp", path(&qmp), "--to", "head", "--every", "2s"];
        arguments.extend(how.iter().map(String::as_str));
        branch.ok(&arguments).unwrap();
        branch.wait_vm(VM, "to replicate", BOOT, |vm| vm["state"] == "replicating").unwrap();
        Self { guest, branch, head, line, image, dir, _turn: turn }
    }

    /// The recovery points there are, oldest first.
    pub fn points(&self) -> Vec<Value> {
        self.head.ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone()
    }

    /// Backs the replica up, restores the backup, and boots what was restored.
    pub fn back_up_and_boot(&self, more: &[&str]) -> (Value, Checked) {
        let backup = self.head.ok(&[&["backup", VM], more].concat()).unwrap();
        let now = self.guest.acked();
        let disks = [SYSTEM, DATA].map(|name| self.restore(&backup, name));
        let checked = self.boot(&disks, &backup, Some(&now));
        (backup, checked)
    }

    /// Restores one disk of a backup.
    pub fn restore(&self, backup: &Value, name: &str) -> Disk {
        let to = self.dir.path().join("restored");
        let id = backup["backup"].as_str().unwrap();
        let what = ["--disk", name, "--to", path(&to), "--overwrite"];
        self.head.ok(&[&["restore", VM, "--backup", id], &what[..]].concat()).unwrap();
        Disk::raw(name, &to.join(format!("{name}.raw")))
    }

    /// Boots disks that show the moment `taken_at` of `origin`, and judges what is on them.
    pub fn boot(&self, disks: &[Disk], origin: &Value, now: Option<&Acked>) -> Checked {
        let before = self.guest.console().acked_by(moment(origin));
        let checked = self.check(disks);
        if let Err(wrong) = checked.judge(&before, now) {
            panic!(
                "{origin}: {wrong}\nfound {checked}; acknowledged before the moment {before}, by now {now:?}\n{}",
                self.said()
            );
        }
        println!("  clean; found {checked}; acknowledged before the moment {before}");
        checked
    }

    pub fn check(&self, disks: &[Disk]) -> Checked {
        guest::check(&self.image, disks, &self.dir.path().join("boot")).unwrap()
    }

    /// What befalls the sites and the line between them.
    pub fn suffer(&mut self, number: usize) {
        match number % 4 {
            0 => {
                self.branch.kill();
                self.branch.serve().unwrap();
            }
            1 => {
                self.head.kill();
                self.head.serve().unwrap();
            }
            2 => {
                self.line.cut();
                std::thread::sleep(Duration::from_secs(3));
                self.line.mend();
            }
            _ => {}
        }
    }

    /// This guest has no boot loader: the replica's site is told of its kernel.
    pub fn machine_file(&self) {
        let machines = self.head.dir().join("machines");
        std::fs::create_dir(&machines).unwrap();
        let text = format!(
            "memory-mib = 448\nkernel = {:?}\ninitrd = {:?}\nappend = {:?}\n",
            self.image.kernel(),
            self.image.initramfs(),
            "console=ttyS0 loglevel=1 panic=-1 no_timer_check mitigations=off guest.mode=run"
        );
        std::fs::write(machines.join(format!("{VM}.toml")), text).unwrap();
    }

    /// What the check boot said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("boot/console.log")).unwrap_or_default()
    }
}

/// When a point was taken: no later than the disks were in that state.
pub fn moment(origin: &Value) -> SystemTime {
    let taken_at: jiff::Timestamp = origin["taken_at"].as_str().unwrap().parse().unwrap();
    taken_at.into()
}

/// The disks that a failover gives, in the guest's order.
pub fn failover_disks(failover: &Value) -> [Disk; 2] {
    let shown = failover["disks"].as_array().unwrap();
    [SYSTEM, DATA].map(|name| {
        let disk = shown.iter().find(|disk| disk["name"] == name).unwrap();
        Disk::qcow2(name, Path::new(disk["path"].as_str().unwrap()))
    })
}

/// Pauses between two moments, the same for the same seed.
pub fn pauses(seed: u64) -> impl Iterator<Item = Duration> {
    rig::noise(seed, 1024).into_iter().map(|byte| Duration::from_millis(u64::from(byte) * 10))
}
