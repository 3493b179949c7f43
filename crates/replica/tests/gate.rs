//! The conditions of the gate, each brought about for real; holds, barriers, failover and moved storage.

mod common;

use std::fs;
use std::time::Duration;

use common::bench::{Bench, bench};
use common::*;
use model::gate::{Access, Condition};
use model::{LogClass, LogNumber, Phase, Purpose, ResyncReason};
use replica::Error;

/// A hold of the flat files.
trait Gate {
    fn hold(&self, point: LogNumber, lease_s: u64) -> replica::Result<replica::Hold>;
}

impl Gate for Bench {
    fn hold(&self, point: LogNumber, lease_s: u64) -> replica::Result<replica::Hold> {
        let admitted = self.site.store.admit(VM, Access::Hold, point)?;
        Ok(self.site.store.open_hold(admitted, Duration::from_secs(lease_s))?.0)
    }
}

#[test]
fn initial_replication_and_resynchronization_are_not_read() {
    let mut bench = bench(0);
    bench.refused(Condition::InitialReplication);
    bench.primary.ship(&bench.site, Purpose::Initial, LogClass::Partial);
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), LogNumber(1), "parts are folded in early");
    bench.refused(Condition::InitialReplication);
    bench.primary.ship(&bench.site, Purpose::Initial, LogClass::Partial);
    bench.primary.ship(&bench.site, Purpose::Initial, POINT);
    bench.site.check_points(&bench.primary);
    let view = bench.site.view(VM, LogNumber(3)).unwrap();
    let phase = Phase::ResyncRequired { why: ResyncReason::Requested };
    bench.site.store.report(PEER, VM, phase, None, false).unwrap();
    bench.refused(Condition::Resync);
    bench.primary.write_some(&mut bench.chance, 50);
    bench.primary.ship(&bench.site, Purpose::Resync, LogClass::Partial);
    bench.refused(Condition::Resync);
    bench.site.settle(VM);
    // A view from before reads on: nothing but logs was added.
    check_view(&view, &bench.primary.truth[&LogNumber(3)]);
    view.still_valid().unwrap();
    bench.primary.ship(&bench.site, Purpose::Resync, POINT);
    bench.site.check_points(&bench.primary);
}

#[test]
fn silence_and_a_lasting_error_are_critical_and_a_pause_is_not() {
    let mut bench = bench(0);
    bench.cycle();
    bench.site.settle(VM);
    bench.clock.pass(Duration::from_secs(3601));
    bench.refused(Condition::HealthCritical);
    bench.site.store.report(PEER, VM, Phase::Replicating, None, true).unwrap();
    bench.site.check_points(&bench.primary);
    bench.site.store.report(PEER, VM, Phase::Replicating, Some("certificate refused".into()), false).unwrap();
    bench.refused(Condition::HealthCritical);
    bench.cycle();
    bench.site.check_points(&bench.primary);
}

#[test]
fn a_hold_keeps_the_flat_files_quiet_and_ends_by_itself() {
    let mut bench = bench(0);
    let one = bench.cycle();
    assert!(matches!(bench.hold(one, 60), Err(Error::NotTheBase { base: None, .. })));
    assert_eq!(bench.site.store.prepare_hold(VM).unwrap().unwrap().number, one);
    let hold = bench.hold(one, 600).unwrap();
    let two = bench.cycle();
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), one);
    bench.reopen();
    bench.site.settle(VM);
    assert_eq!(bench.site.store.holds(VM).unwrap(), std::slice::from_ref(&hold));
    for disk in &hold.disks {
        assert_eq!(fs::read(&disk.path).unwrap(), bench.primary.truth[&one][disk.name.as_str()]);
    }
    assert!(matches!(bench.hold(two, 60), Err(Error::NotTheBase { base: Some(base), .. }) if base == one));
    assert!(bench.site.store.release(&hold.id).unwrap(), "it lasted");
    assert!(!bench.site.store.release(&hold.id).unwrap(), "it is gone");
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), two);

    let admitted = bench.site.store.admit(VM, Access::Hold, two).unwrap();
    let (hold, admission) = bench.site.store.open_hold(admitted, Duration::from_secs(60)).unwrap();
    let view = hold.view(&bench.site.store, admission).unwrap();
    check_view(&view, &bench.primary.truth[&two]);
    view.still_valid().unwrap();
    bench.clock.pass(Duration::from_secs(61));
    assert_eq!(view.still_valid().unwrap_err().code(), "view-revoked");
    drop(view);
    let three = bench.cycle();
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), three, "the hold had run out");
    assert!(!bench.site.store.release(&hold.id).unwrap(), "what was read must be thrown away");
}

#[test]
fn a_barrier_stops_the_next_apply_until_it_is_given_back_or_runs_out() {
    let mut bench = bench(0);
    let one = bench.cycle();
    bench.site.settle(VM);
    let barrier = bench.site.store.barrier(VM, Duration::from_secs(5)).unwrap();
    let two = bench.cycle();
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), one);
    let hold = bench.hold(one, 60).unwrap();
    assert!(bench.site.store.release(&hold.id).unwrap());
    assert_eq!(bench.site.store.prepare_hold(VM).unwrap().unwrap().number, two, "asked for, it is applied");
    bench.cycle();
    drop(barrier);
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), LogNumber(3));
    let forgotten = bench.site.store.barrier(VM, Duration::ZERO).unwrap();
    bench.cycle();
    bench.clock.pass(Duration::from_secs(16 * 60));
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), LogNumber(4));
    drop(forgotten);
}

#[test]
fn a_point_is_pinned_from_the_gates_answer_on() {
    let mut bench = bench(0);
    let one = bench.cycle();
    bench.site.settle(VM);
    let admitted = bench.site.store.admit(VM, Access::Pinned, one).unwrap();
    bench.cycle();
    bench.cycle();
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), one, "the base itself is what is pinned");
    let view = bench.site.store.open_view(admitted).unwrap();
    bench.site.settle(VM);
    check_view(&view, &bench.primary.truth[&one]);
    drop(view);
    bench.site.settle(VM);
    assert_eq!(bench.site.store.applied(VM).unwrap(), LogNumber(3));
    assert!(matches!(bench.site.view(VM, one), Err(Error::NoSuchPoint { .. })));
}

#[test]
fn storage_that_moves_is_not_admitted_and_open_views_read_on() {
    let mut bench = bench(2);
    for _ in 0..3 {
        bench.cycle();
    }
    let view = bench.site.view(VM, LogNumber(2)).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let folder = bench.site.store.status(VM).unwrap().folder;
    assert!(bench.site.store.migrate(VM, &elsewhere.path().join("nowhere")).is_err());
    let moved = bench.site.store.migrate(VM, elsewhere.path()).unwrap();
    assert!(!folder.exists() && moved.starts_with(elsewhere.path()));
    check_view(&view, &bench.primary.truth[&LogNumber(2)]);
    bench.cycle();
    bench.site.settle(VM);
    check_view(&view, &bench.primary.truth[&LogNumber(2)]);
    assert!(check_changes(&view, &bench.primary, LogNumber(2)));
    view.still_valid().unwrap();
    drop(view);
    bench.reopen();
    assert_eq!(bench.site.store.status(VM).unwrap().folder, moved);
    bench.cycle();
    bench.site.settle(VM);
    bench.site.check_points(&bench.primary);
}

#[test]
fn what_was_never_read_or_is_of_another_chain_is_no_parent() {
    let mut bench = bench(3);
    for _ in 0..3 {
        bench.cycle();
    }
    let older = bench.site.view(VM, LogNumber(2)).unwrap();
    let newer = bench.site.view(VM, LogNumber(3)).unwrap();
    let changed = |view: &replica::ConsistentView, number: u64| {
        view.changed_since(&disk("vda"), bench.primary.ids[&LogNumber(number)]).unwrap()
    };
    assert!(changed(&newer, 2).is_some());
    assert_eq!(changed(&newer, 1), None, "nobody has read it");
    assert_eq!(changed(&older, 3), None, "it is newer");
    assert_eq!(changed(&newer, 3), Some(vec![]));
}
