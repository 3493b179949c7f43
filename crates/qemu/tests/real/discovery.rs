//! Disks are found by asking.

use model::LogNumber;
use qemu::{Disk, Error, NbdAccess, Vm, VmAddress};

use crate::support::{DISK_BYTES, ID, Process, connect, daemon, qcow2_file, raw_file};

fn names(disks: &[Disk]) -> Vec<&str> {
    disks.iter().map(|disk| disk.node.as_str()).collect()
}

pub async fn system(args: &[&str]) -> Process {
    let dir = tempfile::tempdir().unwrap();
    raw_file(&dir.path().join("a.raw"));
    qcow2_file(&dir.path().join("b.qcow2"));
    let mut all =
        vec!["-machine", "pc", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-m", "64"];
    all.extend(["-name", "web", "-qmp", "unix:DIR/qmp,server=on,wait=off"]);
    all.extend(args);
    Process::start_in(dir, "qemu-system-x86_64", "qemu-system-x86", &all).await
}

#[tokio::test]
async fn a_storage_daemon_shows_what_it_exports_writable() {
    let exported = daemon(&[
        "--export",
        "nbd,id=one,node-name=b,name=b,writable=on",
        "--export",
        "nbd,id=two,node-name=a,name=a,writable=off",
    ])
    .await;
    let vm = exported.vm().await;
    let disks = vm.disks().await.unwrap();
    assert_eq!(names(&disks), ["b"]);
    assert_eq!(disks[0].size_bytes, DISK_BYTES);
    // Explicit ones are taken in their order, exported or not.
    let both = vm.resolve(&["a".into(), "b".into()]).await.unwrap();
    assert_eq!(names(&both), ["a", "b"]);
    assert!(matches!(vm.resolve(&["c".into()]).await, Err(Error::NoSuchDisk { .. })));

    // Without exports: what nothing is built on, and not the files below.
    let idle = daemon(&["--object", "throttle-group,id=unused"]).await;
    assert_eq!(names(&idle.vm().await.disks().await.unwrap()), ["a", "b"]);
}

#[tokio::test]
async fn a_vm_shows_its_devices_disks() {
    let process = system(&[
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=root",
        "-device",
        "virtio-blk-pci,drive=root",
        "-object",
        "throttle-group,id=limits,x-iops-total=10000",
        "-blockdev",
        "driver=qcow2,node-name=data,file.driver=file,file.filename=DIR/b.qcow2",
        "-blockdev",
        "driver=throttle,node-name=slow,throttle-group=limits,file=data",
        "-device",
        "virtio-blk-pci,drive=slow,id=second",
        "-drive",
        "if=none,media=cdrom,id=cd0",
        "-device",
        "ide-cd,drive=cd0",
    ])
    .await;
    let vm = connect(own(&process)).await;
    let disks = vm.disks().await.unwrap();
    assert_eq!(names(&disks), ["root", "data"]);
    assert!(disks[0].block_node.starts_with('#'), "{disks:?}");
    assert_eq!(disks[1].qdev.as_deref(), Some("/machine/peripheral/second/virtio-backend"));
    assert_eq!(vm.resolve(&["second".into(), "root".into()]).await.unwrap()[0].block_node, "data");

    let definition = vm.definition().await.unwrap();
    assert_eq!(definition["query-name"]["name"], "web");
    assert_eq!(definition["query-memory-size-summary"]["base-memory"], 64 << 20);
}

pub fn own(process: &Process) -> VmAddress {
    VmAddress { nbd: NbdAccess::Own(process.dir.path().to_owned()), ..process.address() }
}

#[tokio::test]
async fn a_vm_is_captured_through_an_nbd_server_of_our_own() {
    let process = system(&[
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=root",
        "-device",
        "virtio-blk-pci,drive=root",
        "-drive",
        "file=DIR/b.qcow2,format=qcow2,if=virtio",
    ])
    .await;
    let vm = connect(own(&process)).await;
    let disks = vm.disks().await.unwrap();
    assert_eq!(names(&disks), ["root", "virtio0"]);
    let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
    // While the moment is kept, a filter of ours is on the disk, and nothing of ours is a disk.
    assert_eq!(vm.disks().await.unwrap(), disks);
    for disk in &capture.disks {
        assert!(crate::support::image(disk).iter().all(|&byte| byte == 0));
    }
    vm.end_reading(capture).await.unwrap();

    // Another life of ours finds the server that the first one started.
    drop(vm);
    let vm = connect(own(&process)).await;
    assert_eq!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), model::Tracking::Intact);
    vm.stop_tracking(&disks).await.unwrap();
    assert!(crate::support::leftovers(vm.qmp()).await.is_empty());
    assert!(!process.path("afterimage-abababab.nbd").exists(), "the server that was ours is stopped");
}

#[tokio::test]
async fn a_server_of_somebody_else_is_asked_for() {
    let process = daemon(&[]).await;
    let error = loop {
        match Vm::connect(own(&process)).await {
            Err(Error::Connect { .. }) => tokio::task::yield_now().await,
            outcome => break outcome.unwrap_err(),
        }
    };
    assert!(matches!(error, Error::NbdServerRunning) && error.to_string().contains("--nbd"), "{error}");
    let long = VmAddress { id: ID, nbd: NbdAccess::Own("/x".repeat(60).into()), ..process.address() };
    assert!(matches!(Vm::connect(long).await, Err(Error::SocketPath(_))));
}
