//! What a capture shows, what the bitmaps say, and how it ends.

use model::{LogNumber, ResyncReason, Tracking};
use qemu::{Error, Names};

use crate::support::{
    DISK_BYTES, ID, MIB, PREFIX, assert_same, bitmaps, daemon, dirty, image, leftovers, replicate,
};

#[tokio::test]
async fn a_moment_stays_what_it_was_and_bitmaps_say_what_changed() {
    let process = daemon(&[]).await;
    let (mut a, mut b) = (process.guest("a"), process.guest("b"));
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    a.fill(0, 1);
    b.fill(100, 1);

    // Everything, at the moment of log 1.
    let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
    a.fill(0, 2);
    b.fill(7, 2);
    let mut replica = vec![vec![]; 2];
    replicate(&mut replica, &capture);
    assert_eq!((replica[0][0], replica[1][7 * 4096], replica[1][100 * 4096]), (1, 0, 1));
    assert!(capture.moment <= capture.moment_end && capture.disks[0].bitmap_context.is_none());
    assert!(capture.scratch_bytes().unwrap() > 0);
    vm.end_reading(capture).await.unwrap();
    vm.commit(&disks, None, LogNumber(1)).await.unwrap();
    assert_eq!(vm.pending_bytes(&disks, LogNumber(1)).await.unwrap(), 2 * 4096);

    // Changes, of a cycle that is given up...
    let capture = vm.begin_capture(process.request(&disks, Some(1), 2)).await.unwrap();
    assert_eq!(dirty(&capture.disks[0]), [0..4096]);
    assert_eq!(dirty(&capture.disks[1]), [7 * 4096..8 * 4096]);
    a.fill(1, 3);
    assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-1"), format!("{PREFIX}-2")]);
    vm.end_reading(capture).await.unwrap();
    vm.give_back(&disks, Some(LogNumber(1))).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-1")]);
    assert_eq!(vm.inspect(&disks, LogNumber(1)).await.unwrap(), Tracking::Intact);

    // ... are those of the next one, which uses the same number.
    a.fill(2, 4);
    let capture = vm.begin_capture(process.request(&disks, Some(1), 2)).await.unwrap();
    assert_eq!(dirty(&capture.disks[0]), [0..3 * 4096]);
    replicate(&mut replica, &capture);
    assert_same(&replica, &capture);
    vm.end_reading(capture).await.unwrap();
    vm.commit(&disks, Some(LogNumber(1)), LogNumber(2)).await.unwrap();
    vm.commit(&disks, Some(LogNumber(1)), LogNumber(2)).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "b").await, [format!("{PREFIX}-2")]);

    // A log that was given up and arrived after all: what there is since log 2 serves for log 3.
    let capture = vm.begin_capture(process.request(&disks, Some(2), 3)).await.unwrap();
    b.fill(9, 5);
    drop(capture);
    vm.give_back(&disks, Some(LogNumber(2))).await.unwrap();
    vm.cleanup(&disks, Some(LogNumber(3))).await.unwrap();
    assert_eq!(vm.inspect(&disks, LogNumber(3)).await.unwrap(), Tracking::Intact);
    let capture = vm.begin_capture(process.request(&disks, Some(3), 4)).await.unwrap();
    assert_eq!(dirty(&capture.disks[1]), [9 * 4096..10 * 4096]);
    drop(capture);

    vm.stop_tracking(&disks).await.unwrap();
    assert!(bitmaps(vm.qmp(), "a").await.is_empty() && leftovers(vm.qmp()).await.is_empty());
    assert_eq!(process.scratch_files(), 0);
}

#[tokio::test]
async fn bitmaps_of_others_are_left_alone_and_lost_ones_are_never_made_up() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    let add = |name: &str| {
        qemu::Command::new("block-dirty-bitmap-add", serde_json::json!({"node": "a", "name": name}))
    };
    let other = Names::new(model::VmId::from_bytes([1; 16])).bitmap(LogNumber(1));
    vm.qmp().run_all(vec![add("libvirt-1"), add(&other)]).await.unwrap();

    let lost = vm.inspect(&disks, LogNumber(1)).await.unwrap();
    assert!(matches!(lost, Tracking::Broken(ResyncReason::BitmapLost(_))), "{lost:?}");
    let error = vm.begin_capture(process.request(&disks, Some(1), 2)).await.unwrap_err();
    assert!(matches!(error.resync_reason(), Some(ResyncReason::BitmapLost(_))), "{error}");

    drop(vm.begin_capture(process.request(&disks, None, 1)).await.unwrap());
    let disable = serde_json::json!({"node": "b", "name": vm.names().bitmap(LogNumber(1))});
    vm.cleanup(&disks, Some(LogNumber(1))).await.unwrap();
    vm.qmp().run(qemu::Command::new("block-dirty-bitmap-disable", disable)).await.unwrap();
    let stopped = vm.begin_capture(process.request(&disks, Some(1), 2)).await.unwrap_err();
    assert!(stopped.to_string().contains("disk b"), "{stopped}");
    vm.stop_tracking(&disks).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "a").await, [other, "libvirt-1".to_owned()]);
}

#[tokio::test]
async fn a_scratch_past_its_bound_is_told_before_a_write_of_the_guest_fails() {
    let process = daemon(&[]).await;
    let mut a = process.guest("a");
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    a.write(0, &vec![1; DISK_BYTES as usize]);
    let mut request = process.request(&disks, None, 1);
    request.scratch_limit_bytes = MIB;
    let capture = vm.begin_capture(request).await.unwrap();
    tokio::select! {
        error = capture.watch() => panic!("{error}"),
        () = tokio::time::sleep(std::time::Duration::from_millis(120)) => {}
    }
    a.write(0, &vec![2; 2 * MIB as usize]);
    let error = capture.watch().await;
    assert!(matches!(error, Error::ScratchFull { used_bytes, .. } if used_bytes > MIB), "{error}");
    vm.end_reading(capture).await.unwrap();
    assert_eq!(process.scratch_files(), 0);
    assert!(leftovers(vm.qmp()).await.is_empty());
}

#[tokio::test]
async fn a_capture_that_somebody_else_ends_is_noticed() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
    let cancel = qemu::Command::new("job-cancel", serde_json::json!({"id": format!("{PREFIX}-j1")}));
    let (error, cancelled) = tokio::join!(capture.watch(), vm.qmp().run(cancel));
    cancelled.unwrap();
    assert!(matches!(error, Error::CaptureBroken(_)), "{error}");
    vm.end_reading(capture).await.unwrap();
    assert!(leftovers(vm.qmp()).await.is_empty());
}

#[tokio::test]
async fn a_qemu_that_is_killed_in_the_middle_is_a_clear_error() {
    let mut process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
    process.kill();
    let error = capture.watch().await;
    assert!(error.is_gone() && error.to_string().contains("gone"), "{error}");
    assert!(vm.end_reading(capture).await.unwrap_err().is_gone());
    assert!(vm.disks().await.unwrap_err().is_gone() && !vm.is_alive());
    assert_eq!(process.scratch_files(), 0, "a dead QEMU's scratch is nobody's");
}

#[tokio::test]
async fn what_cannot_be_begun_leaves_nothing() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    let mut wrong = process.request(&disks, None, 1);
    wrong.disks[1].size_bytes += MIB; // it was resized since it was looked at
    assert!(matches!(vm.begin_capture(wrong).await, Err(Error::Refused { .. })));
    let mut nowhere = process.request(&disks, None, 1);
    nowhere.scratch_dir = process.path("none");
    assert!(matches!(vm.begin_capture(nowhere).await, Err(Error::Scratch { .. })));
    assert!(leftovers(vm.qmp()).await.is_empty() && bitmaps(vm.qmp(), "a").await.is_empty());
    assert_eq!(process.scratch_files(), 0);

    // A file that a run left behind when QEMU died.
    std::fs::write(process.path("scratch").join(format!("{PREFIX}-9-0.qcow2")), "x").unwrap();
    std::fs::write(process.path("scratch").join("others"), "x").unwrap();
    let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
    assert_eq!(process.scratch_files(), 3);
    drop(capture);
    vm.cleanup(&disks, None).await.unwrap();
    assert_eq!(qemu::remove_scratch(&process.path("scratch"), ID).unwrap(), 0);
    assert_eq!(process.scratch_files(), 1);
}

#[tokio::test]
async fn a_hot_cycle_is_short() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    drop(vm.begin_capture(process.request(&disks, None, 1)).await.unwrap());
    for k in 1..=5 {
        let started = std::time::Instant::now();
        let capture = vm.begin_capture(process.request(&disks, Some(k), k + 1)).await.unwrap();
        let (begun, timings) = (started.elapsed(), capture.timings);
        let ending = std::time::Instant::now();
        vm.end_reading(capture).await.unwrap();
        let ended = ending.elapsed();
        vm.commit(&disks, Some(LogNumber(k)), LogNumber(k + 1)).await.unwrap();
        eprintln!("begin {begun:?} ({timings:?}), end {ended:?}, in all {:?}", started.elapsed());
    }
    assert_eq!(
        image(&vm.begin_capture(process.request(&disks, Some(6), 7)).await.unwrap().disks[0]).len(),
        8 << 20
    );
}

#[tokio::test]
async fn what_was_read_ahead_holds_where_nothing_has_changed_since() {
    const BLOCK: usize = 4096;
    let block = |n: usize| n * BLOCK..(n + 1) * BLOCK;
    let process = daemon(&[]).await;
    let mut a = process.guest("a");
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    vm.end_reading(vm.begin_capture(process.request(&disks, None, 1)).await.unwrap()).await.unwrap();
    vm.commit(&disks, None, LogNumber(1)).await.unwrap();
    a.fill(3, 1);
    a.fill(5, 1);

    let ahead = vm.begin_ahead(&disks, LogNumber(1)).await.unwrap();
    assert_eq!(dirty(&ahead.disks[0]), [block(3), block(5)]);
    let read = image(&ahead.disks[0]);
    a.fill(5, 2);
    a.fill(9, 2);
    assert_eq!(dirty(&ahead.disks[0]), [block(3), block(5)]);
    vm.end_ahead(ahead).await.unwrap();

    let mut request = process.request(&disks, Some(1), 2);
    request.again = true;
    let capture = vm.begin_capture(request.clone()).await.unwrap();
    a.fill(3, 7);
    let disk = &capture.disks[0];
    assert_eq!(dirty(disk), [block(3), block(5), block(9)]);
    let again = qemu::CapturedDisk { bitmap_context: disk.again_context.clone(), ..disk.clone() };
    assert_eq!(dirty(&again), [block(5), block(9)]);
    let now = image(disk);
    assert_eq!((&read[block(3)], read[5 * BLOCK]), (&now[block(3)], 1));
    assert_eq!((now[3 * BLOCK], now[5 * BLOCK], now[9 * BLOCK]), (1, 2, 2));
    vm.end_reading(capture).await.unwrap();
    vm.commit(&disks, Some(LogNumber(1)), LogNumber(2)).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-2")]);

    // Given up after it: the cycle's own bitmaps are as if nothing had been read ahead.
    let ahead = vm.begin_ahead(&disks, LogNumber(2)).await.unwrap();
    vm.end_ahead(ahead).await.unwrap();
    vm.give_back(&disks, Some(LogNumber(2))).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-2")]);
    // Nobody notes any more what changes: QEMU refuses the moment, and nothing of it stays.
    (request.base, request.next) = (Some(LogNumber(2)), LogNumber(3));
    assert!(matches!(vm.begin_capture(request).await, Err(Error::Refused { .. })));
    // Dropped: the moment comes without it.
    drop(vm.begin_ahead(&disks, LogNumber(2)).await.unwrap());
    let capture = vm.begin_capture(process.request(&disks, Some(2), 3)).await.unwrap();
    assert_eq!(dirty(&capture.disks[0]), [block(3)]);
    vm.end_reading(capture).await.unwrap();
    vm.give_back(&disks, Some(LogNumber(2))).await.unwrap();
    assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-2")]);
    assert!(leftovers(vm.qmp()).await.is_empty() && process.scratch_files() == 0);
}
