//! Which backups are kept, and by which rule. A plan deletes nothing: it can be shown before it is carried out.

use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{ToSpan, Zoned};
use model::Timestamp;
use serde::{Deserialize, Serialize};

use crate::calendar::zoned;

/// How many backups of a VM are kept, counted from the newest: so many of all, so many of which each is the newest of its
/// hour, day, week (from Monday on), month or year in the policy's time zone; and all that are younger than some age. A
/// backup that one rule keeps is kept. An hour or a day without a backup is not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Retention {
    /// The newest so many.
    pub last: u32,
    /// Of so many hours.
    pub hourly: u32,
    /// Of so many days.
    pub daily: u32,
    /// Of so many weeks.
    pub weekly: u32,
    /// Of so many months.
    pub monthly: u32,
    /// Of so many years.
    pub yearly: u32,
    /// All whose point is younger than this.
    #[serde(deserialize_with = "crate::text::optional_duration")]
    pub within: Option<Duration>,
}

impl Retention {
    /// Whether no rule keeps anything: nothing must follow from that.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A backup of a VM, as a plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate<I> {
    /// Its id.
    pub id: I,
    /// The moment of its point: it is that moment's state, whenever it was stored.
    pub taken_at: Timestamp,
    /// A person has asked for it: no policy forgets it.
    pub by_hand: bool,
}

/// Why a backup is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// It is the newest: that one is always kept.
    Newest,
    /// A person has asked for it.
    ByHand,
    /// It is younger than `within`.
    Within,
    /// By `last`.
    Last,
    /// By `hourly`.
    Hourly,
    /// By `daily`.
    Daily,
    /// By `weekly`.
    Weekly,
    /// By `monthly`.
    Monthly,
    /// By `yearly`.
    Yearly,
    /// A policy says nothing of how long its backups are kept.
    NoRule,
}

/// What becomes of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict<I> {
    /// Its id.
    pub id: I,
    /// The moment of its point.
    pub taken_at: Timestamp,
    /// Why it is kept; it is forgotten if this is empty.
    pub kept_by: Vec<Reason>,
}

/// One rule that keeps the newest backup of each period, until it has kept so many.
struct Rule {
    reason: Reason,
    left: u32,
    period: fn(&Zoned) -> Option<jiff::civil::DateTime>,
    seen: Option<jiff::civil::DateTime>,
}

impl Rule {
    /// Whether it keeps this one; they come newest first.
    fn keeps(&mut self, local: &Zoned) -> bool {
        let period = (self.period)(local);
        let keeps = self.left > 0 && (period.is_none() || period != self.seen);
        if keeps {
            self.left -= 1;
            self.seen = period;
        }
        keeps
    }
}

fn rules(retention: &Retention) -> [Rule; 6] {
    let rule = |reason, left, period| Rule { reason, left, period, seen: None };
    [
        rule(Reason::Last, retention.last, |_| None),
        rule(Reason::Hourly, retention.hourly, |local| local.date().at(local.hour(), 0, 0, 0).into()),
        rule(Reason::Daily, retention.daily, |local| local.date().at(0, 0, 0, 0).into()),
        rule(Reason::Weekly, retention.weekly, |local| {
            let since_monday = i64::from(local.date().weekday().to_monday_zero_offset());
            Some(local.date().checked_sub(since_monday.days()).ok()?.at(0, 0, 0, 0))
        }),
        rule(Reason::Monthly, retention.monthly, |local| local.date().first_of_month().at(0, 0, 0, 0).into()),
        rule(Reason::Yearly, retention.yearly, |local| local.date().first_of_year().at(0, 0, 0, 0).into()),
    ]
}

/// What becomes of the backups of one VM in one repository under all policies that have their say there, newest first: a
/// backup is kept if one of them keeps it. Where there is none, or one has no rule at all, everything is kept.
#[must_use]
pub fn plan<I>(
    mut backups: Vec<Candidate<I>>,
    policies: &[(Retention, TimeZone)],
    now: Timestamp,
) -> Vec<Verdict<I>> {
    backups.sort_by_key(|backup| std::cmp::Reverse(backup.taken_at));
    let mut rules: Vec<_> = policies.iter().map(|(retention, zone)| (rules(retention), zone)).collect();
    let is_without_rule = policies.is_empty() || policies.iter().any(|(retention, _)| retention.is_empty());
    let within = policies.iter().filter_map(|(retention, _)| retention.within).max();
    let verdict = |(place, backup): (usize, Candidate<I>)| {
        let by_itself = [
            (Reason::Newest, place == 0),
            (Reason::ByHand, backup.by_hand),
            (Reason::NoRule, is_without_rule),
            (Reason::Within, within.is_some_and(|within| now.since(backup.taken_at) < within)),
        ];
        let mut kept_by: Vec<Reason> =
            by_itself.into_iter().filter_map(|(reason, holds)| holds.then_some(reason)).collect();
        for (rules, zone) in &mut rules {
            let local = zoned(backup.taken_at, zone);
            kept_by.extend(rules.iter_mut().filter_map(|rule| rule.keeps(&local).then_some(rule.reason)));
        }
        kept_by.sort_unstable();
        kept_by.dedup();
        Verdict { id: backup.id, taken_at: backup.taken_at, kept_by }
    };
    backups.into_iter().enumerate().map(verdict).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    /// One backup each hour up to `now`, counted back from it.
    fn hourly(count: u32, now: Timestamp) -> Vec<Candidate<u32>> {
        (0..count)
            .map(|age| Candidate {
                id: age,
                taken_at: Timestamp(now.0 - i64::from(age) * 3_600_000_000),
                by_hand: false,
            })
            .collect()
    }

    fn noon() -> Timestamp {
        let noon: Zoned = "2026-11-26T12:30[Europe/Berlin]".parse().unwrap(); // a Thursday
        crate::calendar::moment(&noon)
    }

    fn kept(retention: Retention, backups: Vec<Candidate<u32>>) -> Vec<u32> {
        let plan = plan(backups, &[(retention, berlin())], noon());
        plan.into_iter().filter(|verdict| !verdict.kept_by.is_empty()).map(|verdict| verdict.id).collect()
    }

    #[test]
    fn each_rule_keeps_the_newest_of_its_periods() {
        let kept_of = |retention| kept(retention, hourly(24 * 30, noon()));
        assert_eq!(kept_of(Retention { last: 3, ..Retention::default() }), [0, 1, 2]);
        assert_eq!(kept_of(Retention { hourly: 2, ..Retention::default() }), [0, 1]);
        // 23:30 of each day before.
        assert_eq!(kept_of(Retention { daily: 3, ..Retention::default() }), [0, 13, 37]);
        // The Sunday before is 3 days and 13 hours ago.
        assert_eq!(kept_of(Retention { weekly: 2, ..Retention::default() }), [0, 3 * 24 + 13]);
        assert_eq!(kept_of(Retention { monthly: 2, yearly: 1, ..Retention::default() }), [0, 25 * 24 + 13]);
        assert_eq!(kept_of(Retention { within: Some(HOUR * 2), ..Retention::default() }), [0, 1]);
        assert_eq!(kept_of(Retention { last: 1, daily: 2, ..Retention::default() }), [0, 13]);
    }

    #[test]
    fn days_without_a_backup_are_not_counted() {
        let mut backups = hourly(24 * 30, noon());
        backups.retain(|backup| backup.id % 240 == 0);
        assert_eq!(kept(Retention { daily: 2, ..Retention::default() }, backups), [0, 240]);
    }

    #[test]
    fn the_newest_and_those_made_by_hand_are_kept_whatever_the_rules() {
        let mut backups = hourly(5, Timestamp(noon().0 - 365 * 24 * 3_600_000_000));
        backups[3].by_hand = true;
        let none = Retention { within: Some(HOUR), ..Retention::default() };
        assert_eq!(kept(none, backups), [0, 3]);
    }

    #[test]
    fn several_policies_keep_what_one_of_them_keeps() {
        let (by_day, by_count) =
            (Retention { daily: 2, ..Retention::default() }, Retention { last: 2, ..Retention::default() });
        let both = [(by_day, berlin()), (by_count, TimeZone::UTC)];
        let plan = plan(hourly(48, noon()), &both, noon());
        let kept: Vec<_> =
            plan.iter().filter(|verdict| !verdict.kept_by.is_empty()).map(|verdict| verdict.id).collect();
        assert_eq!(kept, [0, 1, 13]);
        assert_eq!(plan[0].kept_by, [Reason::Newest, Reason::Last, Reason::Daily]);
    }

    #[test]
    fn without_a_rule_everything_is_kept() {
        let some = Retention { last: 1, ..Retention::default() };
        for policies in [
            vec![],
            vec![(Retention::default(), berlin())],
            vec![(some, berlin()), (Retention::default(), berlin())],
        ] {
            let plan = plan(hourly(5, noon()), &policies, noon());
            assert!(plan.iter().all(|verdict| verdict.kept_by.contains(&Reason::NoRule)));
        }
    }

    fn some_retention() -> impl Strategy<Value = Retention> {
        (0_u32..4, 0_u32..4, 0_u32..4, 0_u32..4, 0_u32..4, 0_u32..3).prop_map(
            |(last, hourly, daily, weekly, monthly, yearly)| Retention {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
                within: None,
            },
        )
    }

    proptest! {
        /// Carried out after each new backup, a plan never takes away what a later one would have kept: what a rule kept
        /// at the end is there whether or not the plans between were carried out.
        #[test]
        fn forgetting_in_between_loses_nothing(
            retention in some_retention(),
            steps in prop::collection::vec(1_i64..3000, 1..60),
        ) {
            prop_assume!(!retention.is_empty());
            let mut at = noon().0;
            let (mut all, mut left) = (Vec::new(), Vec::new());
            for (id, step) in (0_u32..).zip(steps) {
                at += step * 60_000_000;
                let made = Candidate { id, taken_at: Timestamp(at), by_hand: false };
                all.push(made.clone());
                left.push(made);
                let policies = [(retention, berlin())];
                let kept = |backups: &[Candidate<u32>]| -> Vec<u32> {
                    let plan = plan(backups.to_vec(), &policies, Timestamp(at));
                    plan.into_iter().filter(|verdict| !verdict.kept_by.is_empty()).map(|verdict| verdict.id).collect()
                };
                let (of_all, of_left) = (kept(&all), kept(&left));
                prop_assert_eq!(&of_all, &of_left);
                prop_assert!(of_left.contains(&id), "the newest is kept");
                left.retain(|backup| of_left.contains(&backup.id));
            }
        }
    }
}
