//! A `qemu-storage-daemon` with raw disks: a VM's block layer without the VM.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::programs::{Process, need, wait_for};
use crate::{Result, doing};

/// A running daemon; its disks are files `<name>.raw` in its folder and NBD exports of the same name.
pub struct StorageDaemon {
    dir: PathBuf,
    disks: Vec<Disk>,
    logs_writes: bool,
    process: Option<Process>,
}

struct Disk {
    name: String,
    path: PathBuf,
    format: &'static str,
}

impl StorageDaemon {
    /// Starts one on qcow2 files that are there: a VM that was failed over.
    pub fn start_on(dir: &Path, images: &[(String, PathBuf)]) -> Result<Self> {
        let disk = |(name, path): &(String, PathBuf)| Disk {
            name: name.clone(),
            path: path.clone(),
            format: "qcow2",
        };
        Self::run(dir, images.iter().map(disk).collect(), false)
    }

    /// Starts one with these disks (name, bytes); files that are there already are used as they are.
    pub fn start(dir: &Path, disks: &[(&str, u64)]) -> Result<Self> {
        Self::start_with(dir, disks, false)
    }

    /// The same with QEMU's driver `blklogwrites` below each disk: it writes down all that reaches the disk, in
    /// the file [`StorageDaemon::log`]. A daemon that is restarted begins its logs anew.
    pub fn start_logged(dir: &Path, disks: &[(&str, u64)]) -> Result<Self> {
        Self::start_with(dir, disks, true)
    }

    fn start_with(dir: &Path, disks: &[(&str, u64)], logs_writes: bool) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(doing(dir.display()))?;
        let mut made = Vec::new();
        for &(name, bytes) in disks {
            let path = dir.join(format!("{name}.raw"));
            if !path.exists() {
                File::create(&path).and_then(|file| file.set_len(bytes)).map_err(doing(path.display()))?;
            }
            made.push(Disk { name: name.to_owned(), path, format: "raw" });
        }
        Self::run(dir, made, logs_writes)
    }

    fn run(dir: &Path, disks: Vec<Disk>, logs_writes: bool) -> Result<Self> {
        need("qemu-storage-daemon", "qemu-utils")?;
        std::fs::create_dir_all(dir).map_err(doing(dir.display()))?;
        let mut daemon = Self { dir: dir.to_owned(), disks, logs_writes, process: None };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Kills the daemon, if it runs, and starts it again on the same disks: QEMU forgets its bitmaps.
    pub fn restart(&mut self) -> Result<()> {
        self.process = None;
        let monitors = [self.qmp(), self.second_qmp()];
        let sockets = [&monitors[0], &monitors[1], &self.nbd()];
        for socket in sockets {
            let _ = std::fs::remove_file(socket);
        }
        let mut command = Command::new("qemu-storage-daemon");
        for disk in &self.disks {
            command.arg("--blockdev").arg(self.blockdev(disk)?);
        }
        command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", self.nbd().display()));
        for Disk { name, .. } in &self.disks {
            command
                .arg("--export")
                .arg(format!("type=nbd,id=guest-{name},node-name={name},name={name},writable=on"));
        }
        for (n, path) in monitors.iter().enumerate() {
            command
                .arg("--chardev")
                .arg(format!("socket,id=qmp{n},path={},server=on,wait=off", path.display()))
                .arg("--monitor")
                .arg(format!("chardev=qmp{n}"));
        }
        // It may outlive its owner, whose output must not be kept open by it.
        let path = self.dir.join("daemon.log");
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(doing(path.display()))?;
        command.stdout(Stdio::null()).stderr(log);
        self.process = Some(Process::start(&mut command)?);
        let limit = Duration::from_secs(20);
        wait_for("qemu-storage-daemon", limit, || {
            Ok(sockets.iter().all(|socket| socket.exists()).then_some(()))
        })
    }

    /// The disk's node, and below it its file; between them, if so wished, the log. The log's node is a filter:
    /// what Afterimage does on the disk's node, it does above it.
    fn blockdev(&self, disk: &Disk) -> Result<String> {
        let Disk { name, path: file, format } = disk;
        let top = format!("driver={format},node-name={name},discard=unmap");
        if !self.logs_writes {
            return Ok(format!("{top},file.driver=file,file.filename={}", file.display()));
        }
        let log = self.log(name);
        File::create(&log).map_err(doing(log.display()))?;
        Ok(format!(
            "{top},file.driver=blklogwrites,file.discard=unmap,\
             file.file.driver=file,file.file.discard=unmap,file.file.filename={},\
             file.log.driver=file,file.log.filename={}",
            file.display(),
            log.display()
        ))
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Lets it live on without its owner.
    pub fn leave(mut self) {
        if let Some(process) = self.process.take() {
            process.leave();
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Its QMP socket.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// One QMP socket more, to look at it while a site has the other: each serves one client at a time.
    #[must_use]
    pub fn second_qmp(&self) -> PathBuf {
        self.dir.join("qmp-1.sock")
    }

    /// Its NBD server's socket.
    #[must_use]
    pub fn nbd(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// The file of a disk.
    #[must_use]
    pub fn disk(&self, name: &str) -> PathBuf {
        let known = self.disks.iter().find(|disk| disk.name == name);
        known.map_or_else(|| self.dir.join(format!("{name}.raw")), |disk| disk.path.clone())
    }

    /// Waits until it has ended by itself.
    pub fn wait_for_end(&mut self) -> Result<()> {
        wait_for("qemu-storage-daemon to end", Duration::from_secs(20), || {
            Ok(self.process.as_mut().is_none_or(Process::has_ended).then_some(()))
        })
    }

    /// The log of the writes to a disk, if it keeps one.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.writes"))
    }

    /// The names of its disks.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name.as_str())
    }
}
