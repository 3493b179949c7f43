//! A libvirt daemon of one's own, in session mode: it shares nothing with the machine's, and ends with its owner.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::programs::{Process, need, tool, wait_for};
use crate::{Result, Trouble, doing};

/// Debian's user nobody and its group nogroup: root's libvirt would be the machine's.
const NOBODY: u32 = 65534;
const URI: &str = "qemu:///session";

/// Tells the daemons of one process apart.
static NEXT_HOST: AtomicU64 = AtomicU64::new(1);

/// A running daemon and its domains.
pub struct Libvirt {
    dir: PathBuf,
    is_root: bool,
    process: Process,
}

impl Libvirt {
    /// Starts one that keeps everything in a folder, and lets others pass through the one around it. Its path must be
    /// short: sockets lie deep below it.
    pub fn start(dir: &Path) -> Result<Self> {
        need("libvirtd", "libvirt-daemon libvirt-daemon-driver-qemu")?;
        need("virsh", "libvirt-clients")?;
        need("setpriv", "util-linux")?;
        need("qemu-system-x86_64", "qemu-system-x86")?;
        fs::create_dir_all(dir).map_err(doing(dir.display()))?;
        let around = dir.parent().unwrap_or(dir);
        fs::set_permissions(around, Permissions::from_mode(0o711)).map_err(doing(around.display()))?;
        let uid = tool(Command::new("id").arg("-u"))?;
        let is_root = uid.trim() == "0";
        for folder in [dir.to_owned(), dir.join("h"), dir.join("r"), dir.join("h/.config"), config_dir(dir)] {
            fs::create_dir_all(&folder).map_err(doing(folder.display()))?;
            give(is_root, &folder)?;
        }
        // Each takes itself for a host of its own, so that domains can be migrated from one to another.
        let path = config_dir(dir).join("libvirtd.conf");
        let host = NEXT_HOST.fetch_add(1, Ordering::Relaxed);
        let text = format!("host_uuid = \"{:08x}-0000-4000-8000-{host:012x}\"\n", std::process::id());
        fs::write(&path, text).map_err(doing(path.display()))?;
        give(is_root, &path)?;
        Ok(Self { dir: dir.to_owned(), is_root, process: daemon(dir, is_root)? })
    }

    /// Ends the daemon and starts it again; domains go on running.
    pub fn restart(&mut self) -> Result<()> {
        self.process.terminate();
        self.process = daemon(&self.dir, self.is_root)?;
        Ok(())
    }

    /// The URI by which a site finds it.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("{URI}?socket={}", self.dir.join("r/libvirt/libvirt-sock").display())
    }

    /// A command of the user whose daemon this is.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        command_in(&self.dir, self.is_root, program)
    }

    /// Lets that user have a file or folder.
    pub fn give(&self, path: &Path) -> Result<()> {
        give(self.is_root, path)
    }

    /// Makes an empty qcow2 disk that its domains may use.
    pub fn make_disk(&self, path: &Path, bytes: u64) -> Result<()> {
        let create = ["create", "-q", "-f", "qcow2"];
        tool(Command::new("qemu-img").args(create).arg(path).arg(bytes.to_string()))?;
        self.give(path)
    }

    /// What `virsh` prints.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        tool(self.command("virsh").args(["-q", "-c", URI]).args(arguments))
    }

    /// Starts a domain without a system, paused, with these disks (target, qcow2 file); its processor is emulated.
    pub fn start_domain(&self, name: &str, disks: &[(&str, &Path)]) -> Result<()> {
        let disks: String = disks
            .iter()
            .map(|(target, path)| {
                format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
                     <source file='{}'/><target dev='{target}' bus='virtio'/></disk>",
                    path.display()
                )
            })
            .collect();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}</devices></domain>"
        );
        self.define(name, &xml)?;
        self.virsh(&["start", name, "--paused"])?;
        Ok(())
    }

    /// Defines a domain; it is destroyed with the daemon.
    pub fn define(&self, name: &str, xml: &str) -> Result<()> {
        let path = self.file(&format!("{name}.xml"), xml)?;
        self.virsh(&["define", &path.to_string_lossy()])?;
        Ok(())
    }

    /// Writes a file that the user can read, for `virsh`.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(doing(path.display()))?;
        self.give(&path)?;
        Ok(path)
    }

    /// Has QEMU write a byte over a stretch of a disk that has this alias, as the guest's device would, and flush it.
    pub fn write(&self, domain: &str, alias: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        self.qemu_io(domain, alias, &format!("write -P {byte} {offset} {len}"))?;
        self.qemu_io(domain, alias, "flush")
    }

    /// The same with a file's bytes, and without a flush.
    pub fn write_file(&self, domain: &str, alias: &str, offset: u64, file: &Path) -> Result<()> {
        let len = file.metadata().map_err(doing(file.display()))?.len();
        self.qemu_io(domain, alias, &format!("write -s {} {offset} {len}", file.display()))
    }

    fn qemu_io(&self, domain: &str, alias: &str, what: &str) -> Result<()> {
        let command = format!("qemu-io -d /machine/peripheral/{alias}/virtio-backend \"{what}\"");
        let said = self.virsh(&["qemu-monitor-command", domain, "--hmp", &command])?;
        // What it did it prints in QEMU's log; the monitor hears of errors alone.
        if said.trim().is_empty() { Ok(()) } else { Err(Trouble(format!("{what} of {alias}: {said}"))) }
    }

    /// What QEMU answers to a QMP command.
    pub fn qmp(&self, domain: &str, execute: &str, arguments: &Value) -> Result<Value> {
        let command = json!({"execute": execute, "arguments": arguments}).to_string();
        let said = self.virsh(&["qemu-monitor-command", domain, &command])?;
        let answer: Value = serde_json::from_str(&said).map_err(doing(&said))?;
        match answer.get("error") {
            Some(error) => Err(Trouble(format!("{execute} of {domain}: {error}"))),
            None => Ok(answer["return"].clone()),
        }
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // QEMU is not a child of the daemon.
        for domain in self.virsh(&["list", "--name"]).unwrap_or_default().split_whitespace() {
            let _ = self.virsh(&["destroy", domain]);
        }
    }
}

fn config_dir(dir: &Path) -> PathBuf {
    dir.join("h/.config/libvirt")
}

fn daemon(dir: &Path, is_root: bool) -> Result<Process> {
    let socket = dir.join("r/libvirt/libvirt-sock");
    let _ = fs::remove_file(&socket);
    let mut command = command_in(dir, is_root, "libvirtd");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let process = Process::start(&mut command)?;
    wait_for("libvirtd", Duration::from_secs(20), || Ok(UnixStream::connect(&socket).is_ok().then_some(())))?;
    Ok(process)
}

fn give(is_root: bool, path: &Path) -> Result<()> {
    if is_root { chown(path, Some(NOBODY), Some(NOBODY)).map_err(doing(path.display())) } else { Ok(()) }
}

fn command_in(dir: &Path, is_root: bool, program: &str) -> Command {
    let mut command = if is_root {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]);
        command.args(["--clear-groups", program]);
        command
    } else {
        Command::new(program)
    };
    command.env("HOME", dir.join("h")).env("XDG_RUNTIME_DIR", dir.join("r"));
    // Whatever the session of whoever runs this has told.
    for name in ["XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS"] {
        command.env_remove(name);
    }
    command
}
