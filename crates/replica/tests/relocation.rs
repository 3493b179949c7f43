//! A replica on its way to another site: every point is passed on in its order, the seal holds only where nothing is missing, and
//! what takes over at either side is kept apart from what was before.

mod common;

use std::time::Duration;

use common::*;
use model::bitmaps::after_durable;
use model::{Head, LogNumber, Purpose, TravellingPin};
use replica::{InStep, Refused, Store};

const FAR: &str = "far";

/// A replica with an initial point and some more.
fn begun(points: u64) -> (tempfile::TempDir, Site, Primary) {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 64 * 1024)]);
    primary.points = 24;
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.ship(&site, Purpose::Initial, POINT);
    for _ in 1..points {
        cycle(&site, &mut primary);
    }
    (dir, site, primary)
}

fn cycle(site: &Site, primary: &mut Primary) {
    site.clock.pass(Duration::from_secs(30));
    let byte = primary.head.number.0 as u8;
    primary.write("vda", 0..4096, |_| byte | 1);
    primary.ship(site, Purpose::Changes, POINT);
    site.settle(VM);
}

/// Passes a point on as log `next` of the other site's chain, and makes that durable there. Gives the point.
fn pass_on(store: &Store, base: Option<u64>, next: u64, in_pass: bool) -> u64 {
    let (base, next) = (base.map(LogNumber), LogNumber(next));
    let point = store.forward(VM, base, next, in_pass).unwrap().point().number.0;
    store.change_marks(VM, |found| after_durable(found, base, next)).unwrap();
    point
}

fn code<T: std::fmt::Debug>(outcome: replica::Result<T>) -> &'static str {
    let Refused { code, .. } = outcome.unwrap_err().into_refused();
    code
}

#[test]
fn every_point_goes_there_in_its_order_and_then_it_can_be_sealed() {
    let (_dir, site, mut primary) = begun(4);
    let store = &site.store;
    store.begin_relocation(VM, FAR, false).unwrap();
    assert!(store.begin_relocation(VM, "elsewhere", false).is_err(), "it moves to one site");
    store.begin_relocation(VM, FAR, false).unwrap();
    assert!(store.facts(VM).unwrap().migrating_since.is_some(), "the gate refuses");
    let oldest = store.points(VM).unwrap()[0].number.0;
    assert_eq!(pass_on(store, None, 1, true), oldest);
    assert_eq!(pass_on(store, Some(1), 2, true), oldest, "within its pass it stays the same");
    cycle(&site, &mut primary); // logs go on arriving
    let newest = primary.head;
    let mut k = 2;
    for expected in oldest + 1..=newest.number.0 {
        assert!(
            !store.seal_relocation(VM, newest, LogNumber(k)).unwrap(),
            "point {expected} is not there yet"
        );
        assert!(store.has_backlog(VM, LogNumber(k)));
        k += 1;
        assert_eq!(pass_on(store, Some(k - 1), k, false), expected);
    }
    assert!(!store.has_backlog(VM, LogNumber(k)));
    let there = LogNumber(k);
    assert_eq!(store.relocation(VM, there).unwrap().unwrap().in_step, Some(there));
    let older = Head { number: LogNumber(newest.number.0 - 1), ..newest };
    assert!(!store.seal_relocation(VM, older, there).unwrap(), "the primary knows of another log");

    // Sealed: no log is taken, nothing is failed over here; and unsealed again.
    assert!(store.seal_relocation(VM, newest, there).unwrap());
    assert!(store.seal_relocation(VM, newest, there).unwrap(), "asked again");
    let (header, bytes) = primary.make_log(Purpose::Changes, POINT, site.clock.now());
    assert_eq!(code(site.send(&header, &bytes, 1 << 16)), "migration");
    assert!(store.failover_begin(VM, newest.number).is_err());
    store.unseal_relocation(VM).unwrap();
    site.send(&header, &bytes, 1 << 16).unwrap();
    primary.shipped(&header);
    assert_eq!(code(store.relocated(VM)), "not-moving");
    assert!(store.give_up_relocation(VM).unwrap());
    assert!(store.facts(VM).unwrap().migrating_since.is_none());
}

#[test]
fn what_has_moved_leaves_a_fence_against_the_primary_of_before() {
    let (_dir, site, primary) = begun(1);
    let store = &site.store;
    store.begin_relocation(VM, FAR, false).unwrap();
    assert_eq!(pass_on(store, None, 1, true), 1);
    assert!(store.seal_relocation(VM, primary.head, LogNumber(1)).unwrap());
    store.relocated(VM).unwrap();
    store.relocated(VM).unwrap();
    assert!(store.list().is_empty());
    assert_eq!(code(store.offer(PEER, primary.offer())), "moved");
    assert!(store.fence_of_name(&primary.offer().name).unwrap().is_none(), "it was no failover");
    // It can come back: its generation is another one by then.
    store.offer(PEER, replica::Offer { generation: 2, ..primary.offer() }).unwrap();
}

#[test]
fn at_the_new_site_the_chain_goes_on_beyond_both_numbers() {
    let (_dir, site, mut primary) = begun(3);
    let store = &site.store;
    let step = |there, here| Some(InStep { there: LogNumber(there), here: LogNumber(here) });
    assert_eq!(code(store.take_over("branch", VM, step(2, 50))), "wrong-number");
    assert_eq!(code(store.take_over("branch", VM, step(3, u64::MAX))), "wrong-number");
    let (generation, head) = store.take_over("branch", VM, step(3, 50)).unwrap();
    assert_eq!((generation, head), (2, Head { number: LogNumber(50), id: primary.head.id }));
    assert_eq!(store.take_over("branch", VM, step(3, 50)).unwrap(), (generation, head), "asked again");
    let stale = primary.make_log(Purpose::Changes, POINT, site.clock.now());
    assert_eq!(code(site.send(&stale.0, &stale.1, 1 << 16)), "forbidden", "whoever had it sends no more");
    primary.head = head;
    let (header, bytes) = primary.make_log(Purpose::Changes, POINT, site.clock.now());
    let (number, id) = (header.number, header.id);
    assert_eq!(number, LogNumber(51));
    assert!(store.append("branch", VM, number, id, 0, &bytes, true).unwrap().durable);
    site.settle(VM);
    assert_eq!(store.points(VM).unwrap().last().unwrap().number, number);
}

#[test]
fn pins_are_set_when_their_points_arrive() {
    let (_dir, site, mut primary) = begun(2);
    let store = &site.store;
    let moments: Vec<_> = store.points(VM).unwrap().iter().map(|point| point.taken_at).collect();
    let pin = |taken_at, name: &str| TravellingPin {
        taken_at,
        name: Some(name.parse().unwrap()),
        pinned_at: site.clock.now(),
    };
    let next = site.clock.now().plus(Duration::from_secs(30));
    let pins = vec![pin(moments[0], "here"), pin(next, "to-come")];
    store.offer(PEER, replica::Offer { pins, points: 0, ..primary.offer() }).unwrap();
    primary.points = 0;
    for _ in 0..4 {
        cycle(&site, &mut primary);
    }
    let names: Vec<_> = store
        .shown_points(VM)
        .unwrap()
        .into_iter()
        .map(|shown| {
            (shown.point.taken_at, shown.pinned.and_then(|pin| pin.name).map(|name| name.to_string()))
        })
        .collect();
    assert_eq!(names.len(), 3, "{names:?}: the two, and the newest");
    assert_eq!(names[0], (moments[0], Some("here".into())));
    assert_eq!(names[1], (next, Some("to-come".into())));
}
