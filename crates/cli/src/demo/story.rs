//! The story itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::BinaryBytes;
use rig::{Line, Result, Site, StorageDaemon, Trouble, Writer, fill, need, tool, wait_for};
use serde::Serialize;
use serde_json::Value;
use witness::{Region, Script};

use super::stage::Teller;
use crate::show;

const MIB: u64 = 1 << 20;
const VM: &str = "web";
/// The system disk: an ext4 file system, and behind it room for the writer.
const SYSTEM: (&str, u64) = ("system", 192 * MIB);
const EXT4_BYTES: u64 = 128 * MIB;
/// The data disk: room for the writer, and behind it for bursts that make an apply last.
const DATA: (&str, u64) = ("data", 1024 * MIB);
const BURST_AT: u64 = 128 * MIB;
const BURST_BYTES: u64 = 768 * MIB;
const PATIENCE: Duration = Duration::from_secs(120);

/// What came of it.
pub struct Story {
    pub steps: Vec<Step>,
    pub farewell: String,
    pub kept_in: Option<PathBuf>,
}

/// A row of the table at the end.
#[derive(Debug, Serialize)]
pub struct Step {
    step: &'static str,
    wan_bytes: Option<u64>,
    read_bytes: Option<u64>,
    added_bytes: Option<u64>,
    seconds: f64,
    note: String,
}

impl Story {
    pub fn table(&self) -> String {
        let bytes = |bytes: Option<u64>| show::bytes(&bytes.into());
        let rows: Vec<_> = self
            .steps
            .iter()
            .map(|step| {
                vec![
                    step.step.to_owned(),
                    bytes(step.wan_bytes),
                    bytes(step.read_bytes),
                    bytes(step.added_bytes),
                    format!("{:.1} s", step.seconds),
                    step.note.clone(),
                ]
            })
            .collect();
        show::table(&["\nWHAT WAS SHOWN", "WAN BYTES", "READ", "ADDED", "TIME", ""], &rows)
    }
}

/// Tells it, and leaves everything running if it is to be kept.
pub fn tell(teller: &Teller, keep: bool) -> Result<Story> {
    for (program, package) in
        [("qemu-storage-daemon", "qemu-utils"), ("mkfs.ext4", "e2fsprogs"), ("e2fsck", "e2fsprogs")]
    {
        need_somewhere(program, package)?;
    }
    let dir = PathBuf::from(format!("/var/tmp/afterimage-demo.{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|error| Trouble(format!("{}: {error}", dir.display())))?;
    let told = Scene::set(teller, &dir).and_then(|mut scene| {
        let outcome = scene.play(teller);
        outcome.map(|()| scene)
    });
    match told {
        Ok(scene) if keep => scene.keep(),
        Ok(scene) => {
            let steps = scene.strike();
            let _ = std::fs::remove_dir_all(&dir);
            Ok(Story { steps, farewell: String::new(), kept_in: None })
        }
        Err(trouble) => Err(Trouble(format!("{trouble}\nwhat there is lies in {}", dir.display()))),
    }
}

/// `mkfs` and `e2fsck` know no `--version` and live where a user's PATH may not lead.
fn need_somewhere(program: &str, package: &str) -> Result<()> {
    let there = ["/sbin", "/usr/sbin"].iter().any(|folder| Path::new(folder).join(program).exists());
    if there { Ok(()) } else { need(program, package) }
}

struct Scene {
    dir: PathBuf,
    head: Site,
    branch: Site,
    line: Line,
    daemon: StorageDaemon,
    script: Arc<Script>,
    writer: Option<Writer>,
    steps: Vec<Step>,
}

impl Scene {
    fn set(teller: &Teller, dir: &Path) -> Result<Self> {
        teller.say("A branch office replicates its VM to the head office, which backs the replica up.\n");
        let (head, branch, line) = teller.step("Two sites", |_| {
            let mut head = Site::init(dir, "head-office")?;
            let mut branch = Site::init(dir, "branch")?;
            let line = Line::to(head.address())?;
            let advertise = format!("\nadvertise = \"{}\"\n", line.address());
            head.configure(&[("\n# What peers are told", &format!("{advertise}# What peers are told"))])?;
            for site in [&mut head, &mut branch] {
                site.configure(&[
                    ("interval-min-s = 5", "interval-min-s = 2"),
                    ("backoff-s = [60, 120, 240, 480, 600, 1800]", "backoff-s = [1, 2, 5]"),
                    ("first-delay-s = 2", "first-delay-s = 1"),
                ])?;
                site.serve()?;
            }
            head.invite(&branch)?;
            let said =
                format!("branch and head-office trust each other's certificates (in {})", dir.display());
            Ok(((head, branch, line), said))
        })?;
        let daemon = teller.step("A VM with two disks", |_| {
            let (made, files) = make_disks(&dir.join("vm"))?;
            Ok((
                made,
                format!(
                    "system: ext4 with {files} files; data: raw; a writer stamps both, one write at a time"
                ),
            ))
        })?;
        let region = |disk, offset| Region { disk, offset, len: 48 * MIB };
        let script =
            Arc::new(Script::new(2026, vec![region(0, EXT4_BYTES + 8 * MIB), region(1, 8 * MIB)], 4));
        let writer = Writer::start(&daemon, script.clone(), 1, Duration::from_millis(1))?;
        let writer = Some(writer);
        Ok(Self { dir: dir.to_owned(), head, branch, line, daemon, script, writer, steps: Vec::new() })
    }

    fn play(&mut self, teller: &Teller) -> Result<()> {
        self.initial_replication(teller)?;
        self.cycles(teller)?;
        self.collision(teller)?;
        self.pinned(teller)?;
        let backup = self.incremental(teller)?;
        self.kill(teller)?;
        self.restore(teller, &backup)
    }

    fn initial_replication(&mut self, teller: &Teller) -> Result<()> {
        let (crossed, started) = (self.line.bytes(), Instant::now());
        let note = teller.step("Initial replication", |now| {
            let (qmp, nbd) = (self.daemon.qmp(), self.daemon.nbd());
            let (qmp, nbd) = (qmp.to_string_lossy(), nbd.to_string_lossy());
            self.branch.ok(&[
                "protect",
                VM,
                "--qmp",
                &qmp,
                "--nbd",
                &nbd,
                "--to",
                "head-office",
                "--every",
                "2s",
            ])?;
            self.branch.wait_vm(VM, "to replicate", PATIENCE, |vm| {
                now.say(progress(vm));
                vm["state"] == "replicating"
            })?;
            let size = BinaryBytes(SYSTEM.1 + DATA.1);
            let sent = BinaryBytes(self.line.bytes() - crossed);
            let note = format!("{sent} sent of {size}: no hole, no zero");
            Ok((note.clone(), note))
        })?;
        self.row("initial replication", Some(self.line.bytes() - crossed), None, started, note);
        Ok(())
    }

    fn cycles(&mut self, teller: &Teller) -> Result<()> {
        let (crossed, started) = (self.line.bytes(), Instant::now());
        let acked = |vm: &Value| vm["acked"].as_u64().unwrap_or_default();
        let cycles = teller.step("Cycles every 2 s", |now| {
            let before = acked(&self.branch.vm(VM)?);
            let until = Instant::now() + Duration::from_secs(7);
            while Instant::now() < until {
                let vm = self.branch.vm(VM)?;
                let lag = vm["lag_s"].as_f64().unwrap_or_default();
                now.say(format!("the replica is {lag:.1} s old"));
                std::thread::sleep(Duration::from_millis(100));
            }
            let cycles = acked(&self.branch.vm(VM)?) - before;
            let sent = BinaryBytes(self.line.bytes() - crossed);
            Ok((
                cycles,
                format!("{cycles} recovery points, each all disks at one moment; {sent} sent in 7 s"),
            ))
        })?;
        let crossed = self.line.bytes() - crossed;
        self.row("cycles for 7 s", Some(crossed), None, started, format!("{cycles} recovery points"));
        Ok(())
    }

    /// A backup of the flat files, begun while logs are applied to them.
    fn collision(&mut self, teller: &Teller) -> Result<()> {
        for seed in 1..6 {
            let backup =
                self.beside_an_apply(teller, "A backup by hold", seed, &["backup", VM, "--view", "hold"])?;
            let Some(refused) = refused(&backup) else { continue };
            let note = format!("refused {refused}, then home");
            self.backup_row("backup by hold", None, &backup, note);
            return Ok(());
        }
        Err(Trouble("five backups by hold were begun beside an apply, and none met it".into()))
    }

    fn pinned(&mut self, teller: &Teller) -> Result<()> {
        let backup = self.beside_an_apply(teller, "A pinned backup", 7, &["backup", VM])?;
        self.backup_row("pinned backup", None, &backup, "beside an apply, not refused".into());
        Ok(())
    }

    fn beside_an_apply(&mut self, teller: &Teller, what: &str, seed: u64, command: &[&str]) -> Result<Value> {
        teller.step(what, |now| {
            now.say("the VM writes a lot, so that the apply lasts");
            fill(&self.daemon, DATA.0, BURST_AT, BURST_BYTES, seed)?;
            wait_for("an apply at the replica", PATIENCE, || {
                Ok((self.head.vm(VM)?["apply"] == "running").then_some(()))
            })?;
            now.say("logs are being applied: the backup begins now");
            let backup = self.head.ok(command)?;
            let home = match refused(&backup) {
                Some(refused) => format!("refused by {refused}; retried until it was home"),
                None => "beside an apply, and not refused: it reads through the logs".into(),
            };
            let said = format!("{home}\n{}", summary(&backup));
            Ok((backup, said))
        })
    }

    /// With replication paused nothing else crosses the line: what a backup costs it can be read off.
    fn incremental(&mut self, teller: &Teller) -> Result<String> {
        let (crossed, backup) = teller.step("An incremental backup", |now| {
            std::thread::sleep(Duration::from_secs(2));
            self.branch.ok(&["sync", VM])?;
            self.branch.ok(&["pause", VM])?;
            let before = self.line.bytes();
            now.say("only what has changed since the last backup is read");
            let backup = self.head.ok(&["backup", VM])?;
            let crossed = self.line.bytes() - before;
            self.branch.ok(&["resume", VM])?;
            let said = format!("{}\n{crossed} bytes crossed the WAN for it", summary(&backup));
            Ok(((crossed, backup), said))
        })?;
        self.backup_row(
            "incremental backup",
            Some(crossed),
            &backup,
            "replication paused, to see the WAN".into(),
        );
        Ok(backup["backup"].as_str().unwrap_or_default().to_owned())
    }

    fn kill(&mut self, teller: &Teller) -> Result<()> {
        let started = Instant::now();
        teller.step("kill -9 of the branch", |now| {
            self.branch.kill();
            now.say("the VM goes on writing; its QEMU remembers what changes");
            std::thread::sleep(Duration::from_secs(1));
            self.branch.serve()?;
            let before = self.branch.vm(VM)?["last_point"].clone();
            let vm = self.branch.wait_vm(VM, "a new point", PATIENCE, |vm| vm["last_point"] != before)?;
            if vm["state"] != "replicating" {
                return Err(Trouble(format!("after the kill the VM is {}", vm["state"])));
            }
            Ok((
                (),
                "started again, it went on with the next cycle: no log lost, nothing sent twice in full"
                    .into(),
            ))
        })?;
        self.row("kill and restart of the branch", None, None, started, "no resynchronization".into());
        Ok(())
    }

    fn restore(&mut self, teller: &Teller, backup: &str) -> Result<()> {
        let (started, to) = (Instant::now(), self.dir.join("restored"));
        let restored = teller.step("A restore", |_| {
            let restored =
                self.head.ok(&["restore", VM, "--backup", backup, "--to", &to.to_string_lossy()])?;
            Ok((restored, format!("to {}, verified while it was written", to.display())))
        })?;
        let read = restored["bytes_written"].as_u64();
        self.row("restore", Some(0), read, started, "verified by digest".into());
        let started = Instant::now();
        teller.step("The proof", |_| {
            let begun = self.writer.as_ref().map_or(u64::MAX, Writer::begun);
            let images = [SYSTEM.0, DATA.0].map(|disk| to.join(format!("{disk}.raw")));
            let state = rig::state_of_files(&self.script, begun, &images).map_err(|violation| {
                Trouble(format!("the restored disks are no moment of the VM: {violation}"))
            })?;
            tool(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&images[0]))?;
            let said =
                format!("both disks are exactly as they were after write {state}; the file system is clean");
            Ok(((), said))
        })?;
        self.row("check of the restored disks", None, None, started, "a moment the VM went through".into());
        Ok(())
    }

    fn row(
        &mut self,
        step: &'static str,
        wan: Option<u64>,
        read: Option<u64>,
        started: Instant,
        note: String,
    ) {
        let seconds = started.elapsed().as_secs_f64();
        self.steps.push(Step { step, wan_bytes: wan, read_bytes: read, added_bytes: None, seconds, note });
    }

    fn backup_row(&mut self, step: &'static str, wan_bytes: Option<u64>, backup: &Value, note: String) {
        self.steps.push(Step {
            step,
            wan_bytes,
            read_bytes: backup["bytes_read"].as_u64(),
            added_bytes: backup["bytes_added"].as_u64(),
            seconds: backup["seconds"].as_f64().unwrap_or_default(),
            note,
        });
    }

    /// Ends everything.
    fn strike(mut self) -> Vec<Step> {
        drop(self.writer.take());
        self.branch.stop();
        self.head.stop();
        std::mem::take(&mut self.steps)
    }

    /// Leaves everything running but the writer and the line, which live in this process: the sites are made
    /// to speak to each other directly.
    fn keep(mut self) -> Result<Story> {
        drop(self.writer.take());
        let advertised = format!("\nadvertise = \"{}\"", self.line.address());
        self.head.stop();
        self.head.configure(&[(&advertised, "")])?;
        self.head.serve()?;
        self.head.ok(&["peer", "remove", self.branch.name()])?;
        self.head.invite(&self.branch)?;
        self.branch.ok(&["resume", VM])?;
        let steps = std::mem::take(&mut self.steps);
        let (dir, pids) = (self.dir.clone(), [self.head.pid(), self.branch.pid(), self.daemon.pid()]);
        let pids: Vec<String> = pids.into_iter().flatten().map(|pid| pid.to_string()).collect();
        let shown = dir.display();
        let farewell = format!(
            "\n\nBoth sites and the VM's disks are still there, and replication goes on. Look:\n  \
             afterimage --dir {shown}/head-office status\n  \
             afterimage --dir {shown}/head-office points {VM}\n  \
             afterimage --dir {shown}/head-office backups\n  \
             afterimage --dir {shown}/branch status {VM}\n  \
             restic -r {shown}/head-office/repository -p {shown}/head-office/repository.password snapshots\n\
             End it: kill {}; rm -r {shown}",
            pids.join(" ")
        );
        self.head.leave();
        self.branch.leave();
        self.daemon.leave();
        Ok(Story { steps, farewell, kept_in: Some(dir) })
    }
}

/// The disks: a real file system on one, made from this machine's own files.
fn make_disks(dir: &Path) -> Result<(StorageDaemon, usize)> {
    let failed = |error: std::io::Error| Trouble(format!("{}: {error}", dir.display()));
    let tree = dir.join("tree");
    std::fs::create_dir_all(&tree).map_err(failed)?;
    tool(Command::new("cp").args(["-r", "/etc", "/usr/share/doc/bash"]).arg(&tree))?;
    let files = tool(Command::new("find").arg(&tree).args(["-type", "f"]))?.lines().count();
    let image = dir.join(format!("{}.raw", SYSTEM.0));
    tool(Command::new("truncate").args(["-s", &EXT4_BYTES.to_string()]).arg(&image))?;
    tool(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image))?;
    tool(Command::new("truncate").args(["-s", &SYSTEM.1.to_string()]).arg(&image))?;
    std::fs::remove_dir_all(&tree).map_err(failed)?;
    Ok((StorageDaemon::start(dir, &[SYSTEM, DATA])?, files))
}

fn progress(vm: &Value) -> String {
    let progress = &vm["progress"];
    match (progress["covered_bytes"].as_u64(), progress["total_bytes"].as_u64()) {
        (Some(done), Some(total)) => format!("{} of {}", BinaryBytes(done), BinaryBytes(total)),
        _ => String::new(),
    }
}

/// By what a backup was refused before it came home: "apply-in-progress ×2".
fn refused(backup: &Value) -> Option<String> {
    let attempts = backup["attempts"].as_array()?;
    let code = attempts.first()?["refused"].as_str()?;
    Some(if attempts.len() == 1 { code.to_owned() } else { format!("{code} ×{}", attempts.len()) })
}

fn summary(backup: &Value) -> String {
    let seconds = backup["seconds"].as_f64().unwrap_or_default();
    format!(
        "read {}, added {}, {seconds:.1} s",
        show::bytes(&backup["bytes_read"]),
        show::bytes(&backup["bytes_added"])
    )
}
