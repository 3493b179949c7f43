//! A running guest: a QEMU process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rig::{Process, Result, doing, need, wait_for};

use crate::console::Console;
use crate::disk::Disk;
use crate::image::GuestImage;
use crate::ledger::Acked;

const MEMORY_MIB: u32 = 448;
/// The address of its network card, on a network called `lan` that leads nowhere.
pub const MAC: &str = "52:54:00:0a:f7:e1";
/// The name of the port that the guest agent listens on, as everywhere.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Makes file systems and empty ledgers, and switches itself off.
    Install,
    /// Commits numbers for ever.
    Run,
    /// Checks what is there, and switches itself off.
    Check,
}

/// A guest. It is killed with its owner.
pub struct Guest {
    process: Process,
    console: Console,
    dir: PathBuf,
}

impl Guest {
    /// Starts one on these disks, in their order. Its sockets and its console's log go into `dir`.
    pub fn start(image: &GuestImage, disks: &[Disk], mode: Mode, dir: &Path) -> Result<Self> {
        need("qemu-system-x86_64", "qemu-system-x86")?;
        std::fs::create_dir_all(dir).map_err(doing(dir.display()))?;
        for socket in [qmp(dir), agent(dir)] {
            let _ = std::fs::remove_file(socket);
        }
        let log = dir.join("console.log");
        let log = File::create(&log).map_err(doing(log.display()))?;
        let errors = dir.join("qemu.log");
        let errors = File::create(&errors).map_err(doing(errors.display()))?;
        let (pipe, serial) = std::io::pipe().map_err(doing("opening a pipe"))?;
        let mut command = command_line(image, disks, mode, dir);
        command.stdout(serial).stderr(errors);
        let process = Process::start(&mut command)?;
        // The command has an end of the pipe too, which would never come to its end.
        drop(command);
        let mut guest = Self { process, console: Console::of(pipe, log), dir: dir.to_owned() };
        wait_for("QEMU's monitor", Duration::from_secs(30), || {
            if guest.has_ended() {
                let said = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
                return Err(rig::Trouble(format!("QEMU ended at once: {said}")));
            }
            Ok(qmp(dir).exists().then_some(()))
        })?;
        Ok(guest)
    }

    /// What it says.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The newest numbers that it has acknowledged.
    #[must_use]
    pub fn acked(&self) -> Acked {
        self.console.acked()
    }

    /// Its QMP socket.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        qmp(&self.dir)
    }

    /// The socket of its guest agent, which runs in [`Mode::Run`].
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        agent(&self.dir)
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether QEMU has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    /// Waits until it has switched itself off.
    pub fn wait_ended(&mut self, limit: Duration) -> Result<()> {
        wait_for("the guest to switch itself off", limit, || Ok(self.has_ended().then_some(())))
    }

    /// Pulls the plug: SIGKILL. What QEMU had not written is lost; what it has said stays readable.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

fn qmp(dir: &Path) -> PathBuf {
    dir.join("qmp.sock")
}

fn agent(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

fn command_line(image: &GuestImage, disks: &[Disk], mode: Mode, dir: &Path) -> Command {
    let accel = std::env::var("AFTERIMAGE_GUEST_ACCEL").unwrap_or_else(|_| "tcg".into());
    let mode = match mode {
        Mode::Install => "install",
        Mode::Run => "run",
        Mode::Check => "check",
    };
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-name", "guest", "-machine", "pc", "-accel", &accel, "-cpu", "max", "-smp", "1"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp(dir).display()));
    command.arg("-kernel").arg(image.kernel()).arg("-initrd").arg(image.initramfs());
    // No mitigations: there is nobody in the guest to be kept apart, and emulation is slow enough.
    command
        .arg("-append")
        .arg(format!("console=ttyS0 loglevel=1 panic=-1 no_timer_check mitigations=off guest.mode={mode}"));
    for disk in disks {
        command.arg("-blockdev").arg(disk.blockdev());
        command.arg("-device").arg(format!("virtio-blk-pci,drive={0},id=device-{0}", disk.name()));
    }
    command.args(["-netdev", "user,id=lan,restrict=on"]);
    command.arg("-device").arg(format!("virtio-net-pci,netdev=lan,mac={MAC},romfile="));
    command.arg("-chardev").arg(format!("socket,id=agent,path={},server=on,wait=off", agent(dir).display()));
    command.args(["-device", "virtio-serial-pci"]);
    command.arg("-device").arg(format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
    command
}
