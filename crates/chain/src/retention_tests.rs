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

fn kept(plan: &RetentionPlan) -> Vec<LogNumber> {
    plan.kept().collect()
}

fn input<'a>(points: &'a [PointInfo], logs: &'a [LogNumber]) -> RetentionInput<'a> {
    RetentionInput {
        points,
        logs,
        resync: false,
        applied: LogNumber(1),
        pins: &[],
        pinned: &[],
        forwarded: &[],
        shared: &[],
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
    assert_eq!(kept(&plan), logs([30]));
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
    assert_eq!(kept(&plan), logs([17, 23, 24, 25, 26, 27, 28, 29]));
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
    assert_eq!(kept(&plan_retention(&recent)), logs([27, 28, 29, 30]));
    let away_for_a_week = RetentionInput { now: at(7 * 1440), recent: 0, ..recent };
    assert_eq!(kept(&plan_retention(&away_for_a_week)), logs([29, 30]));
}

#[test]
fn a_pin_keeps_its_point_and_everything_below_as_it_is() {
    let (points, numbers) = five_hours();
    let pins = logs([20]);
    let pinned = RetentionInput { pins: &pins, extra_hourly: 4, ..input(&points, &numbers) };
    let plan = plan_retention(&pinned);
    assert_eq!(kept(&plan), logs([11, 17, 20, 23, 29, 30]));
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
    assert_eq!((kept(&plan), plan.apply_through), (logs([9]), None));
}

#[test]
fn a_held_base_stays_and_so_does_its_point() {
    let (points, numbers) = five_hours();
    let plan = plan_retention(&RetentionInput { held: true, ..input(&points, &numbers) });
    assert_eq!(kept(&plan), logs([1, 30]));
    assert_eq!(plan.apply_through, None);
}

#[test]
fn while_a_pass_is_under_way_every_point_before_it_stays() {
    let (points, _) = five_hours();
    let numbers = logs(2..=40);
    let plan = plan_retention(&input(&points, &numbers));
    assert_eq!(kept(&plan), logs(1..=30));
    assert!(plan.is_idle(), "{plan}");
    assert!(plan.to_string().ends_with("nothing else to do\n"));
}

#[test]
fn while_a_resynchronization_has_to_be_no_point_goes_however_long_it_waits() {
    let (points, numbers) = five_hours();
    let waits = RetentionInput { resync: true, now: at(30 * 1440), ..input(&points, &numbers) };
    let plan = plan_retention(&waits);
    assert_eq!(kept(&plan), logs(1..=30));
    assert!(plan.keep.iter().all(|kept| kept.why.contains(&KeptFor::PassUnderWay)));
    assert!(plan.is_idle(), "{plan}");
    let done = plan_retention(&RetentionInput { resync: false, ..waits });
    assert_eq!(kept(&done), logs([30]));
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
    assert_eq!(kept(&plan), logs([1, 2, 3]), "3 is the latest; 2 claims a later hour; 1 is the hour before");
}

#[test]
fn a_point_pinned_by_hand_stays_and_what_lies_between_is_merged_away() {
    let (points, numbers) = five_hours();
    let pinned = logs([3, 20]);
    let plan = plan_retention(&RetentionInput { pinned: &pinned, ..input(&points, &numbers) });
    assert_eq!(kept(&plan), logs([3, 20, 30]));
    assert_eq!(plan.apply_through, Some(LogNumber(3)), "the base is not taken past the oldest");
    assert_eq!(plan.compact, [LogNumber(4)..=LogNumber(20), LogNumber(21)..=LogNumber(30)]);
    let cost = plan.cost_of_pins();
    assert_eq!(
        cost,
        [(LogNumber(3), LogNumber(4)..=LogNumber(20)), (LogNumber(20), LogNumber(21)..=LogNumber(30))]
    );
}

#[test]
fn a_pin_on_what_stays_anyway_costs_nothing() {
    let (points, numbers) = five_hours();
    let pinned = logs([17, 24]);
    let hourly = RetentionInput { pinned: &pinned, extra_hourly: 2, ..input(&points, &numbers) };
    let plan = plan_retention(&RetentionInput { now: at(299), ..hourly });
    assert!(kept(&plan).contains(&LogNumber(24)) && plan.cost_of_pins().is_empty());
}

#[test]
fn each_point_that_stays_says_why() {
    let (points, numbers) = five_hours();
    let (pins, pinned) = (logs([12]), logs([5, 30]));
    let asked = RetentionInput {
        pins: &pins,
        pinned: &pinned,
        held: true,
        extra_hourly: 1,
        recent: 2,
        now: at(305),
        ..input(&points, &numbers)
    };
    let why: Vec<(u64, Vec<&str>)> = plan_retention(&asked)
        .keep
        .iter()
        .map(|kept| (kept.number.0, kept.why.iter().map(|why| why.code()).collect()))
        .collect();
    let expected: &[(u64, &[&str])] = &[
        (1, &["held"]),
        (5, &["pinned-by-hand"]),
        (12, &["read"]),
        (29, &["recent", "hourly"]),
        (30, &["latest", "recent", "hourly", "pinned-by-hand"]),
    ];
    assert!(why.iter().map(|(n, w)| (*n, &w[..])).eq(expected.iter().copied()), "{why:?}");
}

#[test]
fn what_is_to_be_passed_on_bounds_the_base_and_the_merges() {
    let (points, numbers) = five_hours();
    let marks = logs([12, 20]);
    let plan = plan_retention(&RetentionInput { forwarded: &marks, ..input(&points, &numbers) });
    assert_eq!(kept(&plan), logs([12, 20, 30]));
    assert_eq!(plan.apply_through, Some(LogNumber(12)));
    assert_eq!(plan.keep[0].why, [KeptFor::Forwarded].into());
    let groups: Vec<_> = plan.compact.iter().map(|group| (group.start().0, group.end().0)).collect();
    assert_eq!(groups, [(13, 20), (21, 30)]);
    // A mark that is older than the base holds nothing any more.
    let old = logs([0]);
    let plan = plan_retention(&RetentionInput { forwarded: &old, ..input(&points, &numbers) });
    assert_eq!((kept(&plan), plan.apply_through), (logs([30]), Some(LogNumber(30))));
}

#[test]
fn what_all_of_a_group_have_stands_for_its_hour_and_the_newest_of_it_stays() {
    let (points, numbers) = five_hours();
    // Taken at 01:50, 02:20, 02:40 and 04:10.
    let shared = logs([11, 14, 16, 25]);
    let hourly = RetentionInput { shared: &shared, extra_hourly: 3, ..input(&points, &numbers) };
    let plan = plan_retention(&hourly);
    // 05:00 is the latest; of the hours before it 04 has 25, 03 has only points of its own, 02 has 16.
    assert_eq!(kept(&plan), logs([16, 23, 25, 30]));
    assert_eq!(plan.keep[2].why, [KeptFor::Group, KeptFor::Hourly].into());
    let plan = plan_retention(&RetentionInput { extra_hourly: 0, ..hourly });
    assert_eq!(kept(&plan), logs([25, 30]), "whoever runs ahead keeps what the others have");
}

/// Members of a group whose moments are partly complete, each with other points in between: in every hour that all
/// keep, they keep the same complete moment, if there is one.
#[test]
fn members_of_a_group_keep_the_same_moments() {
    let mut seed = 7_u64;
    let mut dice = move |of: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % of
    };
    for _ in 0..50 {
        // Every 7 minutes a moment; some members miss some, and have a point of their own instead.
        let complete: Vec<bool> = (0..60).map(|_| dice(3) > 0).collect();
        let mut kept_at: Vec<Vec<Timestamp>> = Vec::new();
        for _ in 0..3 {
            let (mut points, mut shared) = (Vec::new(), Vec::new());
            for (at, complete) in (0_u64..).step_by(7).zip(&complete) {
                let number = points.len() as u64 + 1;
                match complete {
                    true => shared.push(LogNumber(number)),
                    false if dice(2) == 0 => continue,
                    false => {}
                }
                points.push(point(number, at));
                if dice(4) == 0 {
                    points.push(point(number + 1, at + 3));
                }
            }
            let numbers = logs(2..points.len() as u64 + 1);
            let now = at(60 * 7);
            let input = RetentionInput { shared: &shared, extra_hourly: 24, now, ..input(&points, &numbers) };
            let kept = kept(&plan_retention(&input));
            let is_kept = |point: &&PointInfo| kept.contains(&point.number) && shared.contains(&point.number);
            kept_at.push(points.iter().filter(is_kept).map(|point| point.taken_at).collect());
        }
        assert!(!kept_at[0].is_empty());
        assert!(kept_at.iter().all(|kept| *kept == kept_at[0]), "{kept_at:?}");
    }
}

proptest! {
    #[test]
    fn the_base_never_passes_what_is_kept_and_carrying_a_plan_out_settles(
        steps in prop::collection::vec((0_u64..90, any::<bool>()), 1..60),
        pins in prop::collection::vec(1_usize..60, 0..3),
        pinned in prop::collection::vec(0_usize..60, 0..3),
        shared in prop::collection::btree_set(0_usize..60, 0..20),
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
        let pinned: Vec<_> = pinned.into_iter().filter_map(|at| points.get(at)).map(|pin| pin.number).collect();
        let shared: Vec<_> = shared.into_iter().filter_map(|at| points.get(at)).map(|point| point.number).collect();
        let input = RetentionInput {
            pins: &pins, pinned: &pinned, shared: &shared, held, extra_hourly, recent, now: at(minute), ..input(&points, &numbers)
        };
        let plan = plan_retention(&input);

        let latest = points.last().unwrap().number;
        let keep = kept(&plan);
        prop_assert!(keep.contains(&latest));
        prop_assert!(pins.iter().chain(&pinned).all(|pin| keep.contains(pin)));
        prop_assert!(plan.keep.iter().all(|kept| !kept.why.is_empty()));
        for kept in &plan.keep {
            prop_assert_eq!(kept.why.contains(&KeptFor::PinnedByHand), pinned.contains(&kept.number));
            prop_assert_eq!(kept.why.contains(&KeptFor::Read), pins.contains(&kept.number));
            prop_assert_eq!(kept.why.contains(&KeptFor::Latest), kept.number == latest);
        }
        // What the pins alone keep is what would be folded in without them.
        let without = plan_retention(&RetentionInput { pinned: &[], ..input });
        let free = pins.is_empty() && !held && !plan.keep[0].why.contains(&KeptFor::PassUnderWay);
        let cost_to = plan.cost_of_pins().last().map(|(_, logs)| *logs.end());
        if let Some(cost_to) = cost_to.filter(|_| free) {
            prop_assert_eq!(without.apply_through, Some(cost_to));
        }
        prop_assert_eq!(keep.len() + plan.drop.len(), points.len());
        if let Some(through) = plan.apply_through {
            prop_assert_eq!(through, keep[0]);
        }
        for group in &plan.compact {
            prop_assert!(keep.contains(group.end()));
            prop_assert!(!keep.iter().any(|kept| group.contains(kept) && kept != group.end()));
            prop_assert!(pins.iter().all(|pin| pin < group.start()));
            prop_assert!(*group.start() > keep[0]);
        }

        let applied = plan.apply_through.unwrap_or(input.applied);
        let points_after: Vec<_> =
            points.iter().copied().filter(|point| keep.contains(&point.number)).collect();
        let inside = |log: &LogNumber| plan.compact.iter().any(|group| group.contains(log) && group.end() != log);
        let logs_after: Vec<_> = numbers.iter().copied().filter(|log| *log > applied && !inside(log)).collect();
        let settled = plan_retention(&RetentionInput { points: &points_after, logs: &logs_after, applied, ..input });
        prop_assert!(settled.is_idle(), "{}", settled);
    }
}
