//! QEMU's command line for a boot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::accelerator::{Accelerator, escaped};
use crate::address::IpSettings;
use crate::error::Error;
use crate::machine::{Bus, Firmware, Machine};
use crate::network::NetworkMap;
use crate::sign::SignOfLife;

/// Debian's OVMF: the code, and the variables that a machine starts with.
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// The port that the guest agent listens on, as everywhere.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// What this site's owner says of a VM, where what its QEMU told is not enough: `DIR/machines/VM.toml`. It is trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Local {
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
    /// Processors.
    pub cpus: Option<u32>,
    /// A kernel that is started without a boot loader.
    pub kernel: Option<PathBuf>,
    /// Its initramfs.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub append: Option<String>,
    /// Further arguments of QEMU, as they are.
    pub args: Vec<String>,
    /// The whole command line instead, for a VM that is to go on running here (`{disk:NAME}` stands for a disk's file);
    /// not for boot checks and tests, which are kept apart from everything.
    pub command: Vec<String>,
    /// What networks of the primary's site are here, for this VM.
    pub networks: NetworkMap,
    /// Addresses that the guest is to take here.
    pub ip: Vec<IpSettings>,
}

/// QEMU's name of the serial console.
pub(crate) const CONSOLE: &str = "console";
/// What QEMU keeps of it until it is read.
const CONSOLE_RING_BYTES: u32 = 1 << 20;

/// A disk as an NBD export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootDisk {
    /// The disk's name.
    pub name: String,
    /// The server's socket.
    pub socket: PathBuf,
    /// The export.
    pub export: String,
}

/// What is to be booted, and where its files go.
#[derive(Debug, Clone)]
pub struct Order {
    /// QEMU.
    pub program: String,
    /// Its processor.
    pub accelerator: Accelerator,
    /// The machine.
    pub machine: Machine,
    /// What the site's owner adds.
    pub local: Local,
    /// The disks, the one with the boot loader first.
    pub disks: Vec<BootDisk>,
    /// What shows that the guest lives.
    pub sign: SignOfLife,
    /// How long it may take.
    pub within: Duration,
    /// A folder for the console's log, the screenshot and the sockets.
    pub dir: PathBuf,
    /// Its screen can be looked at, and its keyboard used, over VNC on a unix socket in that folder.
    pub vnc: bool,
}

/// The files of a machine in its folder.
pub(crate) struct Files<'a>(pub &'a Path);

impl Files<'_> {
    pub fn qmp(&self) -> PathBuf {
        self.0.join("qmp")
    }

    pub fn agent(&self) -> PathBuf {
        self.0.join("agent")
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    pub fn errors(&self) -> PathBuf {
        self.0.join("qemu.log")
    }

    pub fn vnc(&self) -> PathBuf {
        self.0.join("vnc")
    }

    pub fn pid(&self) -> PathBuf {
        self.0.join("pid")
    }

    pub fn screen(&self) -> PathBuf {
        self.0.join("screen.png")
    }

    pub fn variables(&self) -> PathBuf {
        self.0.join("uefi-variables.fd")
    }
}

/// The command that boots what was ordered. `port` is where a TCP port of the guest is forwarded to.
pub(crate) fn command(order: &Order, port: Option<u16>) -> Result<Command, Error> {
    let Order { program, accelerator, machine, local, disks, sign, dir, vnc, .. } = order;
    let files = &Files(dir);
    let mut command = Command::new(program);
    command.args(board(machine.kind.name(), *accelerator, machine, local));
    if *vnc {
        command.arg("-vnc").arg(format!("unix:{}", escaped(&files.vnc())));
    }
    command.arg("-pidfile").arg(files.pid());
    // A guest that gets out of its devices gets into nothing.
    command.args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", escaped(&files.qmp())));
    // A ring, because a guest can write for ever.
    command.arg("-chardev").arg(format!("ringbuf,id={CONSOLE},size={CONSOLE_RING_BYTES}"));
    command.arg("-serial").arg(format!("chardev:{CONSOLE}"));
    command.args(agent(files));
    command.args(firmware(machine.firmware, local, files)?);
    network(&mut command, sign, port);
    let nodes = disks.iter().enumerate().map(|(place, disk)| {
        let node = format!("disk{place}");
        let told = json!({"driver": "nbd", "node-name": node, "export": disk.export,
            "server": {"type": "unix", "path": disk.socket}});
        (&*disk.name, node, told)
    });
    command.args(self::disks(machine, local, nodes));
    command.args(&local.args);
    Ok(command)
}

/// What every machine begins with.
pub(crate) fn board(kind: &str, accelerator: Accelerator, machine: &Machine, local: &Local) -> Vec<String> {
    let memory = local.memory_mib.unwrap_or(machine.memory_mib).to_string();
    let cpus = local.cpus.unwrap_or(machine.cpus).to_string();
    let words = ["-machine", kind, "-accel", accelerator.name(), "-cpu", "max", "-m", &memory, "-smp", &cpus];
    let nothing_else = ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "std"];
    words.into_iter().chain(nothing_else).map(Into::into).collect()
}

/// The guest agent's port.
pub(crate) fn agent(files: &Files<'_>) -> Vec<String> {
    let socket = format!("socket,id=agent,path={},server=on,wait=off", escaped(&files.agent()));
    let port = format!("virtserialport,chardev=agent,name={AGENT_PORT}");
    ["-device", "virtio-serial-pci", "-chardev", &socket, "-device", &port].map(Into::into).into()
}

/// The disks, each by its name, its node's name and its node; the one with the boot loader first.
pub(crate) fn disks<'a>(
    machine: &Machine,
    local: &Local,
    nodes: impl Iterator<Item = (&'a str, String, Value)>,
) -> Vec<String> {
    let (mut words, mut has_scsi) = (Vec::new(), false);
    for (place, (name, node, told)) in nodes.enumerate() {
        let bus = machine.bus(name);
        if bus == Bus::Scsi && !std::mem::replace(&mut has_scsi, true) {
            words.extend(["-device".into(), "virtio-scsi-pci,id=scsi".into()]);
        }
        let mut device = device(bus, place, &node);
        if local.kernel.is_none() {
            device.push_str(&format!(",bootindex={place}"));
        }
        words.extend(["-blockdev".into(), told.to_string(), "-device".into(), device]);
    }
    words
}

/// A disk's device.
fn device(bus: Bus, place: usize, node: &str) -> String {
    let device = match bus {
        Bus::Virtio => "virtio-blk-pci".to_owned(),
        Bus::Scsi => "scsi-hd,bus=scsi.0".to_owned(),
        Bus::Ide => "ide-hd".to_owned(),
        Bus::Nvme => format!("nvme,serial=disk{place}"),
    };
    format!("{device},drive={node}")
}

/// What starts the guest. A machine that has variables of its own firmware in its folder keeps them.
pub(crate) fn firmware(firmware: Firmware, local: &Local, files: &Files<'_>) -> Result<Vec<String>, Error> {
    let mut words = Vec::new();
    if let Some(kernel) = &local.kernel {
        words.extend(["-kernel".into(), kernel.display().to_string()]);
        if let Some(initrd) = &local.initrd {
            words.extend(["-initrd".into(), initrd.display().to_string()]);
        }
        if let Some(append) = &local.append {
            words.extend(["-append".into(), append.clone()]);
        }
    } else if firmware == Firmware::Uefi {
        if !Path::new(OVMF_CODE).exists() {
            return Err(Error::NoFirmware(OVMF_CODE.into()));
        }
        let variables = files.variables();
        if !variables.exists() {
            std::fs::copy(OVMF_VARS, &variables).map_err(Error::io("copy to", &variables))?;
        }
        words.extend(["-drive".into(), format!("if=pflash,format=raw,readonly=on,file={OVMF_CODE}")]);
        words.extend(["-drive".into(), format!("if=pflash,format=raw,file={}", escaped(&variables))]);
    }
    Ok(words)
}

/// A network in which the guest is alone, where one is needed at all.
fn network(command: &mut Command, sign: &SignOfLife, port: Option<u16>) {
    match (sign, port) {
        (SignOfLife::Tcp(inside), Some(outside)) => {
            command
                .arg("-netdev")
                .arg(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{outside}-:{inside}"));
            command.args(["-device", "virtio-net-pci,netdev=net"]);
        }
        _ => {
            command.args(["-nic", "none"]);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn words(definition: &Value, local: &Local, sign: &SignOfLife) -> Vec<String> {
        let disk = |name: &str| BootDisk {
            name: name.into(),
            socket: "/run/a,b/nbd.sock".into(),
            export: name.into(),
        };
        let disks = [disk("system"), disk("data")];
        let order = Order {
            program: "qemu".into(),
            accelerator: Accelerator::Tcg,
            machine: Machine::of_definition(definition),
            local: local.clone(),
            disks: disks.into(),
            sign: sign.clone(),
            within: Duration::ZERO,
            dir: "/var/lib/a,b/checks/1".into(),
            vnc: false,
        };
        let command = command(&order, Some(2222)).unwrap();
        command.as_std().get_args().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn nothing_of_a_definition_but_known_words_gets_into_the_command_line() {
        let evil = ",script=/tmp/x -monitor stdio";
        let definition = json!({
            "machine-type": format!("pc-q35{evil}"), "disk-devices": {"system": format!("ide-hd{evil}"), evil: evil},
            "query-name": {"name": evil}, "query-memory-size-summary": {"base-memory": 1 << 30},
        });
        let words = words(&definition, &Local::default(), &SignOfLife::default());
        assert!(!words.iter().any(|word| word.contains("script") || word.contains("stdio")), "{words:?}");
        assert!(
            words.contains(&"q35".to_owned()) && words.contains(&"ide-hd,drive=disk0,bootindex=0".to_owned())
        );
        assert!(words.contains(&"1024".to_owned()), "{words:?}");
    }

    #[test]
    fn a_guest_has_no_network_but_for_the_port_that_is_its_sign_of_life() {
        let none = words(&json!(null), &Local::default(), &SignOfLife::Agent);
        assert!(none.windows(2).any(|pair| pair == ["-nic", "none"]), "{none:?}");
        let tcp = words(&json!(null), &Local::default(), &SignOfLife::Tcp(22));
        assert!(tcp.iter().any(|word| word == "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:2222-:22"));
        assert!(!tcp.contains(&"-nic".to_owned()));
    }

    #[test]
    fn what_the_owner_says_counts_and_commas_in_paths_are_no_options() {
        let local = Local {
            memory_mib: Some(300),
            kernel: Some("/boot/vmlinuz".into()),
            append: Some("console=ttyS0".into()),
            args: vec!["-rtc".into(), "base=utc".into()],
            ..Local::default()
        };
        let words = words(&json!({"query-block": [{"device": "pflash0"}]}), &local, &SignOfLife::Agent);
        for pair in
            [["-m", "300"], ["-kernel", "/boot/vmlinuz"], ["-append", "console=ttyS0"], ["-rtc", "base=utc"]]
        {
            assert!(words.windows(2).any(|words| words == pair), "{words:?}");
        }
        assert!(
            words.contains(&"unix:/var/lib/a,,b/checks/1/qmp,server=on,wait=off".to_owned()),
            "{words:?}"
        );
    }
}
