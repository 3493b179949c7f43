//! Which bytes a point has, and what an apply writes, against disks that are plain byte arrays.

mod common;

use chain::{ApplyPlan, CHANGE_CHUNK_BYTES, Overlay, apply_batches};
use model::LogNumber;
use proptest::prelude::*;

use common::*;

/// A base that no log has written and a chain over it.
fn chain_over_base() -> impl Strategy<Value = (Disks, Vec<MemLog>)> {
    let sizes = prop::collection::vec(0..=SIZE_MAX, DISKS);
    (sizes, prop::collection::vec(draft(), 1..7)).prop_map(|(sizes, drafts)| {
        let base = sizes.iter().map(|&size| vec![0xbb; usize::try_from(size).unwrap()]).collect();
        (base, (1..).zip(&drafts).map(|(number, draft)| MemLog::new(number, draft)).collect())
    })
}

fn naive(base: &Disks, logs: &[MemLog]) -> Disks {
    let mut disks = base.clone();
    logs.iter().for_each(|log| log.apply_naively(&mut disks));
    disks
}

fn overlay(logs: &[MemLog]) -> Overlay {
    Overlay::build(DISKS, logs.iter().map(MemLog::layer)).unwrap()
}

proptest! {
    #[test]
    fn an_overlay_shows_what_writing_the_logs_in_turn_would(
        (base, logs) in chain_over_base(),
        order in any::<prop::sample::Index>(),
        (disk, start, end) in (0..DISKS, 0..SIZE_MAX, 0..SIZE_MAX),
    ) {
        let mut shuffled = logs.clone();
        shuffled.rotate_left(order.index(logs.len()));
        let turn = order.index(logs.len() + 1);
        shuffled[..turn].reverse();
        let overlay = overlay(&shuffled);
        let expected = naive(&base, &logs);
        prop_assert_eq!(&view(&overlay, &base, &logs), &expected);

        let part = read(&overlay, &base, &logs, disk, start..end);
        let byte = |at: usize| expected[disk].get(at).copied().unwrap_or(0);
        let expected_part: Vec<u8> = bytes(start..end).map(byte).collect();
        prop_assert_eq!(part, expected_part, "any part of it, and zeros beyond the end");
        prop_assert_eq!(overlay.newest(), logs.last().map(|log| log.number));
    }

    #[test]
    fn what_an_overlay_has_is_sorted_and_disjoint((_, logs) in chain_over_base()) {
        let overlay = overlay(&logs);
        for disk in 0..DISKS {
            let extents: Vec<_> = overlay.extents(disk).map(|survivor| survivor.extent).collect();
            prop_assert!(extents.iter().all(|extent| extent.len > 0));
            prop_assert!(extents.windows(2).all(|pair| pair[0].end() <= pair[1].offset));
            prop_assert!(extents.last().is_none_or(|last| last.end() <= overlay.disk_size(disk).unwrap()));
            let surviving = overlay.surviving(disk);
            prop_assert_eq!(surviving.pieces, extents.len());
            prop_assert_eq!(
                surviving.record_bytes + surviving.zero_bytes,
                extents.iter().map(|extent| extent.len).sum::<u64>()
            );
        }
    }

    #[test]
    fn an_apply_in_any_order_cut_off_anywhere_and_run_again_ends_the_same(
        (base, logs) in chain_over_base(),
        (turn, cut) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        through in any::<prop::sample::Index>(),
    ) {
        let folded = &logs[..=through.index(logs.len())];
        let plan = ApplyPlan::new(DISKS, folded.iter().map(MemLog::layer)).unwrap();
        let mut writes = planned_writes(&plan, &logs);
        let in_order = |work: chain::RecordWork<'_>| (work.log, work.record);
        prop_assert!(plan.records().map(in_order).is_sorted_by(|a, b| a < b), "no record is read twice");
        let turn = turn.index(writes.len() + 1);
        writes.rotate_left(turn);
        writes[..turn.min(3)].reverse();

        let mut disks = base.clone();
        set_sizes(&plan, &mut disks);
        let cut = cut.index(writes.len() + 1);
        writes[..cut].iter().for_each(|write| put(&mut disks, write));
        // Cut off here: every view that has the folded logs still reads the same.
        for newest in folded.len()..=logs.len() {
            let seen = view(&overlay(&logs[..newest]), &disks, &logs);
            prop_assert_eq!(seen, naive(&base, &logs[..newest]));
        }
        for _ in 0..2 {
            set_sizes(&plan, &mut disks);
            writes.iter().for_each(|write| put(&mut disks, write));
            prop_assert_eq!(&disks, &naive(&base, folded));
        }
    }

    #[test]
    fn an_apply_in_batches_ends_the_same_and_writes_no_more_than_the_logs_hold(
        (base, logs) in chain_over_base(),
        extents_max in 0_usize..20,
        cut in any::<prop::sample::Index>(),
    ) {
        let lens: Vec<_> = logs.iter().map(|log| (log.number, log.index.extents.len())).collect();
        let batches = apply_batches(&lens, extents_max);
        let mut disks = base.clone();
        // Once up to somewhere, then all of it: a crash between two batches starts over.
        for end in [cut.index(batches.len() + 1), batches.len()] {
            let mut written = 0;
            for batch in &batches[..end] {
                let layers = logs.iter().filter(|log| batch.contains(&log.number)).map(MemLog::layer);
                let plan = ApplyPlan::new(DISKS, layers).unwrap();
                set_sizes(&plan, &mut disks);
                planned_writes(&plan, &logs).iter().for_each(|write| put(&mut disks, write));
                written += plan.write_bytes();
                prop_assert_eq!(view(&overlay(&logs), &disks, &logs), naive(&base, &logs));
            }
            prop_assert!(written <= logs.iter().map(MemLog::raw_bytes).sum());
        }
        prop_assert_eq!(disks, naive(&base, &logs));
    }
}

#[test]
fn a_disk_that_shrank_and_grew_again_does_not_show_its_old_bytes() {
    let sized = |number, size| {
        MemLog::new(
            number,
            &Draft { writes: vec![], sizes: [size, 10], per_record: 1, reversed: false, foreign: true },
        )
    };
    let logs = [sized(1, 40), sized(2, 60), sized(3, 50), sized(4, 90)];
    let base = vec![vec![0xbb; 96], vec![0xbb; 10]];
    let seen = view(&overlay(&logs), &base, &logs);
    assert_eq!(seen, naive(&base, &logs));
    assert_eq!(overlay(&logs).surviving(0).zero_bytes, 50);
    let changed = overlay(&logs).changed_since(0, 40, LogNumber(3));
    assert_eq!(changed, [log::Extent { offset: 0, len: 90.min(CHANGE_CHUNK_BYTES) }]);
    assert!(overlay(&logs).changed_since(0, 40, LogNumber(4)).is_empty());
}

#[test]
fn a_log_that_is_damaged_or_given_twice_leaves_the_others_untouched() {
    let draft = Draft {
        writes: vec![Write { disk: 0, offset: 0, len: 9, data: true }],
        sizes: [64; DISKS],
        per_record: 1,
        reversed: false,
        foreign: true,
    };
    let good = MemLog::new(1, &draft);
    let mut damaged = MemLog::new(2, &draft);
    damaged.index.records.last_mut().unwrap().raw_bytes += 1;
    let mut builder = chain::OverlayBuilder::new(DISKS);
    builder.push(&good.layer()).unwrap();
    let error = builder.push(&damaged.layer()).unwrap_err();
    assert_eq!((error.log, error.fault.code()), (LogNumber(2), "index-raw-bytes"));
    assert_eq!(builder.push(&good.layer()).unwrap_err().fault.code(), "index-given-twice");
    assert_eq!(builder.finish().surviving(0).record_bytes, 9);
}
