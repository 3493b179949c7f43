use std::time::Duration;

use model::{Consistency, LogId};
use proptest::prelude::*;

use super::*;

/// A point taken so many minutes after midnight.
fn point(number: u64, minute: u64) -> PointInfo {
    PointInfo {
        id: LogId::from_bytes([0; 16]),
        number: LogNumber(number),
        taken_at: at(minute),
        consistency: Consistency::Crash,
    }
}

fn at(minute: u64) -> Timestamp {
    Timestamp::default().plus(Duration::from_secs(minute * 60))
}

fn logs(numbers: impl IntoIterator<Item = u64>) -> Vec<LogNumber> {
    numbers.into_iter().map(LogNumber).collect()
}

/// A point every 10 minutes from midnight: numbers 1 to 30, taken at 00:10 to 05:00; the base is at 1.
fn five_hours() -> (Vec<PointInfo>, Vec<LogNumber>) {
    ((1..=30).map(|n| point(n, n * 10)).collect(), logs(2..=30))
}

fn input<'a>(points: &'a [PointInfo], logs: &'a [LogNumber]) -> RetentionInput<'a> {
    RetentionInput {
        points,
        logs,
        applied: LogNumber(1),
        pins: &[],
        held: false,
        extra_hourly: 0,
        recent: 0,
        now: at(305),
    }
}

#[test]
fn without_hourly_points_only_the_latest_stays() {
    let (points, numbers) = five_hours();
    let plan = plan_retention(&input(&points, &numbers));
    assert_eq!(plan.keep, logs([30]));
    assert_eq!(plan.drop, logs(1..30));
    assert_eq!(plan.apply_through, Some(LogNumber(30)));
    assert!(plan.compact.is_empty());
}

#[test]
fn the_current_hour_stays_whole_and_each_earlier_one_has_its_newest() {
    let (points, numbers) = five_hours();
    let hourly = RetentionInput { extra_hourly: 2, now: at(299), ..input(&points[..29], &numbers[..28]) };
    let plan = plan_retention(&hourly);
    // 04:00 to 04:50 are this hour's; 03:50 and 02:50 stand for the two before.
    assert_eq!(plan.keep, logs([17, 23, 24, 25, 26, 27, 28, 29]));
    assert_eq!(plan.apply_through, Some(LogNumber(17)));
    assert_eq!(plan.compact, [LogNumber(18)..=LogNumber(23)]);
    assert_eq!(
        plan.to_string(),
        "keep 8 points: 17, 23-29\nstop showing 21 points: 1-16, 18-22\n\
         fold the logs up to point 17 into the base\nmerge logs 18 to 23 where that halves them\n"
    );
}

#[test]
fn the_full_hour_does_not_end_the_recent_points() {
    let (points, numbers) = five_hours();
    let recent = RetentionInput { extra_hourly: 1, recent: 4, now: at(301), ..input(&points, &numbers) };
    assert_eq!(plan_retention(&recent).keep, logs([27, 28, 29, 30]));
    let away_for_a_week = RetentionInput { now: at(7 * 1440), recent: 0, ..recent };
    assert_eq!(plan_retention(&away_for_a_week).keep, logs([29, 30]));
}

#[test]
fn a_pin_keeps_its_point_and_everything_below_as_it_is() {
    let (points, numbers) = five_hours();
    let pins = logs([20]);
    let pinned = RetentionInput { pins: &pins, extra_hourly: 4, ..input(&points, &numbers) };
    let plan = plan_retention(&pinned);
    assert_eq!(plan.keep, logs([11, 17, 20, 23, 29, 30]));
    assert_eq!(plan.apply_through, Some(LogNumber(11)));
    assert_eq!(plan.compact, [LogNumber(21)..=LogNumber(23), LogNumber(24)..=LogNumber(29)]);

    let below = logs([7]);
    let plan = plan_retention(&RetentionInput { pins: &below, ..pinned });
    assert_eq!(plan.apply_through, Some(LogNumber(7)), "the oldest pin bounds the base");
}

#[test]
fn a_pin_on_a_point_that_is_not_shown_still_bounds_the_base() {
    let points = [point(1, 10), point(9, 90)];
    let (numbers, pins) = (logs(2..=9), logs([6]));
    let plan = plan_retention(&RetentionInput { pins: &pins, ..input(&points, &numbers) });
    assert_eq!((plan.keep, plan.apply_through), (logs([9]), None));
}

#[test]
fn a_held_base_stays_and_so_does_its_point() {
    let (points, numbers) = five_hours();
    let plan = plan_retention(&RetentionInput { held: true, ..input(&points, &numbers) });
    assert_eq!(plan.keep, logs([1, 30]));
    assert_eq!(plan.apply_through, None);
}

#[test]
fn while_a_pass_is_under_way_every_point_before_it_stays() {
    let (points, _) = five_hours();
    let numbers = logs(2..=40);
    let plan = plan_retention(&input(&points, &numbers));
    assert_eq!(plan.keep, logs(1..=30));
    assert!(plan.is_idle(), "{plan}");
    assert!(plan.to_string().ends_with("nothing else to do\n"));
}

#[test]
fn an_initial_replication_can_go_straight_into_the_base() {
    let numbers = logs(2..=40);
    let initial = input(&[], &numbers);
    let plan = plan_retention(&initial);
    assert_eq!((plan.apply_through, plan.apply_initial_through), (None, Some(LogNumber(40))));
    let held = plan_retention(&RetentionInput { held: true, ..initial });
    assert!(held.is_idle());
    assert_eq!(plan_retention(&input(&[], &[])), RetentionPlan::default());
}

#[test]
fn a_clock_that_jumped_back_does_not_bring_the_wrong_point_forward() {
    let points = [point(1, 10), point(2, 500), point(3, 100)];
    let numbers = logs([2, 3]);
    let plan = plan_retention(&RetentionInput { extra_hourly: 1, now: at(110), ..input(&points, &numbers) });
    assert_eq!(plan.keep, logs([1, 2, 3]), "3 is the latest; 2 claims a later hour; 1 is the hour before");
}

proptest! {
    #[test]
    fn the_base_never_passes_what_is_kept_and_carrying_a_plan_out_settles(
        steps in prop::collection::vec((0_u64..90, any::<bool>()), 1..60),
        pins in prop::collection::vec(1_usize..60, 0..3),
        (extra_hourly, recent, held) in (0_u8..30, 0_usize..4, any::<bool>()),
    ) {
        let mut minute = 0;
        let mut points = vec![point(1, 0)];
        for (number, (later, is_point)) in (2..).zip(&steps) {
            minute += later;
            if *is_point { points.push(point(number, minute)); }
        }
        let numbers = logs(2..2 + steps.len() as u64);
        let pins: Vec<_> = pins.into_iter().filter_map(|at| points.get(at)).map(|pin| pin.number).collect();
        let input = RetentionInput {
            pins: &pins, held, extra_hourly, recent, now: at(minute), ..input(&points, &numbers)
        };
        let plan = plan_retention(&input);

        let latest = points.last().unwrap().number;
        prop_assert!(plan.keep.contains(&latest));
        prop_assert!(pins.iter().all(|pin| plan.keep.contains(pin)));
        prop_assert_eq!(plan.keep.len() + plan.drop.len(), points.len());
        if let Some(through) = plan.apply_through {
            prop_assert_eq!(through, plan.keep[0]);
        }
        for group in &plan.compact {
            prop_assert!(plan.keep.contains(group.end()));
            prop_assert!(!plan.keep.iter().any(|kept| group.contains(kept) && kept != group.end()));
            prop_assert!(pins.iter().all(|pin| pin < group.start()));
            prop_assert!(*group.start() > plan.keep[0]);
        }

        let applied = plan.apply_through.unwrap_or(input.applied);
        let points_after: Vec<_> =
            points.iter().copied().filter(|point| plan.keep.contains(&point.number)).collect();
        let inside = |log: &LogNumber| plan.compact.iter().any(|group| group.contains(log) && group.end() != log);
        let logs_after: Vec<_> = numbers.iter().copied().filter(|log| *log > applied && !inside(log)).collect();
        let settled = plan_retention(&RetentionInput { points: &points_after, logs: &logs_after, applied, ..input });
        prop_assert!(settled.is_idle(), "{}", settled);
    }
}
