//! Two sites, a line between them, and a VM's disks under a writer.
#![allow(dead_code, reason = "each test file uses its part")]

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use model::{LogId, Phase, VmId};
use rig::{Line, Output, Site, StorageDaemon, Writer, fill, state_of_files};
use serde_json::Value;
use tempfile::TempDir;
use wire::{Client, Identity, Offer, OfferedDisk};
use witness::{Region, Script};

pub const MIB: u64 = 1 << 20;
/// The VM's disks: of different sizes, the second no multiple of a MiB. The second has room for bursts.
pub const DISKS: [(&str, u64); 2] = [("system", 48 * MIB), ("data", 640 * MIB + 20480)];
/// Where on the second disk a burst goes: nothing else writes there.
pub const BURST_AT: u64 = 64 * MIB;
/// Long enough for a loaded machine; nothing waits so long when all is well.
pub const LONG: Duration = Duration::from_secs(60);
/// The VM.
pub const VM: &str = "web";

/// Everything of one test; ends with it.
pub struct World {
    /// By [`World::backup`].
    pub backups_made: Cell<usize>,
    pub writer: Option<Writer>,
    pub script: Arc<Script>,
    pub branch: Site,
    pub head: Site,
    pub line: Line,
    pub daemon: StorageDaemon,
    pub dir: TempDir,
}

impl World {
    /// Two sites that are peers, and a VM that is not protected yet.
    pub fn new(seed: u64) -> Self {
        Self::with_head_in(seed, None)
    }

    /// The same with the replica's site in a folder of its own.
    pub fn with_head_in(seed: u64, head_dir: Option<&Path>) -> Self {
        Self::over(seed, head_dir, |dir| StorageDaemon::start(dir, &DISKS))
    }

    /// The same where QEMU logs all that is written to the disks.
    pub fn logged(seed: u64) -> Self {
        Self::over(seed, None, |dir| StorageDaemon::start_logged(dir, &DISKS))
    }

    fn over(
        seed: u64,
        head_dir: Option<&Path>,
        start: impl FnOnce(&Path) -> rig::Result<StorageDaemon>,
    ) -> Self {
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let daemon = start(&dir.path().join("vm")).unwrap();
        let regions = (0..DISKS.len()).map(|disk| Region { disk, offset: 4 * MIB, len: 8 * MIB });
        let script = Arc::new(Script::new(seed, regions.collect(), 5));
        let (head, branch, line) = sites(dir.path(), head_dir);
        Self { backups_made: Cell::new(0), writer: None, script, branch, head, line, daemon, dir }
    }

    /// Starts to write, going on where an earlier writer stopped.
    pub fn write(&mut self, from: u64, pause: Duration) {
        self.writer = Some(Writer::start(&self.daemon, self.script.clone(), from, pause).unwrap());
    }

    /// Writes `mib` MiB that do not compress, beside the writer.
    pub fn burst(&self, mib: u64, seed: u64) {
        fill(&self.daemon, DISKS[1].0, BURST_AT, mib * MIB, seed).unwrap();
    }

    /// Stops writing; the number to go on with.
    pub fn quiet(&mut self) -> u64 {
        self.writer.take().map_or(1, Writer::stop)
    }

    /// The newest write begun.
    pub fn begun(&self) -> u64 {
        self.writer.as_ref().map_or(u64::MAX, Writer::begun)
    }

    /// Protects the VM.
    pub fn protect(&self, every: &str, more: &[&str]) -> Value {
        let arguments = protect_arguments(&self.daemon, every, more);
        self.branch.ok(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
    }

    /// Waits until cycles of changes run.
    pub fn replicating(&self) -> Value {
        self.branch.wait_vm(VM, "to replicate", LONG, |vm| vm["state"] == "replicating").unwrap()
    }

    /// Protects the VM, and pauses it after a cycle: from now on only others send logs of it.
    pub fn paused(&self) -> Paused {
        self.protect("1s", &[]);
        self.replicating();
        self.branch.ok(&["sync", VM]).unwrap();
        self.branch.ok(&["pause", VM]).unwrap();
        let before = self.head.vm(VM).unwrap();
        let points = self.head.ok(&["points", VM]).unwrap();
        let last = points["points"].as_array().unwrap().last().unwrap();
        Paused {
            vm: before["id"].as_str().unwrap().parse().unwrap(),
            newest: before["received"].as_u64().unwrap(),
            last: last["id"].as_str().unwrap().parse().unwrap(),
            before,
        }
    }

    /// Backs the replica up.
    pub fn backup(&self, more: &[&str]) -> Output {
        let output = self.head.run(&[&["backup", VM], more].concat()).unwrap();
        self.backups_made.set(self.backups_made.get() + usize::from(output.status == 0));
        output
    }

    /// Restores a backup to a new folder; the images in the disks' order.
    pub fn restore(&self, backup: &str) -> Vec<PathBuf> {
        let to = self.dir.path().join(format!("restored-{}", &backup[..8]));
        self.head.ok(&["restore", VM, "--backup", backup, "--to", path(&to), "--overwrite"]).unwrap();
        DISKS.iter().map(|(name, _)| to.join(format!("{name}.raw"))).collect()
    }

    /// The state that images show; panics if they show none.
    pub fn state(&self, images: &[PathBuf]) -> u64 {
        state_of_files(&self.script, self.begun(), images).unwrap_or_else(|violation| panic!("{violation}"))
    }

    /// The recovery points at the replica, oldest first.
    pub fn points(&self) -> Vec<Value> {
        let mut points = self.head.ok(&["points", VM]).unwrap()["points"].as_array().unwrap().clone();
        points.sort_by_key(|point| point["number"].as_u64());
        points
    }

    /// Shows a point; `None` if it was dropped since it was listed.
    pub fn export_point(&self, point: &Value, more: &[&str]) -> Option<Shown> {
        let id = point["id"].as_str().unwrap();
        let output = self.head.run(&[&["export", VM, "--point", id], more].concat()).unwrap();
        if output.code() == Some("no-such-point") {
            return None;
        }
        assert_eq!(output.status, 0, "{output:?}");
        Some(Shown::of(&output.json))
    }

    /// Ends an export.
    pub fn unexport(&self, shown: &Shown) {
        self.head.ok(&["unexport", &shown.id]).unwrap();
    }

    /// How many backups are listed.
    pub fn backups(&self) -> usize {
        self.head.ok(&["backups", VM]).unwrap()["backups"].as_array().unwrap().len()
    }
}

/// The command that protects a daemon's VM, to the site `head`.
pub fn protect_arguments(daemon: &StorageDaemon, every: &str, more: &[&str]) -> Vec<String> {
    let (qmp, nbd) = (daemon.qmp(), daemon.nbd());
    let arguments =
        ["protect", VM, "--qmp", path(&qmp), "--nbd", path(&nbd), "--to", "head", "--every", every];
    arguments.iter().chain(more).map(|&argument| argument.to_owned()).collect()
}

/// What a stranger may offer: a VM with one disk.
pub fn forged_offer(vm: VmId, name: &str, disk_bytes: u64) -> Offer {
    Offer {
        vm,
        vm_name: name.parse().unwrap(),
        disks: vec![OfferedDisk { name: "system".parse().unwrap(), size_bytes: disk_bytes }],
        interval_s: 1,
        points: 0,
        primary_name: "somebody".into(),
        definition: Value::Null,
        phase: Phase::Replicating,
        error: None,
        paused: false,
        generation: 1,
        media: None,
        pins: Vec::new(),
        group: None,
    }
}

/// Two sites that run and are peers, the replica's first, and the line between them: quick to cycle and to
/// try again.
pub fn sites(dir: &Path, head_dir: Option<&Path>) -> (Site, Site, Line) {
    let mut head = Site::init(head_dir.unwrap_or(dir), "head").unwrap();
    let mut branch = Site::init(dir, "branch").unwrap();
    let line = Line::to(head.address()).unwrap();
    // Invites name the line, so that all replication crosses it.
    let advertise = format!("\nadvertise = \"{}\"\n", line.address());
    head.configure(&[("\n# What peers are told", &format!("{advertise}# What peers are told"))]).unwrap();
    for site in [&head, &branch] {
        site.configure(&[
            ("interval-min-s = 5", "interval-min-s = 1"),
            ("backoff-s = [60, 120, 240, 480, 600, 1800]", "backoff-s = [1]"),
            ("patience-s = 30", "patience-s = 3"),
            ("delay-max-s = 900", "delay-max-s = 2"),
            ("free-reserve-mib = 1024", "free-reserve-mib = 4"),
        ])
        .unwrap();
    }
    head.serve().unwrap();
    branch.serve().unwrap();
    head.invite(&branch).unwrap();
    (head, branch, line)
}

/// A third site `far` in `dir`, behind a line of its own that its invites name; with these changes of its config.
pub fn far_site(dir: &Path, changes: &[(&str, &str)]) -> (Site, Line) {
    let mut far = Site::init(dir, "far").unwrap();
    let line = Line::to(far.address()).unwrap();
    let advertise = format!("\nadvertise = \"{}\"\n# What peers are told", line.address());
    let usual = [
        ("\n# What peers are told", advertise.as_str()),
        ("interval-min-s = 5", "interval-min-s = 1"),
        ("free-reserve-mib = 1024", "free-reserve-mib = 4"),
    ];
    far.configure(&[&usual, changes].concat()).unwrap();
    far.serve().unwrap();
    (far, line)
}

/// What QEMU has that it was not started with: jobs, exports, nodes, bitmaps. Asked over a QMP socket that
/// nobody else has just now.
pub fn in_qemu(socket: &Path, disks: &[&str]) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ask = |command: &'static str| -> Value {
        runtime.block_on(async {
            let qmp = qemu::Qmp::connect(socket, Duration::from_secs(10)).await.unwrap();
            qmp.run(qemu::Command::bare(command)).await.unwrap()
        })
    };
    let mut found = Vec::new();
    let questions =
        [("query-jobs", "id"), ("query-block-exports", "id"), ("query-named-block-nodes", "node-name")];
    for (command, key) in questions {
        for item in ask(command).as_array().unwrap() {
            let name = item[key].as_str().unwrap();
            let ours = !name.starts_with("guest-") && !disks.contains(&name) && !name.starts_with('#');
            found.extend(ours.then(|| format!("{command}: {name}")));
            for bitmap in item["dirty-bitmaps"].as_array().unwrap_or(&Vec::new()) {
                found.push(format!("bitmap: {}", bitmap["name"]));
            }
        }
    }
    found
}

/// A replica to which its primary sends nothing more.
pub struct Paused {
    pub vm: VmId,
    /// Its newest log: the number, and the id.
    pub newest: u64,
    pub last: LogId,
    /// What the replica's site tells of it.
    pub before: Value,
}

/// A site's own certificate, in our hands, towards its first peer.
pub fn client(site: &Site) -> Arc<Client> {
    let identity = Identity::load(site.dir()).unwrap();
    let peers = site.ok(&["peer", "list"]).unwrap();
    let peer = &peers["peers"][0];
    let fingerprint = peer["fingerprint"].as_str().unwrap().parse().unwrap();
    Arc::new(Client::new(&identity, peer["address"].as_str().unwrap(), fingerprint).unwrap())
}

/// An export.
pub struct Shown {
    pub id: String,
    /// Of the disks, in their order.
    pub uris: [String; 2],
}

impl Shown {
    pub fn of(export: &Value) -> Self {
        let disks = export["disks"].as_array().unwrap();
        let uri =
            |name| disks.iter().find(|disk| disk["name"] == name).unwrap()["uri"].as_str().unwrap().into();
        Self { id: export["export"].as_str().unwrap().into(), uris: DISKS.map(|(name, _)| uri(name)) }
    }
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
