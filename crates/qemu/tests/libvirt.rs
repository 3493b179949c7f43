//! Domains of a real libvirt, in a session of its own whose QEMU runs as another user (where the tests run as root).

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use model::{LogNumber, Tracking, VmId};
use qemu::libvirt::{self, find};
use qemu::{CaptureRequest, Disk, Error, Monitor, NbdAccess, Vm, VmAddress};
use rig::{Libvirt, tool, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

const ID: VmId = VmId::from_bytes([0xab; 16]);
const DOMAIN: &str = "web";
/// Nothing waits so long when all is well.
const LONG: Duration = Duration::from_secs(30);

/// A daemon with a paused domain that has two disks; both end with it.
struct World {
    libvirt: Libvirt,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        // Not /tmp's usual name: sockets lie deep below it.
        let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
        let libvirt = Libvirt::start(&dir.path().join("l")).unwrap();
        let disks = ["vda", "vdb"].map(|target| {
            let path = dir.path().join(format!("{target}.qcow2"));
            libvirt.make_disk(&path, 8 << 20).unwrap();
            (target, path)
        });
        let disks: Vec<(&str, &Path)> =
            disks.iter().map(|(target, path)| (*target, path.as_path())).collect();
        libvirt.start_domain(DOMAIN, &disks).unwrap();
        Self { libvirt, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        self.libvirt.virsh(arguments).unwrap()
    }

    async fn address(&self) -> VmAddress {
        let found = find(&self.libvirt.uri(), DOMAIN).await.unwrap();
        let monitor = Monitor::Libvirt(found.address);
        VmAddress { id: ID, monitor, nbd: NbdAccess::Own(self.path("meet")) }
    }

    fn request(&self, disks: &[Disk], base: Option<u64>, next: u64) -> CaptureRequest {
        CaptureRequest {
            disks: disks.to_vec(),
            fresh: Vec::new(),
            base: base.map(LogNumber),
            next: LogNumber(next),
            again: false,
            scratch_dir: self.path("meet"),
            scratch_limit_bytes: 64 << 20,
            seat: None,
        }
    }

    /// Fixes a moment and lets it go.
    async fn cycle(&self, vm: &Vm, base: Option<u64>, next: u64) -> Result<(), Error> {
        let disks = vm.disks().await?;
        let capture = vm.begin_capture(self.request(&disks, base, next)).await?;
        vm.end_reading(capture).await?;
        vm.commit(&disks, base.map(LogNumber), LogNumber(next)).await
    }

    fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.libvirt.qmp(DOMAIN, command, &arguments).unwrap()
    }

    fn jobs(&self) -> Vec<String> {
        let jobs = self.qmp("query-jobs", json!({}));
        jobs.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    }

    fn bitmaps(&self) -> Vec<String> {
        let nodes = self.qmp("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap().iter();
        let bitmaps = nodes.flat_map(|node| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default());
        bitmaps.filter_map(|bitmap| Some(bitmap["name"].as_str()?.to_owned())).collect()
    }
}

fn in_the_way(outcome: Result<(), Error>) -> String {
    match outcome {
        Err(Error::InTheWay { what }) => what,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_is_found_followed_through_its_lives_and_missed() {
    let mut world = World::new();
    let address = world.address().await;
    let vm = Vm::connect(address.clone()).await.unwrap();
    let disks = vm.disks().await.unwrap();
    let names: Vec<_> = disks.iter().map(|disk| (disk.node.as_str(), disk.name.as_str())).collect();
    assert_eq!(names, [("vda", "vda"), ("vdb", "vdb")]);
    world.cycle(&vm, None, 1).await.unwrap();
    assert_eq!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), Tracking::Intact);
    world.libvirt.write(DOMAIN, "virtio-disk1", 1 << 20, 8192, 7).unwrap();
    assert_eq!(vm.pending_bytes(&disks, LogNumber(1)).await.unwrap(), 8192);
    let told = vm.definition().await.unwrap();
    assert!(told["libvirt"]["xml"].as_str().unwrap().contains("<target dev='vdb'"), "{told}");

    // The daemon is restarted and QEMU is not: another connection finds everything as it was.
    world.libvirt.restart().unwrap();
    let gone = tokio::time::timeout(LONG, vm.qmp().closed()).await.unwrap();
    assert!(gone.is_gone() && gone.to_string().contains("the connection to libvirt is gone"), "{gone}");
    let vm = Vm::connect(address.clone()).await.unwrap();
    assert_eq!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), Tracking::Intact);

    world.virsh(&["destroy", DOMAIN]);
    let gone = tokio::time::timeout(LONG, vm.qmp().closed()).await.unwrap();
    assert!(gone.is_gone() && gone.to_string().contains("the domain was destroyed"), "{gone}");
    let error = Vm::connect(address.clone()).await.unwrap_err();
    assert!(error.is_gone() && error.to_string().contains("does not run here: it was destroyed"), "{error}");

    // Another name, and with a disk more before the others also other nodes in QEMU.
    world.virsh(&["domrename", DOMAIN, "www"]);
    let more = world.path("more.qcow2");
    world.libvirt.make_disk(&more, 4 << 20).unwrap();
    let attach =
        ["attach-disk", "www", more.to_str().unwrap(), "sda", "--targetbus", "sata", "--subdriver", "qcow2"];
    world.virsh(&[&attach[..], &["--config"]].concat());
    world.virsh(&["start", "www", "--paused"]);
    let vm = Vm::connect(address.clone()).await.unwrap();
    let again = vm.resolve(&["vda".into(), "vdb".into()]).await.unwrap();
    assert_eq!(again.iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [8 << 20; 2]);
    let Tracking::Broken(why) = vm.inspect(&again, LogNumber(1)).await.unwrap() else {
        panic!("the bitmaps are lost with their QEMU")
    };
    println!("{why}");
    let missing = vm.resolve(&["vdc".into()]).await.unwrap_err().to_string();
    assert!(missing.contains("vdc") && missing.contains("vda, vdb"), "{missing}");

    world.virsh(&["destroy", "www"]);
    world.virsh(&["undefine", "www"]);
    let error = Vm::connect(address).await.unwrap_err().to_string();
    assert!(error.contains("has no domain web") && error.contains("migrated"), "{error}");
    assert!(matches!(find(&world.libvirt.uri(), "www").await, Err(libvirt::Error::NoDomain { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_other_programs_do_is_left_alone_and_named() {
    let world = World::new();
    let vm = Vm::connect(world.address().await).await.unwrap();
    world.cycle(&vm, None, 1).await.unwrap();
    assert!(world.jobs().is_empty(), "{:?}", world.jobs());

    // A copy stays until somebody ends it.
    let copy = world.path("l/copy.qcow2");
    world.virsh(&["blockcopy", DOMAIN, "vda", copy.to_str().unwrap(), "--transient-job"]);
    let what = in_the_way(world.cycle(&vm, Some(1), 2).await);
    assert!(what.contains("mirror job") && what.contains("vda"), "{what}");
    assert_eq!(world.jobs().len(), 1, "it goes on");
    world.virsh(&["blockjob", DOMAIN, "vda", "--abort"]);
    world.cycle(&vm, Some(1), 2).await.unwrap();

    // A pull backup needs QEMU's one NBD server, and a checkpoint bitmaps of its own.
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/l/backup.sock'/><disks>\
         <disk name='vda' backup='yes' type='file'><scratch file='{0}/l/scratch.qcow2'/></disk>\
         <disk name='vdb' backup='no'/></disks></domainbackup>",
        world.dir.path().display()
    );
    let checkpoint = "<domaincheckpoint><name>theirs</name><disks><disk name='vda' checkpoint='bitmap'/>\
        <disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
    let backup = world.libvirt.file("backup.xml", &backup).unwrap();
    let checkpoint = world.libvirt.file("checkpoint.xml", checkpoint).unwrap();
    world.virsh(&["backup-begin", DOMAIN, backup.to_str().unwrap(), checkpoint.to_str().unwrap()]);
    let what = in_the_way(world.cycle(&vm, Some(2), 3).await);
    assert!(what.contains("backup job"), "{what}");
    // Also somebody who comes anew finds the VM, and waits for the moment.
    let other = Vm::connect(world.address().await).await.unwrap();
    in_the_way(world.cycle(&other, Some(2), 3).await);
    assert_eq!(world.qmp("query-block-exports", json!({})).as_array().unwrap().len(), 1);
    world.virsh(&["domjobabort", DOMAIN]);
    wait_for("the backup to end", LONG, || Ok(world.jobs().is_empty().then_some(()))).unwrap();
    world.cycle(&vm, Some(2), 3).await.unwrap();
    let disks = vm.disks().await.unwrap();
    assert!(world.bitmaps().contains(&"theirs".to_owned()), "{:?}", world.bitmaps());
    vm.stop_tracking(&disks).await.unwrap();
    assert_eq!(world.bitmaps(), ["theirs"]);
    assert!(!world.path("meet").exists(), "the folder goes with the last bitmap, and comes with the next");
    world.virsh(&["checkpoint-delete", DOMAIN, "theirs"]);

    // An NBD server that somebody started without a job.
    let theirs = world.path("l/theirs.sock");
    world.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": theirs}}}));
    let what = in_the_way(world.cycle(&vm, None, 4).await);
    assert!(what.contains("NBD server"), "{what}");
    world.qmp("nbd-server-stop", json!({}));
    world.cycle(&vm, None, 4).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_and_commits_of_others_lose_no_change_and_are_not_hindered() {
    let world = World::new();
    let vm = Vm::connect(world.address().await).await.unwrap();
    world.cycle(&vm, None, 1).await.unwrap();
    let snapshot = ["snapshot-create-as", DOMAIN, "s1", "--disk-only", "--no-metadata", "--diskspec"];
    let overlay = format!("vda,file={}/l/overlay.qcow2", world.dir.path().display());
    world.virsh(&[&snapshot[..], &[overlay.as_str(), "--diskspec", "vdb,snapshot=no"]].concat());
    // The disk is another node now, on which nothing was tracked.
    let disks = vm.disks().await.unwrap();
    assert!(matches!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), Tracking::Broken(_)));
    world.cycle(&vm, None, 2).await.unwrap();
    world.libvirt.write(DOMAIN, "virtio-disk0", 0, 4096, 1).unwrap();
    world.virsh(&["blockcommit", DOMAIN, "vda", "--active", "--pivot", "--wait"]);
    let disks = vm.disks().await.unwrap();
    assert!(matches!(vm.inspect(&disks, LogNumber(2)).await.unwrap(), Tracking::Broken(_)));
    world.cycle(&vm, None, 3).await.unwrap();
    assert_eq!(vm.inspect(&disks, LogNumber(3)).await.unwrap(), Tracking::Intact);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_migrated_away_says_so_and_is_found_where_it_runs() {
    let world = World::new();
    let address = world.address().await;
    let vm = Vm::connect(address.clone()).await.unwrap();
    world.cycle(&vm, None, 1).await.unwrap();
    let there = Libvirt::start(&world.path("m")).unwrap();
    let state = world.path("m/state.sock");
    let state = format!("unix://{}", state.display());
    let to = there.uri().replace("qemu://", "qemu+unix://");
    let migrate =
        ["migrate", "--live", "--p2p", "--unsafe", DOMAIN, "--desturi", &to, "--migrateuri", &state];
    world.virsh(&migrate);

    let gone = tokio::time::timeout(LONG, vm.qmp().closed()).await.unwrap();
    assert!(gone.is_gone() && gone.to_string().contains("was migrated to another host"), "{gone}");
    let error = Vm::connect(address.clone()).await.unwrap_err();
    assert!(error.to_string().contains("does not run here: it was migrated to another host"), "{error}");

    let found = find(&there.uri(), DOMAIN).await.unwrap();
    let vm = Vm::connect(VmAddress { monitor: Monitor::Libvirt(found.address), ..address }).await.unwrap();
    let disks = vm.disks().await.unwrap();
    assert!(matches!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), Tracking::Broken(_)));
    world.cycle(&vm, None, 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_qemu_cannot_reach_is_told_with_the_way_to_open_it() {
    let world = World::new();
    let own = tool(Command::new("id").arg("-u")).unwrap();
    if own.trim() != "0" {
        return; // QEMU runs as we do, and reaches what we reach
    }
    let closed = world.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    let address = VmAddress { nbd: NbdAccess::Own(closed.join("meet")), ..world.address().await };
    let error = Vm::connect(address.clone()).await.unwrap_err();
    let way = format!("'chmod o+x {}'", closed.display());
    assert!(matches!(error, Error::OutOfReach { .. }) && error.to_string().contains(&way), "{error}");
    std::fs::set_permissions(&closed, Permissions::from_mode(0o711)).unwrap();
    Vm::connect(address).await.unwrap();
}

/// What a command and a cycle cost, for docs/libvirt.md: `cargo test -p afterimage-qemu --release --test libvirt -- --ignored
/// --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn a_command_costs_less_than_a_process() {
    let world = World::new();
    let vm = Vm::connect(world.address().await).await.unwrap();
    let mean = |started: Instant, times: u32| started.elapsed() / times;
    world.cycle(&vm, None, 1).await.unwrap();

    let started = Instant::now();
    for _ in 0..200 {
        vm.qmp().run(qemu::Command::bare("query-status")).await.unwrap();
    }
    let ours = mean(started, 200);
    let started = Instant::now();
    for _ in 0..20 {
        world.qmp("query-status", json!({}));
    }
    let virsh = mean(started, 20);
    println!("query-status: {ours:?} by the daemon's protocol, {virsh:?} by a process of virsh");

    let disks = vm.disks().await.unwrap();
    let started = Instant::now();
    for _ in 0..20 {
        vm.resolve(&["vda".into(), "vdb".into()]).await.unwrap();
    }
    println!("finding two disks by their targets: {:?}", mean(started, 20));
    let (mut whole, mut fixed) = (Duration::ZERO, Duration::ZERO);
    for k in 1..=20 {
        let started = Instant::now();
        let capture = vm.begin_capture(world.request(&disks, Some(k), k + 1)).await.unwrap();
        fixed += capture.timings.transaction;
        vm.end_reading(capture).await.unwrap();
        vm.commit(&disks, Some(LogNumber(k)), LogNumber(k + 1)).await.unwrap();
        whole += started.elapsed();
    }
    println!("fixing a moment and letting it go: {:?}, the guest waits {:?} of it", whole / 20, fixed / 20);
    assert!(ours < virsh);
}
