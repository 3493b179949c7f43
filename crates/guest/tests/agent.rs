//! A guest by itself: what it acknowledged survives a kill, and its agent brings its file systems to rest.

use std::future::pending;
use std::path::Path;
use std::time::Duration;

use guest::{BOOT, Guest, GuestImage, Mode, check};
use qemu::{AgentAddress, AgentError, FreezeLimits, GuestAgent, libvirt};
use rig::{Libvirt, wait_for};

#[test]
fn what_was_acknowledged_survives_a_kill_and_nothing_is_written_while_frozen() {
    let image = GuestImage::build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disks = image.install(dir.path()).unwrap();
    let mut guest = Guest::start(&image, &disks, Mode::Run, dir.path()).unwrap();
    guest.console().wait_for("ack relay-sqlite 5", BOOT).unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut agent = GuestAgent::connect(&guest.agent()).await.unwrap();
        assert_eq!(agent.freeze(Duration::from_secs(30)).await.unwrap(), 2, "both file systems");
        // What was committed before may still be on its way to the console.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let frozen = guest.acked();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(guest.acked(), frozen, "nothing is committed by a guest at rest");
        assert_eq!(agent.thaw().await.unwrap(), 2);
    });
    let thawed = guest.acked().of_ledger("relay-sqlite");
    guest.console().wait_for(&format!("ack relay-sqlite {}", thawed + 3), BOOT).unwrap();

    guest.kill();
    let acked = guest.acked();
    let checked = check(&image, &disks, &dir.path().join("check")).unwrap();
    checked.judge(&acked, None).unwrap();
    println!("acknowledged {acked}; found {checked}");
}

/// A domain of libvirt's with such a guest; it has begun to commit.
fn domain(image: &GuestImage, libvirt: &Libvirt, dir: &Path) {
    let disks = image.install(dir).unwrap();
    for (from, to) in [(image.kernel(), "kernel"), (image.initramfs(), "initramfs")] {
        std::fs::copy(from, dir.join(to)).unwrap();
    }
    let mut xml = String::new();
    for (disk, target) in disks.iter().zip(["vda", "vdb"]) {
        let path = dir.join(format!("{}.raw", disk.name()));
        libvirt.give(&path).unwrap();
        xml += &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='{target}' bus='virtio'/></disk>",
            path.display()
        );
    }
    for file in ["kernel", "initramfs"] {
        libvirt.give(&dir.join(file)).unwrap();
    }
    let dir = dir.display();
    let xml = format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>448</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{dir}/kernel</kernel><initrd>{dir}/initramfs</initrd>\
         <cmdline>console=ttyS0 loglevel=1 panic=-1 no_timer_check mitigations=off guest.mode=run</cmdline></os>\
         <features><acpi/></features><cpu mode='maximum'/><devices>\
         <emulator>/usr/bin/qemu-system-x86_64</emulator>{xml}\
         <serial type='file'><source path='{dir}/l/console.log'/></serial>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"
    );
    libvirt.define("guest", &xml).unwrap();
    libvirt.virsh(&["start", "guest"]).unwrap();
}

#[test]
fn libvirt_passes_a_freeze_on_and_the_guest_is_thawed_whatever_happens() {
    let image = GuestImage::build().unwrap();
    let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    let libvirt = Libvirt::start(&dir.path().join("l")).unwrap();
    domain(&image, &libvirt, dir.path());
    let console = || std::fs::read_to_string(dir.path().join("l/console.log")).unwrap_or_default();
    let acks = || console().matches("ack ").count();
    wait_for("the guest to commit", BOOT, || Ok(console().contains("ack relay-sqlite 5").then_some(())))
        .unwrap();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let found = libvirt::find(&libvirt.uri(), "guest").await.unwrap();
        assert!(found.description.has_agent);
        let address = AgentAddress::Libvirt(found.address);
        let connect = || GuestAgent::at(&address);
        let limits = FreezeLimits { freeze: Duration::from_secs(60), hold: Duration::from_secs(10) };

        let work = async {
            // What was committed before may still be on its way to the console.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let frozen = acks();
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert_eq!(acks(), frozen, "nothing is committed by a guest at rest");
        };
        let ((), freeze) = connect().await.unwrap().freeze_for(limits, work).await;
        assert!(freeze.unwrap() >= Duration::from_secs(2));

        // The work takes too long: the guest is thawed while it goes on.
        let short = FreezeLimits { hold: Duration::from_millis(500), ..limits };
        let work = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            connect().await.unwrap().is_frozen().await.unwrap()
        };
        let (frozen, freeze) = connect().await.unwrap().freeze_for(short, work).await;
        assert!(!frozen && matches!(freeze, Err(AgentError::HeldTooLong(_))), "{freeze:?}");

        // Whoever froze it is gone: another connection thaws it.
        let agent = connect().await.unwrap();
        let held = tokio::time::timeout(Duration::from_secs(3), agent.freeze_for(limits, pending::<()>()));
        assert!(held.await.is_err());
        let awake = async {
            while connect().await.unwrap().is_frozen().await.unwrap() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let thawed = acks();
            while acks() == thawed {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(BOOT, awake).await.expect("the guest commits again");
    });
}
