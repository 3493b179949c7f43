//! Real guests: Debian's kernel, ext4 and XFS, SQLite and PostgreSQL. What is restored of their replica is a
//! moment that their disks were in: file systems clean once their journals are replayed, databases that open,
//! and of the numbers that they acknowledged a prefix, over both disks together.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use common::{LONG, VM, path, sites};
use guest::{Acked, BOOT, Checked, DATA, Disk, Guest, GuestImage, Mode, SYSTEM};
use rig::{Line, Site};
use serde_json::Value;
use tempfile::TempDir;

/// A guest is a whole machine that is emulated: one test at a time is as much as two cores bear.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A guest that commits numbers, and its replica.
struct World {
    guest: Guest,
    branch: Site,
    head: Site,
    line: Line,
    image: GuestImage,
    dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// A guest that has begun to commit, protected, with cycles of changes under way.
    fn new(how: fn(&Guest) -> Vec<String>) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let image = GuestImage::build().unwrap();
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let vm = dir.path().join("vm");
        std::fs::create_dir(&vm).unwrap();
        let disks = image.install(&vm).unwrap();
        let guest = Guest::start(&image, &disks, Mode::Run, &vm).unwrap();
        let (head, branch, line) = sites(dir.path(), None);
        guest.console().wait_for("ack relay-sqlite 3", BOOT).unwrap();
        let qmp = guest.qmp();
        let how = how(&guest);
        let mut arguments = vec!["protect", VM, "--qmp", path(&qmp), "--to", "head", "--every", "2s"];
        arguments.extend(how.iter().map(String::as_str));
        branch.ok(&arguments).unwrap();
        branch.wait_vm(VM, "to replicate", BOOT, |vm| vm["state"] == "replicating").unwrap();
        Self { guest, branch, head, line, image, dir, _turn: turn }
    }

    /// Backs the replica up, restores the backup, and boots what was restored.
    fn back_up_and_boot(&self, more: &[&str]) -> (Value, Checked) {
        let backup = self.head.ok(&[&["backup", VM], more].concat()).unwrap();
        let now = self.guest.acked();
        let disks = [SYSTEM, DATA].map(|name| self.restore(&backup, name));
        let checked = self.boot(&disks, &backup, Some(&now));
        (backup, checked)
    }

    /// Restores one disk of a backup.
    fn restore(&self, backup: &Value, name: &str) -> Disk {
        let to = self.dir.path().join("restored");
        let id = backup["backup"].as_str().unwrap();
        let what = ["--disk", name, "--to", path(&to), "--overwrite"];
        self.head.ok(&[&["restore", VM, "--backup", id], &what[..]].concat()).unwrap();
        Disk::raw(name, &to.join(format!("{name}.raw")))
    }

    /// Boots disks that show the moment `taken_at` of `origin`, and judges what is on them.
    fn boot(&self, disks: &[Disk], origin: &Value, now: Option<&Acked>) -> Checked {
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

    fn check(&self, disks: &[Disk]) -> Checked {
        guest::check(&self.image, disks, &self.dir.path().join("boot")).unwrap()
    }

    /// What befalls the sites and the line between them.
    fn suffer(&mut self, number: usize) {
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
    fn machine_file(&self) {
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
    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("boot/console.log")).unwrap_or_default()
    }
}

/// When a point was taken: no later than the disks were in that state.
fn moment(origin: &Value) -> SystemTime {
    let taken_at: jiff::Timestamp = origin["taken_at"].as_str().unwrap().parse().unwrap();
    taken_at.into()
}

/// Pauses between two moments, the same for the same seed.
fn pauses(seed: u64) -> impl Iterator<Item = Duration> {
    rig::noise(seed, 1024).into_iter().map(|byte| Duration::from_millis(u64::from(byte) * 10))
}

/// Backs up and boots at so many moments, from pinned views and each third time from the flat files of a hold;
/// on demand with a mishap before each.
fn at_moments(seed: u64, count: usize, mishaps: bool) -> (World, Vec<Value>) {
    let mut world = World::new(|_| Vec::new());
    let started = Instant::now();
    let begun = world.guest.acked();
    let mut backups = Vec::new();
    for (number, pause) in (1..=count).zip(pauses(seed)) {
        std::thread::sleep(pause);
        if mishaps {
            world.suffer(number);
        }
        let view = if number % 3 == 0 { "hold" } else { "pinned" };
        println!("moment {number} of {count}, {view}:");
        let (backup, checked) = world.back_up_and_boot(&["--view", view]);
        assert!(checked.needs_recovery, "nobody brought this guest to rest: {backup}");
        backups.push(backup);
    }
    let committed = world.guest.acked().total() - begun.total();
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "seed {seed}: {count} of {count} moments boot clean; {committed} numbers acknowledged meanwhile, in {seconds:.0} s"
    );
    let points: BTreeSet<_> = backups.iter().map(|backup| backup["number"].as_u64()).collect();
    assert!(points.len() > count / 2, "the moments were different ones: {points:?}");
    assert!(committed as usize > 10 * count, "the guest went on committing: {committed}");
    assert_eq!(world.guest.console().failure(), None);
    (world, backups)
}

#[test]
fn a_guest_boots_from_the_backup_of_its_replica() {
    at_moments(1, 3, false);
}

#[test]
#[ignore = "twenty boots: make soak"]
fn a_guest_boots_from_backups_of_twenty_moments() {
    let (world, backups) = at_moments(2, 20, false);
    // The check can fail: a disk of the first moment beside one of the last is no moment.
    let disks = [world.restore(&backups[0], SYSTEM), world.restore(&backups[19], DATA)];
    let wrong = world.check(&disks).judge(&Acked::default(), None).unwrap_err();
    println!("two disks of two moments: {wrong}");
    assert!(wrong.contains("different moments"), "{wrong}");
}

#[test]
#[ignore = "eight boots: make soak"]
fn a_guest_boots_from_backups_made_while_sites_are_killed_and_the_line_is_cut() {
    let (world, _) = at_moments(3, 8, true);
    let replicates = |vm: &Value| vm["state"] == "replicating" && vm["error"].is_null();
    world.branch.wait_vm(VM, "all to be well", LONG, replicates).unwrap();
}

#[test]
fn a_guest_that_is_killed_goes_on_from_its_replica() {
    let mut world = World::new(|guest| {
        let agent = guest.agent();
        ["--app-every", "2s", "--guest-agent", path(&agent)].map(str::to_owned).into()
    });
    println!("at rest, through the guest agent:");
    let application = |point: &Value| point["consistency"] == "application";
    let has_one = || {
        let points = world.head.ok(&["points", VM])?;
        Ok(points["points"].as_array().unwrap().iter().any(application).then_some(()))
    };
    rig::wait_for("an application-consistent point", LONG, has_one).unwrap();
    let (backup, checked) = world.back_up_and_boot(&["--consistency", "application"]);
    assert!(application(&backup), "{backup}");
    assert!(!checked.needs_recovery, "a file system at rest has nothing to replay: {backup}");

    println!("booted by its replica's site, while it is replicated:");
    world.machine_file();
    for sign in ["console:ack relay-sqlite", "agent"] {
        let report = world.head.ok(&["check", VM, "--sign-of-life", sign]).unwrap();
        assert_eq!(report["alive"], true, "{report}");
        println!("  {sign} after {} s", report["boot_s"]);
    }

    println!("killed, and read over NBD:");
    world.guest.kill();
    let points = world.head.ok(&["points", VM]).unwrap();
    let newest =
        points["points"].as_array().unwrap().iter().max_by_key(|point| point["number"].as_u64()).unwrap();
    let id = newest["id"].as_str().unwrap();
    let export = world.head.ok(&["export", VM, "--point", id, "--writable"]).unwrap();
    let shown = export["disks"].as_array().unwrap();
    let disk = |name: &str| {
        let uri = shown.iter().find(|disk| disk["name"] == name).unwrap()["uri"].as_str().unwrap();
        Disk::nbd(name, uri).unwrap()
    };
    world.boot(&[disk(SYSTEM), disk(DATA)], newest, None);
    world.head.ok(&["unexport", export["export"].as_str().unwrap()]).unwrap();

    println!("failed over:");
    let failover = world.head.ok(&["failover", "unplanned", VM]).unwrap();
    let shown = failover["disks"].as_array().unwrap();
    let disk = |name: &str| {
        let overlay = shown.iter().find(|disk| disk["name"] == name).unwrap()["path"].as_str().unwrap();
        Disk::qcow2(name, Path::new(overlay))
    };
    world.boot(&[disk(SYSTEM), disk(DATA)], &failover, None);
}
