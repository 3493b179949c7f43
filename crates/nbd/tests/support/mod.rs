//! Real NBD servers and clients for the tests, and our own server. Servers are started in the background (they
//! return when they listen) and killed on drop.
#![allow(dead_code, reason = "each test file uses some of it")]

pub mod raw;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A server process and its folder.
pub struct Server {
    folder: tempfile::TempDir,
}

impl Server {
    /// `qemu-nbd` with these arguments; the export has no name unless they give one.
    pub fn qemu_nbd(folder: tempfile::TempDir, arguments: &[&str]) -> Self {
        let server = Self { folder };
        let (socket, pid) = (server.socket(), server.pid_file());
        let mut all =
            vec!["--fork", "--persistent", "--shared=8", "--socket", text(&socket), "--pid-file", text(&pid)];
        all.extend(arguments);
        run("qemu-nbd", &all);
        server
    }

    /// `nbdkit` with these arguments.
    pub fn nbdkit(arguments: &[&str]) -> Self {
        let server = Self { folder: folder() };
        let (socket, pid) = (server.socket(), server.pid_file());
        let mut all = vec!["--unix", text(&socket), "--pidfile", text(&pid)];
        all.extend(arguments);
        run("nbdkit", &all);
        server
    }

    /// `qemu-storage-daemon` with these arguments and an NBD server.
    pub fn storage_daemon(folder: tempfile::TempDir, arguments: &[&str]) -> Self {
        let server = Self { folder };
        let (socket, pid) = (server.socket(), server.pid_file());
        let address = format!("addr.type=unix,addr.path={}", socket.display());
        let mut all = vec!["--daemonize", "--pidfile", text(&pid), "--nbd-server", &address];
        all.extend(arguments);
        run("qemu-storage-daemon", &all);
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    pub fn kill(&self) {
        if let Ok(pid) = std::fs::read_to_string(self.pid_file()) {
            // It may have ended by itself.
            let _ = Command::new("kill").args(["-9", pid.trim()]).output();
        }
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.path().join("pid")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Our own server in a folder, answering.
pub struct Ours {
    pub server: nbd::Server,
    pub folder: tempfile::TempDir,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<nbd::Result<()>>,
}

impl Ours {
    pub fn start() -> Self {
        Self::start_with(nbd::Limits::default())
    }

    pub fn start_with(limits: nbd::Limits) -> Self {
        let folder = folder();
        let server = nbd::Server::bind_with(folder.path().join("ours.sock"), limits).expect("a socket");
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve(async { drop(stopped.await) }).await }
        });
        Self { server, folder, stop, serving }
    }

    /// Shows a disk and gives its URI.
    pub fn show(&self, name: &str, disk: impl nbd::Disk) -> String {
        self.server.add(name, Arc::new(disk)).expect("the name is free");
        self.server.uri(name)
    }

    pub async fn connect(&self, name: &str) -> nbd::Client {
        nbd::Client::connect(self.server.path(), name, &[nbd::BASE_ALLOCATION]).await.expect("our own server")
    }

    /// Stops it and waits for that.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.serving.await.expect("no panic").expect("served once");
    }
}

/// A sparse file with patterned data at these places (offset, length).
pub fn sparse_file(path: &Path, size_bytes: u64, data: &[(u64, usize)]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(size_bytes).expect("a length");
    for &(offset, len) in data {
        file.write_all_at(&pattern(offset, len), offset).expect("room");
    }
}

/// A file for a writable layer, new or as it is.
pub fn layer_file(path: &Path) -> std::fs::File {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).open(path).expect("a file")
}

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Runs a program to its end; fails with what to install if it is not there.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let mut shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {shown}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    write!(shown, "{}", String::from_utf8_lossy(&output.stderr)).expect("a string takes text");
    shown
}

pub fn output(program: &str, arguments: &[&str]) -> Output {
    let package = match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdkit" => "nbdkit",
        "fio" => "fio",
        _ => "qemu-utils",
    };
    let result = Command::new(program).args(arguments).output();
    result.unwrap_or_else(|error| panic!("needs {program}: apt-get install {package} ({error})"))
}

/// Bytes that differ from place to place.
pub fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1).collect()
}
