//! Boots of real disks in a real QEMU: a boot sector of ours that speaks on the serial console.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use boot::{Accelerator, BootDisk, Evidence, Local, Machine, Order, SignOfLife, boot};
use nbd::{CowDisk, Disk, Server};
use rig::boot_sector;
use serde_json::{Value, json};

const DISK_BYTES: usize = 1 << 20;

fn bootable() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    disk[..512].copy_from_slice(&boot_sector(WORDS));
    disk
}

const WORDS: &str = "afterimage lives";

struct Bytes(Vec<u8>);

impl Disk for Bytes {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let at = offset as usize;
        buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
        Ok(())
    }
}

/// Boots a disk, as a site does: over NBD, with a layer that takes what is written.
async fn boot_disk(bytes: Vec<u8>, definition: &Value, sign: &str, within: Duration, dir: &Path) -> Evidence {
    let socket = dir.join("nbd");
    let server = Server::bind(&socket).unwrap();
    let layer =
        std::fs::File::options().read(true).write(true).create_new(true).open(dir.join("layer")).unwrap();
    server.add("system", Arc::new(CowDisk::new(Arc::new(Bytes(bytes)), layer).unwrap())).unwrap();
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(std::future::pending()).await }
    });
    let order = Order {
        program: "qemu-system-x86_64".into(),
        accelerator: Accelerator::Tcg,
        machine: Machine::of_definition(definition).at_most(64, 1),
        local: Local::default(),
        disks: vec![BootDisk { name: "system".into(), socket, export: "system".into() }],
        sign: sign.parse::<SignOfLife>().unwrap(),
        within,
        dir: dir.join("check"),
        vnc: false,
    };
    let evidence = boot(&order).await.unwrap();
    serving.abort();
    evidence
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_speaks_lives_whatever_its_disk_is_attached_to() {
    for device in ["virtio-blk-device", "ide-hd", "scsi-hd", "nvme"] {
        for machine in ["pc-i440fx-7.2-machine", "pc-q35-7.2-machine"] {
            let dir = tempfile::tempdir().unwrap();
            let definition = json!({"machine-type": machine, "disk-devices": {"system": device}});
            let sign = format!("console:{WORDS}");
            let limit = Duration::from_secs(60);
            let evidence = boot_disk(bootable(), &definition, &sign, limit, dir.path()).await;
            assert!(evidence.alive_after.is_some(), "{machine}, {device}: {evidence:?}");
            assert_eq!(evidence.why_not, None);
            assert!(std::fs::read_to_string(&evidence.console).unwrap().contains(WORDS));
            let screen = std::fs::read(evidence.screenshot.unwrap()).unwrap();
            assert!(screen.starts_with(b"\x89PNG"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_does_not_boot_shows_no_sign_and_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let sign = format!("console:{WORDS}");
    let evidence =
        boot_disk(vec![0; DISK_BYTES], &json!(null), &sign, Duration::from_secs(4), dir.path()).await;
    assert_eq!(evidence.alive_after, None);
    assert!(evidence.why_not.unwrap().contains("console:afterimage lives within 4 s"));
    assert!(evidence.screenshot.is_some(), "what it shows instead is worth seeing");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_there_is_no_sign_and_running_on_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let evidence = boot_disk(bootable(), &json!(null), "agent", Duration::from_secs(3), dir.path()).await;
    assert_eq!(evidence.alive_after, None);
    let dir = tempfile::tempdir().unwrap();
    let evidence = boot_disk(bootable(), &json!(null), "runs:3s", Duration::from_secs(20), dir.path()).await;
    assert!(evidence.alive_after.unwrap() >= Duration::from_secs(3), "{evidence:?}");
}

#[tokio::test]
async fn a_qemu_that_is_not_there_or_does_not_start_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut order = Order {
        program: "qemu-system-of-nobody".into(),
        accelerator: Accelerator::Tcg,
        machine: Machine::of_definition(&json!(null)),
        local: Local::default(),
        disks: Vec::new(),
        sign: SignOfLife::Agent,
        within: Duration::from_secs(5),
        dir: dir.path().into(),
        vnc: false,
    };
    let error = boot(&order).await.unwrap_err().to_string();
    assert!(error.contains("qemu-system-of-nobody") && error.contains("apt-get install"), "{error}");
    order.program = "qemu-system-x86_64".into();
    order.local.args = vec!["-no-such-option".into()];
    let error = boot(&order).await.unwrap_err().to_string();
    assert!(error.contains("QEMU ended at once") && error.contains("no-such-option"), "{error}");
    // The answer depends on the machine; that there is one does not.
    boot::kvm_works("qemu-system-x86_64", dir.path()).await.unwrap();
}
