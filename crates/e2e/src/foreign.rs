//! Programs of others that read, compare and write our exports and images.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rig::{Process, Result, Trouble, need, tool, wait_for};
use serde_json::Value;

/// Copies an export to a new sparse file with libnbd's `nbdcopy`.
pub fn nbdcopy(uri: &str, to: &Path, options: &[&str]) -> Result<()> {
    need("nbdcopy", "libnbd-bin")?;
    tool(Command::new("nbdcopy").args(options).arg(uri).arg(to)).map(drop)
}

/// What libnbd's `nbdinfo` says with `--json` and these options.
pub fn nbdinfo(uri: &str, options: &[&str]) -> Result<Value> {
    need("nbdinfo", "libnbd-bin")?;
    let said = tool(Command::new("nbdinfo").arg("--json").args(options).arg(uri))?;
    serde_json::from_str(&said)
        .map_err(|error| Trouble(format!("nbdinfo {options:?} {uri}: {error}: {said}")))
}

/// Whether `qemu-img compare` finds two images (format, path or URI) to be alike; an error if it cannot.
pub fn are_alike(one: (&str, &str), other: (&str, &str)) -> Result<bool> {
    need("qemu-img", "qemu-utils")?;
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-f", one.0, "-F", other.0, one.1, other.1]);
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| Trouble(format!("{command:?}: {error}")))?;
    match output.status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => Err(Trouble(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}

/// What one job of fio came to; an error if it did not succeed.
pub fn fio(arguments: &[&str]) -> Result<Value> {
    need("fio", "fio")?;
    let said = tool(Command::new("fio").arg("--output-format=json").args(arguments))?;
    // Remarks may stand before the document.
    let document = said.find('{').map_or("", |start| &said[start..]);
    serde_json::from_str(document).map_err(|error| Trouble(format!("fio {arguments:?}: {error}: {said}")))
}

/// `nbdkit` on a unix socket in a folder.
pub struct Nbdkit {
    socket: PathBuf,
    _process: Process,
}

impl Nbdkit {
    /// Starts it and waits until it listens.
    pub fn start(dir: &Path, arguments: &[&str]) -> Result<Self> {
        need("nbdkit", "nbdkit")?;
        let socket = dir.join("nbdkit.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).args(arguments);
        let process = Process::start(command.stdout(Stdio::null()))?;
        wait_for("nbdkit", Duration::from_secs(10), || Ok(socket.exists().then_some(())))?;
        Ok(Self { socket, _process: process })
    }

    /// Where it is reached.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

/// An export as a file, by libnbd's `nbdfuse`; it is gone when this is dropped.
pub struct Mount {
    folder: PathBuf,
    process: Process,
}

impl Mount {
    /// Mounts the export below `folder`.
    pub fn new(folder: &Path, uri: &str) -> Result<Self> {
        need("nbdfuse", "libnbd-bin")?;
        need("fusermount3", "fuse3")?;
        std::fs::create_dir_all(folder).map_err(|error| Trouble(format!("{}: {error}", folder.display())))?;
        let process = Process::start(Command::new("nbdfuse").arg(folder.join("disk")).arg(uri))?;
        let mut mount = Self { folder: folder.to_owned(), process };
        wait_for("nbdfuse", Duration::from_secs(10), || {
            if mount.process.has_ended() {
                return Err(Trouble("nbdfuse ended; does this machine have /dev/fuse?".into()));
            }
            Ok(mount.file().exists().then_some(()))
        })?;
        Ok(mount)
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Unmounts it, and waits until all that was written has arrived.
    pub fn unmount(mut self) -> Result<()> {
        self.ask()?;
        wait_for("nbdfuse to end", Duration::from_secs(20), || Ok(self.process.has_ended().then_some(())))
    }

    fn ask(&self) -> Result<()> {
        tool(Command::new("fusermount3").arg("-u").arg(&self.folder)).map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.process.has_ended() {
            let _ = self.ask();
        }
    }
}
