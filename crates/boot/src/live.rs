//! A VM that goes on running here: after a failover, from the replica's disks.
//!
//! ```text
//!                start: QEMU in a process group of its own, named in the folder
//!   not running ───────────────────────────────────────────────────────────▶ running
//!        ▲                                                                      │
//!        └──────────── the guest shuts down; stop (power button); kill ─────────┘
//! ```
//!
//! It outlives us: a site that ends, is killed or is updated takes no VM with it. What is known of it is in its
//! folder alone, so that any later run of the site finds it: the process and its sockets.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu::Qmp;
use serde_json::json;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::accelerator::{Accelerator, escaped};
use crate::command::{Files, Local, agent, board, disks, firmware};
use crate::error::Error;
use crate::machine::Machine;
use crate::network::{Connection, Nic};
use crate::run::{monitor_of, process};

/// How long QEMU may take to have everything open, and a VM's plug to be pulled.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether a VM has ended.
const LOOK: Duration = Duration::from_millis(100);
/// What QEMU takes for a node's name, in bytes.
const NODE_BYTES_MAX: usize = 31;

/// A disk of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// Its name, which its node gets too if QEMU takes it.
    pub name: String,
    /// The qcow2 file.
    pub path: PathBuf,
}

/// A network card, and where its cable goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cabled {
    /// The card.
    pub nic: Nic,
    /// Where to.
    pub to: Connection,
}

/// A VM that is to run here.
#[derive(Debug, Clone)]
pub struct LiveOrder {
    /// QEMU.
    pub program: String,
    /// Its processor.
    pub accelerator: Accelerator,
    /// What its people call it.
    pub name: String,
    /// The machine.
    pub machine: Machine,
    /// What the site's owner says of it.
    pub local: Local,
    /// Its disks, the one with the boot loader first.
    pub disks: Vec<LiveDisk>,
    /// Its network cards.
    pub nics: Vec<Cabled>,
    /// Where its sockets, and what it is known by, are.
    pub dir: PathBuf,
}

/// The folder of a VM that runs here, or did.
#[derive(Debug, Clone)]
pub struct Live {
    dir: PathBuf,
}

impl LiveOrder {
    /// The program and its arguments: the owner's own, or one made of the definition.
    pub async fn command(&self) -> Result<Vec<String>, Error> {
        let mut words = if self.local.command.is_empty() { self.made().await? } else { self.filled_in()? };
        let files = Files(&self.dir);
        words.extend(["-pidfile".into(), files.pid().display().to_string()]);
        for socket in [Live::replication, Live::control, Live::people] {
            let socket = socket(&Live::at(self.dir.clone()));
            words.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", escaped(&socket))]);
        }
        Ok(words)
    }

    /// The owner's command line, with the disks' files in their places.
    fn filled_in(&self) -> Result<Vec<String>, Error> {
        let mut words = self.local.command.clone();
        for disk in &self.disks {
            let (place, path) = (format!("{{disk:{}}}", disk.name), disk.path.display().to_string());
            if !words.iter().any(|word| word.contains(&place)) {
                return Err(Error::DiskNotUsed { disk: disk.name.clone() });
            }
            // In one of QEMU's options a comma is written twice; in JSON it is not.
            for word in &mut words {
                let path = if word.starts_with('{') { path.clone() } else { path.replace(',', ",,") };
                *word = word.replace(&place, &path);
            }
        }
        match words.iter().find_map(|word| Some(word.split_once("{disk:")?.1.split('}').next()?.to_owned())) {
            Some(disk) => Err(Error::NoSuchDisk { disk }),
            None => Ok(words),
        }
    }

    async fn made(&self) -> Result<Vec<String>, Error> {
        let Self { machine, local, dir, .. } = self;
        let files = Files(dir);
        let mut words = vec![self.program.clone(), "-name".into(), self.name.replace(',', ",,")];
        words.extend(board(&self.board().await?, self.accelerator, machine, local));
        words.extend(machine.uuid.iter().flat_map(|uuid| ["-uuid".into(), uuid.clone()]));
        words.extend(["-vnc".into(), format!("unix:{}", escaped(&files.vnc()))]);
        // The helper that opens a bridge is another program, with more rights.
        let bridged = self.nics.iter().any(|cabled| matches!(cabled.to, Connection::Bridge(_)));
        let bounds =
            if bridged { "on,obsolete=deny" } else { "on,obsolete=deny,elevateprivileges=deny,spawn=deny" };
        words.extend(["-sandbox".into(), bounds.into()]);
        let console = Live::at(dir.clone()).console();
        words.extend([
            "-chardev".into(),
            format!("socket,id=console,path={},server=on,wait=off", escaped(&console)),
        ]);
        words.extend(["-serial".into(), "chardev:console".into()]);
        words.extend(agent(&files));
        words.extend(firmware(machine.firmware, local, &files)?);
        for (place, cabled) in self.nics.iter().enumerate() {
            words.extend(network(place, cabled));
        }
        words.extend(self.disk_words());
        words.extend(local.args.clone());
        Ok(words)
    }

    /// The board of the version that the guest knows, if this QEMU has it; else the newest.
    async fn board(&self) -> Result<String, Error> {
        let kind = self.machine.kind;
        let Some(versioned) = self.machine.version.map(|version| kind.versioned(version)) else {
            return Ok(kind.name().into());
        };
        let told = Command::new(&self.program).args(["-machine", "help"]).stdin(Stdio::null()).output().await;
        let told = told.map_err(|source| Error::Program { program: self.program.clone(), source })?;
        let known = String::from_utf8_lossy(&told.stdout);
        let is_known = known.lines().any(|line| line.split(' ').next() == Some(&versioned));
        Ok(if is_known { versioned } else { kind.name().into() })
    }

    fn disk_words(&self) -> Vec<String> {
        let nodes = self.disks.iter().enumerate().map(|(place, disk)| {
            let node = node_name(&disk.name).unwrap_or_else(|| format!("disk{place}"));
            let told = json!({"driver": "qcow2", "node-name": node, "discard": "unmap",
                "file": {"driver": "file", "filename": disk.path, "discard": "unmap"}});
            (&*disk.name, node, told)
        });
        disks(&self.machine, &self.local, nodes)
    }
}

/// A disk's name as a node's, if QEMU takes it.
fn node_name(name: &str) -> Option<String> {
    let is_word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    let begins = name.starts_with(|first: char| first.is_ascii_alphabetic());
    (is_word && begins && name.len() <= NODE_BYTES_MAX).then(|| name.to_owned())
}

fn network(place: usize, cabled: &Cabled) -> Vec<String> {
    let card = format!("{},mac={}", cabled.nic.model.device(), cabled.nic.mac);
    let cable = match &cabled.to {
        Connection::None => return vec!["-device".into(), card],
        Connection::Bridge(bridge) => format!("bridge,id=net{place},br={bridge}"),
        Connection::Tap(tap) => format!("tap,id=net{place},ifname={tap},script=no,downscript=no"),
        Connection::User => format!("user,id=net{place}"),
    };
    vec!["-netdev".into(), cable, "-device".into(), format!("{card},netdev=net{place}")]
}

impl Live {
    /// The VM of a folder.
    #[must_use]
    pub const fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// A file in its folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The monitor for replication, which keeps it for itself.
    #[must_use]
    pub fn replication(&self) -> PathBuf {
        self.dir.join("qmp-replication")
    }

    /// The monitor for starting and stopping.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.dir.join("qmp-control")
    }

    /// The monitor that nothing of ours uses.
    #[must_use]
    pub fn people(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// The serial console.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    /// The guest agent.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        Files(&self.dir).agent()
    }

    /// The screen, for VNC.
    #[must_use]
    pub fn screen(&self) -> PathBuf {
        Files(&self.dir).vnc()
    }

    /// Writes a file in its folder, durably: all of it, or the one that was there stays.
    pub fn keep(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (path, new) = (self.path(name), self.path(&format!("{name}.new")));
        let written = fs::write(&new, bytes)
            .and_then(|()| File::open(&new)?.sync_all())
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| File::open(&self.dir)?.sync_all());
        written.map_err(Error::io("write", &path))
    }

    /// The process, while it runs.
    #[must_use]
    pub fn process(&self) -> Option<i32> {
        process(&self.dir, &self.control())
    }

    /// Makes the folder, for its owner alone.
    pub fn make_folder(&self) -> Result<(), Error> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(Error::io("make the folder", &self.dir))
    }

    /// Starts it; gives its process. What QEMU says against it is the error.
    pub async fn start(&self, command: &[String]) -> Result<i32, Error> {
        if let Some(process) = self.process() {
            return Err(Error::Runs { process });
        }
        self.make_folder()?;
        self.forget_process()?;
        let said = Files(&self.dir).errors();
        let errors = File::create(&said).map_err(Error::io("make", &said))?;
        let (program, arguments) = command.split_first().ok_or(Error::NoCommand)?;
        let mut starting = Command::new(program);
        // In a group of its own: who stops the site from its terminal does not mean the VM.
        starting.args(arguments).process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut child =
            starting.spawn().map_err(|source| Error::Program { program: program.clone(), source })?;
        // It has everything open when its monitor answers.
        if let Err(error) = monitor_of(&mut child, &self.control(), &said, PATIENCE).await {
            let _ = child.kill().await;
            return Err(error);
        }
        // Its end is collected whenever it comes, and by whoever is there then.
        tokio::spawn(async move { child.wait().await });
        self.process().ok_or_else(|| Error::Ended { said: "it is gone again".into() })
    }

    /// Presses the power button, and waits for the guest to shut down.
    pub async fn shut_down(&self, within: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + within;
        let Some(process) = self.process() else { return Ok(()) };
        let monitor = Qmp::connect(&self.control(), PATIENCE).await?;
        monitor.run(qemu::Command::bare("system_powerdown")).await?;
        while self.process() == Some(process) {
            if is_shut_down(&monitor).await {
                return self.pull_the_plug().await;
            }
            if Instant::now() >= deadline {
                return Err(Error::KeepsRunning { within });
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Ends it as a power cut does; what QEMU has of the guest's writes is written.
    pub async fn pull_the_plug(&self) -> Result<(), Error> {
        let Some(process) = self.process() else { return Ok(()) };
        if let Ok(monitor) = Qmp::connect(&self.control(), LOOK * 50).await {
            // Its answer may not come any more.
            let _ = monitor.run(qemu::Command::bare("quit")).await;
        }
        let begun = Instant::now();
        while self.process() == Some(process) {
            if begun.elapsed() > PATIENCE / 2 {
                let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
            }
            if begun.elapsed() > PATIENCE {
                return Err(Error::KeepsRunning { within: PATIENCE });
            }
            sleep(LOOK).await;
        }
        self.forget_process()
    }

    fn forget_process(&self) -> Result<(), Error> {
        let path = Files(&self.dir).pid();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes all that is known of it. It must not run.
    pub fn forget(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &self.dir)(error))
            }
            _ => Ok(()),
        }
    }
}

/// A guest that is off while its QEMU is still there: so it is after a shutdown for a planned failover.
async fn is_shut_down(monitor: &Qmp) -> bool {
    let status = monitor.run(qemu::Command::bare("query-status")).await;
    status.is_ok_and(|status| status["status"] == "shutdown")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn order(local: Local, definition: &Value) -> LiveOrder {
        let machine = Machine::of_definition(definition);
        let to = ["bridge:br-dr", "none"].map(|to| to.parse().unwrap());
        let nics = machine.nics.clone().into_iter().zip(to).map(|(nic, to)| Cabled { nic, to }).collect();
        let disk = |name: &str| LiveDisk { name: name.into(), path: format!("/var/a,b/{name}.qcow2").into() };
        LiveOrder {
            program: "true".into(),
            accelerator: Accelerator::Tcg,
            name: "web".into(),
            machine,
            local,
            disks: vec![disk("system"), disk("#block7")],
            nics,
            dir: "/var/a,b/web".into(),
        }
    }

    async fn words(local: Local, definition: &Value) -> Vec<String> {
        order(local, definition).command().await.unwrap()
    }

    fn has(words: &[String], option: &str, value: &str) -> bool {
        words.windows(2).any(|pair| pair[0] == option && pair[1] == value)
    }

    #[tokio::test]
    async fn a_machine_is_made_of_what_is_known_words_alone() {
        let evil = ",script=/tmp/x";
        let definition = json!({"machine-type": format!("pc-q35-7.2{evil}-machine"), "disk-devices": {"system": "scsi-hd"},
            "query-uuid": {"UUID": "6f1e0b3c-0000-4000-8000-0123456789ab"}, "networks": [
                {"device": "e1000", "mac": "52:54:00:00:00:01", "network": evil},
                {"device": "virtio-net-pci", "mac": "52:54:00:00:00:02", "network": "lan"},
                {"device": format!("rtl8139{evil}"), "mac": "52:54:00:00:00:03", "network": "lan"}]});
        let words = words(Local::default(), &definition).await;
        assert!(has(&words, "-netdev", "bridge,id=net0,br=br-dr"), "{words:?}");
        assert!(has(&words, "-device", "e1000,mac=52:54:00:00:00:01,netdev=net0"), "{words:?}");
        assert!(has(&words, "-device", "virtio-net-pci,mac=52:54:00:00:00:02"), "no cable: {words:?}");
        assert!(has(&words, "-device", "scsi-hd,bus=scsi.0,drive=system,bootindex=0"), "{words:?}");
        assert!(
            has(&words, "-device", "virtio-blk-pci,drive=disk1,bootindex=1"),
            "no node's name: {words:?}"
        );
        assert!(has(&words, "-uuid", "6f1e0b3c-0000-4000-8000-0123456789ab"), "{words:?}");
        assert!(has(&words, "-machine", "q35"), "a version that this QEMU has not: {words:?}");
        assert!(words.contains(&"unix:/var/a,,b/web/qmp,server=on,wait=off".into()), "{words:?}");
        assert!(!words.iter().any(|word| word.contains("script")), "{words:?}");
    }

    #[tokio::test]
    async fn an_owners_command_line_gets_the_disks_and_nothing_is_left_out() {
        let local = |words: &[&str]| Local {
            command: words.iter().map(|&word| word.into()).collect(),
            ..Local::default()
        };
        let json = r#"{"driver":"qcow2","file":{"driver":"file","filename":"{disk:#block7}"}}"#;
        let words =
            words(local(&["qemu", "-drive", "file={disk:system},if=virtio", "-blockdev", json]), &json!({}))
                .await;
        assert_eq!(words[..3], ["qemu", "-drive", "file=/var/a,,b/system.qcow2,if=virtio"]);
        assert!(words[4].contains(r#""filename":"/var/a,b/#block7.qcow2""#), "{}", words[4]);
        assert!(words.contains(&"-pidfile".into()));
        let without = order(local(&["qemu", "{disk:system}"]), &json!({})).command().await.unwrap_err();
        assert!(without.to_string().contains("#block7"), "{without}");
        let other =
            order(local(&["qemu", "{disk:system}{disk:#block7}{disk:nothing}"]), &json!({})).command().await;
        assert!(other.unwrap_err().to_string().contains("nothing"));
    }
}
