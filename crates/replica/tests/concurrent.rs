//! Views are read while logs arrive and are folded into the base under them, on several threads.

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use model::gate::{Access, Condition};
use model::{ApplyState, LogNumber, Purpose};
use replica::{Config, Error};

const DISK_BYTES: u64 = 12 << 20;

#[test]
fn views_are_not_affected_by_a_running_apply_and_holds_are_refused() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let config = Config { workers: 1, tick: Duration::from_millis(20), ..config(dir.path(), &clock) };
    let site = Site::open_with(config, &clock);
    let mut primary = Primary::new(VM, &[("vda", DISK_BYTES)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    let truth: Mutex<BTreeMap<LogNumber, Disks>> = Mutex::default();
    let (done, read, refused, besides) =
        (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (site, truth, done, read) = (&site, &truth, &done, &read);
            scope.spawn(move || {
                let mut chance = Chance(seed);
                while !done.load(Ordering::Relaxed) {
                    if let Some(view) = newest_view(site) {
                        let expected = truth.lock().unwrap().get(&view.point().number).cloned();
                        let Some(expected) = expected else { continue };
                        for _ in 0..4 {
                            let offset = chance.below(DISK_BYTES - (1 << 20));
                            let mut buf = vec![0; 1 << 20];
                            view.read_at(&disk("vda"), offset, &mut buf).unwrap();
                            assert_eq!(buf, expected["vda"][offset as usize..][..1 << 20], "at {offset}");
                        }
                        view.still_valid().unwrap();
                        read.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                watch_gate(&site, &refused, &besides);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let started = Instant::now();
        for round in 0..40_u64 {
            let start = (round * 977 * 4096) % (DISK_BYTES / 2);
            primary.write("vda", start..start + DISK_BYTES / 2, |at| (at.wrapping_mul(round + 3) >> 4) as u8);
            let purpose = if round == 0 { Purpose::Initial } else { Purpose::Changes };
            let (header, bytes) = primary.make_log(purpose, POINT, clock.now());
            primary.shipped(&header);
            truth.lock().unwrap().insert(header.number, primary.disks.clone());
            site.send(&header, &bytes, 1 << 20).unwrap();
            primary.truth.clear();
            let enough = refused.load(Ordering::Relaxed) > 0 && besides.load(Ordering::Relaxed) > 0;
            if round > 12 && enough && read.load(Ordering::Relaxed) > 20
                || started.elapsed() > Duration::from_secs(40)
            {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    println!("{read:?} views read, {refused:?} holds refused, {besides:?} views admitted while an apply ran");
    assert!(read.into_inner() > 0 && refused.into_inner() > 0 && besides.into_inner() > 0);
    site.store.shutdown();
}

fn newest_view(site: &Site) -> Option<replica::ConsistentView> {
    let point = site.store.points(VM).unwrap().last()?.number;
    site.view(VM, point).ok()
}

/// While an apply runs a hold and a strict view are refused, a pinned one is not.
fn watch_gate(site: &Site, refused: &AtomicUsize, besides: &AtomicUsize) {
    let facts = site.store.facts(VM).unwrap();
    let (ApplyState::Running { .. }, Some(point)) =
        (&facts.apply, site.store.points(VM).unwrap().last().copied())
    else {
        return;
    };
    for access in [Access::Hold, Access::Strict] {
        if let Err(Error::Gate(refusal)) = site.store.admit(VM, access, point.number) {
            assert_eq!(refusal.condition, Condition::ApplyInProgress);
            assert!(refusal.transient);
            refused.fetch_add(1, Ordering::Relaxed);
        }
    }
    if site.store.admit(VM, Access::Pinned, point.number).is_ok()
        && matches!(site.store.facts(VM).unwrap().apply, ApplyState::Running { .. })
    {
        besides.fetch_add(1, Ordering::Relaxed);
    }
}
