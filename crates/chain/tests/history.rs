//! A replica's whole life in miniature: logs arrive, points go, logs are merged and applied, pins come and
//! go. After every step each point that is shown reads as the VM was, and the replica has written at most
//! twice the bytes that arrived.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use chain::{
    ApplyPlan, CompactPlan, CompactRule, FEW_LOGS, Layer, Overlay, RetentionInput, RetentionPlan,
    changed_since, plan_retention, union,
};
use log::Extent;
use model::{Consistency, LogClass, LogId, LogNumber, PointInfo, Timestamp};
use proptest::prelude::*;

use common::*;

#[derive(Debug, Clone)]
enum Event {
    Log { draft: Draft, class: LogClass, minutes: u64 },
    Pin(prop::sample::Index),
    Unpin,
    PinByHand(prop::sample::Index),
    UnpinByHand(prop::sample::Index),
    Hold(bool),
}

fn event() -> impl Strategy<Value = Event> {
    let class = prop_oneof![
        8 => Just(LogClass::Point(Consistency::Crash)),
        1 => Just(LogClass::Partial),
    ];
    prop_oneof![
        12 => (draft(), class, 0_u64..40).prop_map(|(draft, class, minutes)| {
            // Bytes of another disk would be taken away by merges and hide a write too many.
            Event::Log { draft: Draft { foreign: false, ..draft }, class, minutes }
        }),
        1 => any::<prop::sample::Index>().prop_map(Event::Pin),
        1 => Just(Event::Unpin),
        1 => any::<prop::sample::Index>().prop_map(Event::PinByHand),
        1 => any::<prop::sample::Index>().prop_map(Event::UnpinByHand),
        1 => any::<bool>().prop_map(Event::Hold),
    ]
}

/// What a replica has, and beside it the truth.
struct Replica {
    base: Disks,
    applied: LogNumber,
    logs: Vec<MemLog>,
    points: Vec<PointInfo>,
    pins: Vec<LogNumber>,
    pinned: Vec<LogNumber>,
    held: bool,
    now: Timestamp,
    logged_bytes: u64,
    written_bytes: u64,
    /// Of these, what was written only to have fewer logs above a point pinned by hand.
    few_bytes: u64,
    /// The change map: disks here are smaller than a chunk, so one entry each.
    changed_by: [u64; DISKS],
    /// The VM's disks after each log.
    truth: BTreeMap<LogNumber, Disks>,
}

impl Replica {
    fn new() -> Self {
        let empty: Disks = vec![Vec::new(); DISKS];
        Self {
            base: empty.clone(),
            applied: LogNumber::ZERO,
            logs: Vec::new(),
            points: Vec::new(),
            pins: Vec::new(),
            pinned: Vec::new(),
            held: false,
            now: Timestamp::default(),
            logged_bytes: 0,
            written_bytes: 0,
            few_bytes: 0,
            changed_by: [0; DISKS],
            truth: [(LogNumber::ZERO, empty)].into(),
        }
    }

    fn take(&mut self, event: &Event) {
        match event {
            Event::Log { draft, class, minutes } => self.receive(draft, *class, *minutes),
            Event::Pin(which) if !self.points.is_empty() => self.pins.push(which.get(&self.points).number),
            Event::PinByHand(which) if !self.points.is_empty() => {
                self.pinned.push(which.get(&self.points).number);
            }
            Event::Pin(_) | Event::PinByHand(_) => {}
            Event::UnpinByHand(which) if !self.pinned.is_empty() => {
                self.pinned.swap_remove(which.index(self.pinned.len()));
            }
            Event::UnpinByHand(_) => {}
            Event::Unpin => drop(self.pins.pop()),
            // The gate gives a hold only where the base equals a point.
            Event::Hold(on) => {
                self.held = *on && self.points.iter().any(|point| point.number == self.applied)
            }
        }
    }

    fn receive(&mut self, draft: &Draft, class: LogClass, minutes: u64) {
        self.now = self.now.plus(Duration::from_secs(minutes * 60));
        let (&newest, disks) = self.truth.last_key_value().unwrap();
        let mut disks = disks.clone();
        let log = MemLog::new(newest.next().0, draft);
        log.apply_naively(&mut disks);
        self.truth.insert(log.number, disks);
        self.logged_bytes += log.raw_bytes();
        self.written_bytes += log.raw_bytes();
        if let Some(consistency) = class.point() {
            let id = LogId::from_bytes([1; 16]);
            self.points.push(PointInfo { id, number: log.number, taken_at: self.now, consistency });
        }
        self.logs.push(log);
    }

    fn tend(&mut self, extra_hourly: u8, recent: usize) {
        let numbers: Vec<_> = self.logs.iter().map(|log| log.number).collect();
        let plan = plan_retention(&RetentionInput {
            points: &self.points,
            logs: &numbers,
            resync: false,
            applied: self.applied,
            pins: &self.pins,
            pinned: &self.pinned,
            forwarded: &[],
            shared: &[],
            held: self.held,
            extra_hourly,
            recent,
            now: self.now,
        });
        self.points.retain(|point| plan.kept().any(|kept| kept == point.number));
        self.compact(&plan);
        self.apply(&plan);
    }

    fn compact(&mut self, plan: &RetentionPlan) {
        for group in &plan.compact {
            let layers: Vec<Layer<'_>> =
                self.logs.iter().filter(|log| group.contains(&log.number)).map(MemLog::layer).collect();
            let above_a_pin = self.pinned.iter().any(|pin| pin < group.start());
            let rule = if above_a_pin { CompactRule::Few } else { CompactRule::Halve };
            for plan in CompactPlan::choose(DISKS, &layers, rule).unwrap() {
                assert!(group.contains(plan.logs.start()) && group.contains(plan.logs.end()));
                if !plan.worthwhile() {
                    assert!(above_a_pin && plan.log_count >= FEW_LOGS);
                    assert!(plan.largest_bytes * 2 <= plan.live_bytes);
                    self.few_bytes += plan.live_bytes;
                }
                let merged = self.merged(&plan);
                assert_eq!(merged.raw_bytes(), plan.live_bytes);
                self.written_bytes += plan.live_bytes;
                self.logs.retain(|log| !plan.logs.contains(&log.number));
                self.logs.push(merged);
                self.logs.sort_by_key(|log| log.number);
            }
        }
    }

    /// The merged log that a plan describes, as a shell would write it.
    fn merged(&self, plan: &CompactPlan) -> MemLog {
        let newest = find(&self.logs, *plan.logs.end());
        let mut merged = MemLog { index: log::Index::default(), payloads: Vec::new(), ..newest.clone() };
        let place = |disk| newest.disks.iter().position(|named| named.disk == Some(disk)).unwrap();
        for &(disk, extent) in &plan.survivors.zeros {
            merged.add_record(place(disk), &[(extent, None)]);
        }
        for work in plan.survivors.records() {
            let payload = &find(&self.logs, work.log).payloads[work.record as usize];
            let extents: Vec<_> = work
                .pieces
                .iter()
                .map(|piece| {
                    let data = payload[piece.skip as usize..(piece.skip + piece.len) as usize].to_vec();
                    (Extent { offset: piece.disk_offset, len: u64::from(piece.len) }, Some(data))
                })
                .collect();
            merged.add_record(place(work.disk), &extents);
        }
        merged
    }

    fn apply(&mut self, plan: &RetentionPlan) {
        let Some(through) = plan.apply_through.or(plan.apply_initial_through) else { return };
        let held_on_to = self.pins.iter().chain(&self.pinned).copied();
        let oldest = self.points.iter().map(|point| point.number).chain(held_on_to).min();
        assert!(oldest.is_none_or(|oldest| through <= oldest) && !self.held);
        let folded = self.logs.iter().filter(|log| log.number <= through).map(MemLog::layer);
        let overlay = Overlay::build(DISKS, folded).unwrap();
        self.mark_changes(&overlay);
        let apply = ApplyPlan::from_overlay(overlay);
        set_sizes(&apply, &mut self.base);
        for write in planned_writes(&apply, &self.logs) {
            put(&mut self.base, &write);
        }
        self.written_bytes += apply.write_bytes();
        self.applied = through;
        self.logs.retain(|log| log.number > through);
    }

    fn mark_changes(&mut self, overlay: &Overlay) {
        for (disk, entry) in self.changed_by.iter_mut().enumerate() {
            for (chunks, log) in overlay.changes(disk, self.base[disk].len() as u64) {
                assert_eq!(chunks, 0..1);
                *entry = log.0.max(*entry);
            }
        }
    }

    /// No change between any two moments is missing from what a backup of the newer one reads.
    fn check_changes(&self, overlay: &Overlay, point: LogNumber) -> Result<(), TestCaseError> {
        for disk in 0..DISKS {
            let now = &self.truth[&point][disk];
            for (&parent, then) in self.truth.range(..point) {
                let mut then = then[disk].clone();
                then.resize(now.len(), 0);
                let applied = changed_since([self.changed_by[disk]], parent, now.len() as u64);
                let read =
                    union(&applied, &overlay.changed_since(disk, self.base[disk].len() as u64, parent));
                prop_assert!(then == *now || !read.is_empty(), "{} to {}", parent, point);
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(&self.base, &self.truth[&self.applied]);
        let shown = self.points.iter().map(|point| point.number);
        for point in shown.chain(self.pins.iter().copied()) {
            let layers = self.logs.iter().filter(|log| log.number <= point).map(MemLog::layer);
            let overlay = Overlay::build(DISKS, layers).unwrap();
            prop_assert_eq!(&view(&overlay, &self.base, &self.logs), &self.truth[&point], "point {}", point);
            self.check_changes(&overlay, point)?;
        }
        for pin in &self.pinned {
            prop_assert!(self.points.iter().any(|point| point.number == *pin), "{} is pinned by hand", pin);
        }
        prop_assert!(self.written_bytes <= 2 * self.logged_bytes + self.few_bytes);
        Ok(())
    }
}

proptest! {
    #[test]
    fn every_point_stays_true_and_each_byte_is_written_at_most_twice(
        events in prop::collection::vec(event(), 1..60),
        (extra_hourly, recent) in (0_u8..6, 0_usize..3),
    ) {
        let mut replica = Replica::new();
        for event in &events {
            replica.take(event);
            replica.tend(extra_hourly, recent);
            replica.check()?;
        }
    }
}

#[test]
fn one_log_full_of_new_bytes_does_not_keep_the_empty_ones_from_being_merged() {
    let log = |number| {
        let full = Write { disk: 0, offset: 0, len: 60, data: true };
        let writes = if number == 20 { vec![full] } else { vec![] };
        let sizes = [64; DISKS];
        MemLog::new(number, &Draft { writes, sizes, per_record: 1, reversed: false, foreign: false })
    };
    let logs: Vec<_> = (1..=64).map(log).collect();
    let layers: Vec<_> = logs.iter().map(MemLog::layer).collect();
    let whole = CompactPlan::new(DISKS, &layers).unwrap().unwrap();
    assert_eq!((whole.live_bytes, whole.total_bytes, whole.worthwhile()), (60, 60, false));
    let chosen = CompactPlan::choose(DISKS, &layers, CompactRule::Halve).unwrap();
    let left = 64 - chosen.iter().map(|plan| plan.log_count - 1).sum::<usize>();
    assert_eq!(left, 7, "64 logs are halved six times");
    assert!(CompactPlan::new(DISKS, &[]).unwrap().is_none());
}

/// Ever new blocks above a point that is pinned for a long time: no merge saves a byte, and yet their logs do not
/// become more and more, nor is each byte written again and again.
#[test]
fn a_pin_of_long_ago_does_not_collect_logs() {
    let mut logs: Vec<MemLog> = Vec::new();
    let (mut logged, mut written, mut most) = (0, 0, 0);
    for number in 2..4002_u64 {
        let fresh = Write { disk: 0, offset: number * 16, len: 1 + number * 7 % 16, data: true };
        let sizes = [1 << 20; DISKS];
        let draft = Draft { writes: vec![fresh], sizes, per_record: 1, reversed: false, foreign: false };
        logs.push(MemLog::new(number, &draft));
        logged += logs.last().unwrap().raw_bytes();
        if !number.is_multiple_of(FEW_LOGS as u64) {
            continue;
        }
        loop {
            let layers: Vec<Layer<'_>> = logs.iter().map(MemLog::layer).collect();
            let chosen = CompactPlan::choose(DISKS, &layers, CompactRule::Few).unwrap();
            if chosen.is_empty() {
                break;
            }
            for plan in chosen {
                let mut replica = Replica { logs, ..Replica::new() };
                let merged = replica.merged(&plan);
                replica.logs.retain(|log| !plan.logs.contains(&log.number));
                replica.logs.push(merged);
                replica.logs.sort_by_key(|log| log.number);
                logs = replica.logs;
                written += plan.live_bytes;
            }
        }
        most = most.max(logs.len());
    }
    assert_eq!(logs.iter().map(MemLog::raw_bytes).sum::<u64>(), logged, "every block is there still");
    assert!(most <= 100, "{most} logs");
    assert!(written <= 8 * logged, "{written} bytes for {logged}");
}
