//! A failover from its beginning to its cancel or its completion, and what keeps the old primary away afterwards.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::bench::{Bench, bench};
use common::{PEER, POINT, VM, disk};
use model::gate::Condition;
use model::{LogNumber, Phase, Purpose};
use replica::{Error, Seed, Step, Store};

/// Every byte that lies below the layers.
fn below(store: &Store) -> Vec<(String, Vec<u8>)> {
    let view = store.failover_view(VM).unwrap();
    let read = |disk: replica::DiskSize| {
        let mut bytes = vec![0; usize::try_from(disk.size_bytes).unwrap()];
        view.read_at(&disk.name, 0, &mut bytes).unwrap();
        (disk.name.to_string(), bytes)
    };
    view.disks().into_iter().map(read).collect()
}

fn info(layer: &Path) -> serde_json::Value {
    let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(layer).output().unwrap();
    serde_json::from_slice(&info.stdout).unwrap()
}

fn is_point(bench: &Bench, number: u64) {
    for (name, bytes) in below(&bench.site.store) {
        assert!(
            bytes == bench.primary.truth[&LogNumber(number)][name.as_str()],
            "disk {name} is not point {number}"
        );
    }
}

#[test]
fn a_failover_refuses_logs_keeps_every_point_and_can_be_cancelled() {
    let mut bench = bench(3);
    for _ in 0..4 {
        bench.cycle();
    }
    let early = bench.site.view(VM, LogNumber(1)).unwrap();
    let before = bench.site.store.points(VM).unwrap();
    let disks = bench.site.store.failover_begin(VM, LogNumber(3)).unwrap();
    for disk in &disks {
        let info = info(&disk.overlay);
        assert_eq!(info["virtual-size"], disk.size_bytes);
        assert_eq!(info["format"], "qcow2");
        let below = info["backing-filename"].as_str().unwrap();
        assert!(below.contains(&replica::failover_export(VM, &disk.name)), "{below}");
    }
    is_point(&bench, 3);
    assert!(early.still_valid().is_ok(), "what was admitted reads on: nothing is folded in");
    drop(early);
    bench.refused(Condition::Failover);
    let (header, bytes) = bench.primary.make_log(Purpose::Changes, POINT, bench.clock.now());
    assert_eq!(bench.site.send(&header, &bytes, 1000).unwrap_err().code(), "failover");
    bench.reopen();
    assert_eq!(bench.site.settle(VM), []);
    bench.refused(Condition::Failover);
    is_point(&bench, 3);
    assert_eq!(bench.site.store.failed_over(), [VM]);
    assert_eq!(bench.site.store.failover_begin(VM, LogNumber(3)).unwrap(), disks, "asked again, the same");
    assert_eq!(bench.site.store.failover_begin(VM, LogNumber(4)).unwrap_err().code(), "busy");
    assert_eq!(bench.site.store.remove(VM).unwrap_err().code(), "busy", "a VM may be running from it");
    let view = bench.site.store.failover_view(VM).unwrap();
    bench.site.store.failover_cancel(VM).unwrap();
    assert!(!disks[0].overlay.exists());
    assert!(view.read_at(&disk("vda"), 0, &mut [0; 10]).is_err(), "the base may move now");
    assert_eq!(bench.site.store.points(VM).unwrap(), before, "nothing is lost by trying");
    bench.site.check_points(&bench.primary);
    bench.cycle();
    bench.site.settle(VM);
    bench.site.check_points(&bench.primary);
}

#[test]
fn a_completed_failover_rests_on_flat_files_and_is_no_replica_any_more() {
    let mut bench = bench(3);
    for _ in 0..4 {
        bench.cycle();
    }
    let disks = bench.site.store.failover_begin(VM, LogNumber(3)).unwrap();
    bench.site.store.failover_complete(VM).unwrap();
    assert_eq!(bench.site.store.failover_cancel(VM).unwrap_err().code(), "busy");
    let status = bench.site.store.status(VM).unwrap().failover.unwrap();
    assert!(status.completing && status.ready);
    bench.reopen();
    let folder = bench.site.store.status(VM).unwrap().folder;
    let steps = bench.site.settle(VM);
    assert_eq!(steps.last(), Some(&Step::Released), "{steps:?}");
    assert!(bench.site.store.list().is_empty());
    for disk in &disks {
        assert_eq!(fs::read(&disk.base).unwrap(), bench.primary.truth[&LogNumber(3)][disk.name.as_str()]);
        let info = info(&disk.overlay);
        assert_eq!(info["backing-filename"], format!("../disks/{}.raw", disk.name));
        assert_eq!(
            fs::canonicalize(info["full-backing-filename"].as_str().unwrap()).unwrap(),
            fs::canonicalize(&disk.base).unwrap()
        );
    }
    assert!(!folder.join("logs").exists() && !folder.join("vm.json").exists());
    bench.reopen();
    assert!(
        bench.site.store.list().is_empty() && disks[0].overlay.exists(),
        "a start leaves a running VM's disks alone"
    );
}

#[test]
fn the_old_primary_is_turned_away_and_a_newer_one_begins_beside_the_disks() {
    let mut bench = bench(0);
    bench.cycle();
    let disks = bench.site.store.failover_begin(VM, bench.primary.head.number).unwrap();
    bench.site.store.failover_complete(VM).unwrap();
    bench.site.settle(VM);
    let offer = bench.primary.offer();
    let Err(Error::Refused(refused)) = bench.site.store.offer(PEER, offer.clone()) else {
        panic!("an old primary was let in");
    };
    assert_eq!((refused.code, refused.transient), ("fenced", false));
    assert!(refused.message.contains("failed over"), "{refused}");
    let fence = bench.site.store.fence(VM).unwrap().unwrap();
    assert_eq!(fence.generation, 2);
    // Even a catalog that was lost knows it.
    bench.lose_catalog();
    assert_eq!(bench.site.store.fence(VM).unwrap().unwrap(), fence);
    bench.site.store.offer(PEER, replica::Offer { generation: 3, ..offer }).unwrap();
    let folder = bench.site.store.status(VM).unwrap().folder;
    assert!(folder != disks[0].base.parent().unwrap().parent().unwrap() && disks[0].base.exists());
}

#[test]
fn a_vm_that_is_off_is_handed_over_with_its_newest_point_alone() {
    let mut bench = bench(2);
    bench.cycle();
    let old = bench.primary.head;
    bench.cycle();
    let store = &bench.site.store;
    let early = store.hand_over(PEER, VM, old, false).unwrap_err();
    assert_eq!(early.code(), "wrong-number", "{early}");
    assert_eq!(store.hand_over("stranger", VM, bench.primary.head, false).unwrap_err().code(), "forbidden");
    let not_yet = store.hand_over(PEER, VM, bench.primary.head, true).unwrap_err();
    assert_eq!(not_yet.code(), "not-handed-over");
    let disks = store.hand_over(PEER, VM, bench.primary.head, false).unwrap();
    assert_eq!(store.hand_over(PEER, VM, bench.primary.head, true).unwrap(), disks, "now it was");
    assert_eq!(store.hand_over(PEER, VM, bench.primary.head, false).unwrap(), disks, "asked again, the same");
    is_point(&bench, bench.primary.head.number.0);
    bench.site.settle(VM);
    assert_eq!(
        bench.site.store.hand_over(PEER, VM, bench.primary.head, false).unwrap(),
        [],
        "and when it is at its end"
    );
}

#[test]
fn a_seed_is_compared_with_and_is_no_point() {
    let mut bench = bench(0);
    bench.cycle();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("old.raw");
    fs::write(&image, &bench.primary.truth[&bench.primary.head.number]["vda"]).unwrap();
    let seed = Seed { disk: disk("vda"), path: image.clone(), format: "raw".into() };
    let vm = model::VmId::from_bytes([9; 16]);
    let offer = replica::Offer { vm, name: "other".parse().unwrap(), ..bench.primary.offer() };
    bench.site.store.create_seeded(PEER, &offer, std::slice::from_ref(&seed)).unwrap();
    bench.site.store.create_seeded(PEER, &offer, &[seed]).unwrap();
    let standing = bench.site.store.offer(PEER, offer.clone()).unwrap();
    assert!(matches!(standing.phase, Phase::ResyncRequired { .. }), "{standing:?}");
    assert!(bench.site.store.points(vm).unwrap().is_empty());
    let digests = bench.site.store.digests(PEER, vm, &disk("vda"), 0, 64 * 1024, 4096).unwrap();
    let bytes = fs::read(&image).unwrap();
    for (digest, block) in digests.iter().zip(bytes.chunks(4096)) {
        assert_eq!(digest, &blake3::hash(block).as_bytes()[..16]);
    }
    assert_eq!(digests.len(), 16);
}
