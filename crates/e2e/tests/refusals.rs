//! Logs that do not belong: whatever a peer with a valid certificate sends, the chain stays whole, the peer
//! is told why, and the refusal is among the events.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{LONG, Paused, VM, World, client};
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::{Consistency, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId};
use serde_json::Value;
use wire::{Client, Uploader};

/// A log of one block.
fn log(vm: VmId, number: u64, id: LogId, predecessor: LogId) -> Vec<u8> {
    let disks = vec![DiskInfo { name: "system".parse().unwrap(), size_bytes: common::DISKS[0].1 }];
    let header = Header {
        vm,
        id,
        number: LogNumber(number),
        predecessor,
        moment: Timestamp(1),
        purpose: Purpose::Changes,
        disks,
    };
    let mut encoder = Encoder::new(Vec::new(), &header).unwrap();
    let mut batcher = Batcher::new(0);
    let mut records = batcher.data(0, &[7; 4096]);
    records.extend(batcher.finish());
    for record in records {
        encoder.record(record.encode(1)).unwrap();
    }
    let class = LogClass::Point(Consistency::Crash);
    encoder.finish(Footer { class, progress: Progress::default() }).unwrap().1
}

/// Sends bytes as a log; the refusal's code.
fn send(client: &Arc<Client>, vm: VmId, number: u64, id: LogId, bytes: Vec<u8>) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sent = runtime.block_on(async {
        let patience = Duration::from_secs(2);
        let mut upload = Uploader::new(client.clone(), vm, LogNumber(number), id, patience, None);
        upload.write(bytes.into()).await?;
        upload.finish().await
    });
    let error = sent.expect_err("the log must be refused");
    error.refused().unwrap_or_else(|| panic!("no refusal: {error}")).code.clone()
}

#[test]
fn a_log_that_does_not_belong_is_refused_noted_and_changes_nothing() {
    let mut world = World::new(61);
    world.write(1, Duration::from_millis(2));
    let Paused { vm, newest, last, before } = world.paused();

    let client = client(&world.branch);
    let id = LogId::from_bytes([9; 16]);
    let good = log(vm, newest + 1, id, last);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let other = VmId::from_bytes([3; 16]);
    let cases = [
        ("wrong-number", send(&client, vm, newest + 7, id, log(vm, newest + 7, id, last))),
        (
            "wrong-predecessor",
            send(&client, vm, newest + 1, id, log(vm, newest + 1, id, LogId::from_bytes([1; 16]))),
        ),
        ("wrong-vm", send(&client, vm, newest + 1, id, log(other, newest + 1, id, last))),
        ("log-truncated", send(&client, vm, newest + 1, id, good[..good.len() - 10].to_vec())),
        ("no-such-vm", send(&client, other, 1, id, log(other, 1, id, LogId::NONE))),
    ];
    for (expected, found) in cases {
        assert_eq!(found, expected);
    }
    let damaged = send(&client, vm, newest + 1, id, flipped);
    assert!(damaged.starts_with("log-"), "{damaged}");

    let after = world.head.vm(VM).unwrap();
    assert_eq!(after["received"], before["received"], "none of them became a part of the chain");
    let events = world.head.ok(&["events", "--count", "100"]).unwrap();
    let noted =
        |kind: &str| events["events"].as_array().unwrap().iter().any(|event: &Value| event["kind"] == kind);
    for kind in ["wrong-number", "wrong-predecessor", "wrong-vm", "log-truncated", "no-such-vm", &damaged] {
        assert!(noted(kind), "no event {kind}: {events}");
    }
    // The true primary goes on as if nothing had happened.
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    let vm = world.branch.wait_vm(VM, "to be well", LONG, |vm| vm["error"].is_null()).unwrap();
    assert_eq!(vm["state"], "replicating");
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()));
}
