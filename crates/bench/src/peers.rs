//! The other tools, as their users call them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use rig::Libvirt;

use crate::disk::changed;
use crate::measure::{Ran, disk_usage, run};

/// What each tool does to compress, for the reader of the table.
pub const SETTINGS: &str = "restic: repository version 2, compression auto (its default), its cache in place; borg: \
    --compression zstd,3, encryption repokey, its default chunker; rustic: its defaults, no cache; all three read the \
    raw image file itself; virtnbdbackup: --compress (lz4), neither encrypted nor checked, reads a libvirt domain of its \
    own with the same disk as qcow2";

/// Debian's restic with a repository of its own.
pub struct Restic {
    repository: PathBuf,
    password: PathBuf,
    cache: PathBuf,
}

impl Restic {
    /// A repository in `dir/NAME`; nothing of it is there before [`Restic::init`].
    pub fn new(dir: &Path, name: &str, password: &Path) -> Self {
        let cache = dir.join(format!("{name}-cache"));
        Self { repository: dir.join(name), password: password.to_owned(), cache }
    }

    /// Makes the repository, in place of one that is there.
    pub fn init(&self) -> anyhow::Result<()> {
        self.remove();
        rig::tool(self.command().args(["init", "--repository-version", "2"]))?;
        Ok(())
    }

    /// Removes the repository.
    pub fn remove(&self) {
        for folder in [&self.repository, &self.cache] {
            let _ = std::fs::remove_dir_all(folder);
        }
    }

    /// Backs up a file; with a backup of it in the repository, incrementally.
    pub fn backup(&self, file: &Path) -> anyhow::Result<Ran> {
        run(self.command().arg("backup").arg(file))
    }

    /// Restores the newest backup into a folder.
    pub fn restore(&self, to: &Path) -> anyhow::Result<Ran> {
        run(self.command().args(["restore", "latest", "--target"]).arg(to))
    }

    /// Reads everything again and checks it.
    pub fn check(&self) -> anyhow::Result<Ran> {
        run(self.command().args(["check", "--read-data"]))
    }

    /// Bytes that the repository takes.
    pub fn bytes(&self) -> anyhow::Result<f64> {
        disk_usage(&self.repository)
    }

    /// Where the repository is.
    pub fn path(&self) -> &Path {
        &self.repository
    }

    fn command(&self) -> Command {
        let mut command = Command::new("restic");
        command.arg("-r").arg(&self.repository).arg("-p").arg(&self.password);
        command.arg("--cache-dir").arg(&self.cache).arg("--quiet");
        command
    }
}

/// Borg with a repository of its own.
pub struct Borg {
    repository: PathBuf,
    base: PathBuf,
    made: u32,
}

impl Borg {
    /// A repository in `dir/borg`; nothing of it is there before [`Borg::init`].
    pub fn new(dir: &Path) -> Self {
        Self { repository: dir.join("borg"), base: dir.join("borg-base"), made: 0 }
    }

    /// Makes the repository, in place of one that is there.
    pub fn init(&self) -> anyhow::Result<()> {
        self.remove();
        std::fs::create_dir_all(&self.base).with_context(|| self.base.display().to_string())?;
        rig::tool(self.command().args(["init", "--encryption", "repokey"]).arg(&self.repository))?;
        Ok(())
    }

    /// Removes the repository.
    pub fn remove(&self) {
        for folder in [&self.repository, &self.base] {
            let _ = std::fs::remove_dir_all(folder);
        }
    }

    /// Backs up a file; with a backup of it in the repository, only new chunks are stored.
    pub fn backup(&mut self, file: &Path) -> anyhow::Result<Ran> {
        self.made += 1;
        let archive = format!("{}::backup-{}", self.repository.display(), self.made);
        run(self.command().args(["create", "--compression", "zstd,3"]).arg(archive).arg(file))
    }

    /// Bytes that the repository takes.
    pub fn bytes(&self) -> anyhow::Result<f64> {
        disk_usage(&self.repository)
    }

    /// Borg with its config and cache in the bench's own folder.
    fn command(&self) -> Command {
        let mut command = Command::new("borg");
        command.env("BORG_PASSPHRASE", "bench").env("BORG_BASE_DIR", &self.base);
        command
    }
}

/// rustic, the command, with a repository of its own.
pub struct Rustic {
    repository: PathBuf,
    password: PathBuf,
}

impl Rustic {
    /// A repository in `dir/rustic`; nothing of it is there before [`Rustic::init`].
    pub fn new(dir: &Path, password: &Path) -> Self {
        Self { repository: dir.join("rustic"), password: password.to_owned() }
    }

    /// Makes the repository, in place of one that is there.
    pub fn init(&self) -> anyhow::Result<()> {
        self.remove();
        rig::tool(self.command().arg("init"))?;
        Ok(())
    }

    /// Removes the repository.
    pub fn remove(&self) {
        let _ = std::fs::remove_dir_all(&self.repository);
    }

    /// Backs up a file; with a backup of it in the repository, incrementally.
    pub fn backup(&self, file: &Path) -> anyhow::Result<Ran> {
        run(self.command().arg("backup").arg(file))
    }

    /// Restores the newest backup into a folder.
    pub fn restore(&self, to: &Path) -> anyhow::Result<Ran> {
        run(self.command().args(["restore", "latest"]).arg(to))
    }

    /// Bytes that the repository takes.
    pub fn bytes(&self) -> anyhow::Result<f64> {
        disk_usage(&self.repository)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("rustic");
        command.arg("-r").arg(&self.repository).arg("--password-file").arg(&self.password);
        command.args(["--no-cache", "--no-progress", "--log-level", "error"]);
        command
    }
}

/// Debian's virtnbdbackup, and a libvirt domain with a disk of its own.
pub struct VirtNbdBackup {
    libvirt: Libvirt,
    to: PathBuf,
}

impl VirtNbdBackup {
    const DOMAIN: &str = "peer";
    const TARGET: &str = "vda";
    const ALIAS: &str = "virtio-disk0";

    /// Starts a domain whose disk is what `image` is now.
    pub fn start(dir: &Path, image: &Path) -> anyhow::Result<Self> {
        let libvirt = Libvirt::start(dir)?;
        let disk = dir.join("disk.qcow2");
        // The image is open for writing in the daemon; nobody writes to it now.
        rig::tool(
            Command::new("qemu-img")
                .args(["convert", "-U", "-f", "raw", "-O", "qcow2"])
                .arg(image)
                .arg(&disk),
        )?;
        libvirt.give(&disk)?;
        libvirt.start_domain(Self::DOMAIN, &[(Self::TARGET, &disk)])?;
        Ok(Self { libvirt, to: dir.join("backups") })
    }

    /// A full backup, in place of those that are there.
    pub fn full(&self) -> anyhow::Result<Ran> {
        let _ = std::fs::remove_dir_all(&self.to);
        std::fs::create_dir(&self.to).with_context(|| self.to.display().to_string())?;
        self.libvirt.give(&self.to)?;
        self.backup("full")
    }

    /// A backup of what has changed since the last one.
    pub fn incremental(&self) -> anyhow::Result<Ran> {
        self.backup("inc")
    }

    fn backup(&self, level: &str) -> anyhow::Result<Ran> {
        let mut command = self.libvirt.command("virtnbdbackup");
        command.args(["-U", "qemu:///session", "-d", Self::DOMAIN, "-l", level, "--compress", "-o"]);
        run(command.arg(self.to.join("b")))
    }

    /// Bytes that its backups take.
    pub fn bytes(&self) -> anyhow::Result<f64> {
        disk_usage(&self.to)
    }

    /// Writes extents, as the guest would.
    pub fn change(&self, extents: &[(u64, u64)], seed: u64) -> anyhow::Result<()> {
        let bytes = self.to.with_file_name("bytes");
        for (offset, changed) in changed(extents, seed) {
            std::fs::write(&bytes, changed).with_context(|| bytes.display().to_string())?;
            self.libvirt.give(&bytes)?;
            self.libvirt.write_file(Self::DOMAIN, Self::ALIAS, offset, &bytes)?;
        }
        Ok(())
    }
}
