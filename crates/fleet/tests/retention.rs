//! The shortcut by which the simulation knows how far a base may go, held against production's rule.

use chain::{RetentionInput, plan_retention};
use fleet::{Kept, Point};
use model::{Consistency, LogId, LogNumber, PointInfo, Timestamp};
use proptest::prelude::*;

const SECOND: i64 = 1_000_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// A chain grows log by log; after each, with a pin or without, both rules let the base go equally far.
    #[test]
    fn the_base_goes_as_far_as_retention_lets_it(
        extra_hourly in 0_u8..4,
        gaps_s in prop::collection::vec(prop_oneof![8 => 200_i64..700, 1 => 700_i64..12_000], 2..60),
        pin_at in 0_usize..60,
        unpin_after in 0_usize..20,
    ) {
        let mut now = 0;
        let mut points = vec![point(1, now)];
        let mut kept = Kept::new(extra_hourly, Point { number: 1, at: now, bytes: 0.0 });
        let (mut base, mut pin) = (1, None);
        for (place, gap) in gaps_s.into_iter().enumerate() {
            now += gap * SECOND;
            let number = place as u64 + 2;
            points.push(point(number, now));
            kept.push(Point { number, at: now, bytes: 0.0 });
            if place == pin_at {
                pin = Some(number);
            } else if place == pin_at + unpin_after {
                pin = None;
            }
            let floor = pin.unwrap_or(u64::MAX).min(kept.oldest().number);
            let expected = (floor > base).then_some(LogNumber(floor));
            let pins: Vec<LogNumber> = pin.map(LogNumber).into_iter().collect();
            let logs: Vec<LogNumber> = (base + 1..=number).map(LogNumber).collect();
            let plan = plan_retention(&RetentionInput {
                points: &points,
                logs: &logs,
                resync: false,
                applied: LogNumber(base),
                pins: &pins,
                pinned: &[],
                forwarded: &[],
                shared: &[],
                held: false,
                extra_hourly,
                recent: 0,
                now: Timestamp(now),
            });
            prop_assert_eq!(plan.apply_through, expected, "at log {} with pin {:?}", number, pin);
            // Carried out, as the simulation does at once and production soon.
            points.retain(|point| plan.kept().any(|kept| kept == point.number));
            base = floor.max(base);
        }
    }
}

fn point(number: u64, at: i64) -> PointInfo {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_le_bytes());
    PointInfo {
        number: LogNumber(number),
        id: LogId::from_bytes(id),
        taken_at: Timestamp(at),
        consistency: Consistency::Crash,
    }
}
