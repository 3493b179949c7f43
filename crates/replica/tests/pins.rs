//! Points pinned by hand: what lies between them and now is merged away, what they cost is told, and the monitoring
//! window of a replica.

mod common;

use std::time::Duration;

use chain::KeptFor;
use common::*;
use model::{LogNumber, PointName, PointRef, Purpose};
use replica::{Error, Step};

const LOGS: u64 = 120;

/// A replica whose first point is pinned, and `LOGS` cycles after it; `write` is the guest's part of each.
fn with_old_pin(
    points: u8,
    write: impl Fn(&mut Primary, u64),
) -> (tempfile::TempDir, Site, Primary, Vec<Step>) {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let config = replica::Config { plan_extents_max: 1 << 16, ..config(dir.path(), &clock) };
    let site = Site::open_with(config, &clock);
    let mut primary = Primary::new(VM, &[("vda", 2 << 20)]);
    primary.points = points;
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.write("vda", 0..100_000, |at| at as u8 | 1);
    primary.ship(&site, Purpose::Initial, POINT);
    site.store.pin_point(VM, &latest(), Some(PointName::new("old").unwrap())).unwrap();
    let mut steps = Vec::new();
    for number in 2..LOGS + 2 {
        clock.pass(Duration::from_secs(30));
        write(&mut primary, number);
        primary.ship(&site, Purpose::Changes, POINT);
        steps.extend(site.settle(VM));
    }
    site.check_points(&primary);
    (dir, site, primary, steps)
}

fn latest() -> PointRef {
    "latest".parse().unwrap()
}

#[test]
fn what_is_written_again_and_again_since_a_pin_is_kept_once() {
    let (_dir, site, _, steps) = with_old_pin(0, |primary, number| {
        primary.write("vda", 0..65_536, |at| (at ^ number.wrapping_mul(0x9e37)) as u8 | 1);
    });
    let status = site.store.status(VM).unwrap();
    assert_eq!(status.applied, LogNumber(1), "the base stays at the pinned point");
    assert_eq!(status.points.len(), 2);
    assert!(status.logs <= 40, "{} logs", status.logs);
    assert!(steps.iter().any(|step| matches!(step, Step::Compacted { .. })));
    assert!(
        !steps.iter().any(|step| matches!(step, Step::Applied { through, .. } if *through > LogNumber(1)))
    );
    assert_eq!((status.pinned, status.pin_bytes), (1, status.log_bytes), "all logs are there only for it");
    let shown = site.store.shown_points(VM).unwrap();
    assert_eq!((shown[0].pin_bytes, shown[1].pin_bytes), (status.log_bytes, 0));
    assert!(shown[0].pinned.is_some() && shown[1].pinned.is_none());

    // Let go, everything goes where it would have been.
    site.store.unpin_point(VM, &"old".parse().unwrap()).unwrap();
    assert!(site.store.find_point(VM, &"old".parse().unwrap()).is_err());
    site.settle(VM);
    let status = site.store.status(VM).unwrap();
    assert_eq!((status.applied, status.logs, status.pin_bytes), (LogNumber(LOGS + 1), 0, 0));
}

#[test]
fn new_blocks_since_a_pin_do_not_become_a_file_for_each_cycle() {
    let (_dir, site, _, _) = with_old_pin(0, |primary, number| {
        primary.write("vda", number * 8192..number * 8192 + 4096, |at| (at + number) as u8 | 1);
    });
    let status = site.store.status(VM).unwrap();
    assert!(status.logs <= 60, "{} logs", status.logs);
    assert_eq!(status.applied, LogNumber(1));
}

#[test]
fn the_plan_that_is_shown_says_why_each_point_stays_and_changes_nothing() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 400 * 1024)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    for number in 1..=4 {
        primary.write("vda", 0..65_536, |at| (at + number) as u8 | 1);
        let purpose = if number == 1 { Purpose::Initial } else { Purpose::Changes };
        primary.ship(&site, purpose, POINT);
        if number == 2 {
            site.store.pin_point(VM, &latest(), None).unwrap();
        }
    }
    let planned = site.store.retention_plan(VM).unwrap();
    let why: Vec<_> = planned.plan.keep.iter().map(|kept| (kept.number.0, kept.why.clone())).collect();
    assert_eq!(why, [(2, [KeptFor::PinnedByHand].into()), (4, [KeptFor::Latest].into())]);
    assert_eq!(planned.plan.drop, [LogNumber(1), LogNumber(3)]);
    let apply = planned.apply.unwrap();
    assert_eq!((apply.numbers, apply.logs), (LogNumber(1)..=LogNumber(2), 2));
    assert_eq!((planned.merge.len(), planned.merge[0].logs, planned.waits_for), (1, 2, None));
    assert_eq!(site.store.points(VM).unwrap().len(), 4, "it was only shown");
    site.settle(VM);
    let shown: Vec<u64> = site.store.points(VM).unwrap().iter().map(|point| point.number.0).collect();
    assert_eq!(shown, [2, 4], "and this is what was done");
}

#[test]
fn a_failover_that_would_end_a_pinned_point_is_not_completed() {
    let (_dir, site, primary, _) = with_old_pin(0, |primary, number| {
        primary.write("vda", 0..4096, |at| (at + number) as u8 | 1);
    });
    let newest = primary.head.number;
    site.store.failover_begin(VM, newest).unwrap();
    let handed = site.store.failover_complete(VM).unwrap_err();
    assert!(matches!(handed, Error::PinnedByHand { .. }), "{handed}");
    assert!(handed.to_string().contains(&primary.ids[&LogNumber(1)].to_string()), "{handed}");
    site.store.failover_cancel(VM).unwrap();
    let handed = site.store.hand_over(PEER, VM, primary.head, false).unwrap_err();
    assert!(matches!(handed, Error::PinnedByHand { .. }), "{handed}");
    assert!(site.store.failed_over().is_empty(), "nothing was begun");
    site.check_points(&primary);
    assert_eq!(site.store.find_point(VM, &"old".parse().unwrap()).unwrap().number, LogNumber(1));
}

#[test]
fn a_replica_measures_what_it_receives_and_applies_through_a_restart() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 400 * 1024)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    let begun = clock.now();
    let mut bytes = Vec::new();
    for number in 1..=4_u64 {
        clock.pass(Duration::from_secs(30 * number));
        primary.write("vda", 0..4096 * number, |at| (at.wrapping_mul(at) + number) as u8 | 1);
        let purpose = if number == 1 { Purpose::Initial } else { Purpose::Changes };
        primary.ship(&site, purpose, POINT);
        let log = site.store.log_bytes(VM, LogNumber(number)).unwrap();
        bytes.push(log.unwrap());
        site.settle(VM);
    }
    let measured = site.store.status(VM).unwrap().measured;
    assert_eq!(measured.since, begun);
    let sum = measured.sum;
    assert_eq!(
        (sum.logs, sum.log_bytes, sum.log_bytes_max),
        (4, bytes.iter().sum(), *bytes.iter().max().unwrap())
    );
    assert_eq!((sum.gap_ms_max, sum.applies, sum.applies_failed), (120_000, 4, 0));
    drop(site);
    let site = Site::open(dir.path(), &clock);
    assert_eq!(site.store.status(VM).unwrap().measured, measured);
    site.store.reset_measurements(VM).unwrap();
    let fresh = site.store.status(VM).unwrap().measured;
    assert_eq!((fresh.since, fresh.sum.logs), (clock.now(), 0));
}
