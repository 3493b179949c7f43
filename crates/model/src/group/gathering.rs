//! How the cycles of a group's members come to one moment.
//!
//! ```text
//!   coming ─▶ ║ Prepare ║ ─▶ guests freeze ─▶ ║ Freeze ║ ─▶ transactions ─▶ ║ Fix ║ ─▶ guests thaw, each reads and sends
//! ```
//!
//! A door opens for all at once: when everybody who is still in has come to it, or when its patience ends. Who has not come by
//! then is out, and goes on alone, as if there were no group; so does who leaves. Nobody comes back in.

use std::time::Duration;

/// Where members wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Door {
    /// Everything is ready, and nothing costs a guest yet.
    Prepare,
    /// The guest is frozen, if it is to be.
    Freeze,
    /// The moment is fixed.
    Fix,
}

/// Doors, in the order in which they are come to.
const DOORS: [Door; 3] = [Door::Prepare, Door::Freeze, Door::Fix];

/// How long each door waits at the most, from when the one before was opened. Before the first nothing costs a guest. The
/// other two together are no longer than a guest may be frozen.
pub const PATIENCE: [Duration; 3] = [Duration::from_secs(10), Duration::from_secs(5), Duration::from_secs(5)];

/// From before a member's transaction was sent to after its answer came, since the gathering was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// No later than the member's moment.
    pub start: Duration,
    /// No earlier than it.
    pub end: Duration,
}

/// The furthest that the moments of two members can lie apart, each anywhere within its span.
#[must_use]
pub fn skew(spans: &[Span]) -> Duration {
    let mut widest = Duration::ZERO;
    for (i, one) in spans.iter().enumerate() {
        for other in spans.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, other)| other) {
            widest = widest.max(one.end.saturating_sub(other.start));
        }
    }
    widest
}

/// What a member may do at a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// The door is closed.
    Wait,
    /// It is open.
    Together,
    /// The others go, or have gone, without this one.
    Alone,
}

#[derive(Debug, Clone, Default)]
struct Member {
    /// How many doors it has come to.
    come: usize,
    span: Option<Span>,
    /// Why it is out.
    out: Option<String>,
}

/// Members on their way to one moment. Times are since it was opened.
#[derive(Debug, Clone)]
pub struct Gathering {
    members: Vec<Member>,
    open: usize,
    opened_at: Duration,
    patience: [Duration; 3],
}

/// What a gathering came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Who was fixed, by place.
    pub fixed: Vec<usize>,
    /// Who was not, and why.
    pub missing: Vec<(usize, String)>,
    /// When the first transaction was sent.
    pub start: Duration,
    /// How far apart the moments are at the most.
    pub skew: Duration,
}

impl Gathering {
    /// One of so many members, of whom nobody has come yet.
    #[must_use]
    pub fn new(members: usize, patience: [Duration; 3]) -> Self {
        Self { members: vec![Member::default(); members], open: 0, opened_at: Duration::ZERO, patience }
    }

    /// A member has come to a door, having passed those before.
    pub fn come(&mut self, member: usize, door: Door, now: Duration) {
        let found = &mut self.members[member];
        found.come = found.come.max(place(door) + 1);
        self.advance(now);
    }

    /// A member's transaction is done: it has come to the last door.
    pub fn fixed(&mut self, member: usize, span: Span, now: Duration) {
        self.members[member].span = Some(span);
        self.come(member, Door::Fix, now);
    }

    /// A member will not come any more. Who has been fixed stays so.
    pub fn leave(&mut self, member: usize, why: &str, now: Duration) {
        let found = &mut self.members[member];
        if found.span.is_none() && found.out.is_none() {
            found.out = Some(why.to_owned());
        }
        self.advance(now);
    }

    /// Opens the doors that are to be open by now.
    pub fn advance(&mut self, now: Duration) {
        while let Some(door) = DOORS.get(self.open).copied() {
            let (open, impatient) = (self.open, self.deadline().is_some_and(|deadline| now >= deadline));
            let mut late = self.members.iter_mut().filter(|m| m.out.is_none() && m.come <= open).peekable();
            if late.peek().is_some() && !impatient {
                return;
            }
            late.for_each(|member| member.out = Some(lateness(door).to_owned()));
            self.open += 1;
            self.opened_at = now;
        }
    }

    /// When the next door opens at the latest; none once all are open.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        Some(self.opened_at + *self.patience.get(self.open)?)
    }

    /// How many doors are open.
    #[must_use]
    pub const fn open_doors(&self) -> usize {
        self.open
    }

    /// Whether a member that has come to a door may pass it.
    #[must_use]
    pub fn standing(&self, member: usize, door: Door) -> Go {
        match &self.members[member] {
            member if member.out.is_some() => Go::Alone,
            _ if self.open > place(door) => Go::Together,
            _ => Go::Wait,
        }
    }

    /// What it came to, once all doors are open.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        if self.open < DOORS.len() {
            return None;
        }
        let members = || self.members.iter().enumerate();
        let spans: Vec<Span> =
            members().filter(|(_, m)| m.out.is_none()).filter_map(|(_, m)| m.span).collect();
        Some(Outcome {
            fixed: members().filter(|(_, m)| m.out.is_none()).map(|(place, _)| place).collect(),
            missing: members().filter_map(|(place, m)| Some((place, m.out.clone()?))).collect(),
            start: spans.iter().map(|span| span.start).min().unwrap_or_default(),
            skew: skew(&spans),
        })
    }
}

const fn place(door: Door) -> usize {
    door as usize
}

const fn lateness(door: Door) -> &'static str {
    match door {
        Door::Prepare => "it was not ready in time",
        Door::Freeze => "its guest did not come to rest in time",
        Door::Fix => "its QEMU did not fix the moment in time",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const SHORT: [Duration; 3] = [ms(10), ms(5), ms(5)];

    #[test]
    fn a_door_opens_for_all_when_the_last_has_come() {
        let mut gathering = Gathering::new(2, SHORT);
        gathering.come(0, Door::Prepare, ms(1));
        assert_eq!(gathering.standing(0, Door::Prepare), Go::Wait);
        gathering.come(1, Door::Prepare, ms(3));
        assert_eq!(gathering.standing(0, Door::Prepare), Go::Together);
        for member in [0, 1] {
            gathering.come(member, Door::Freeze, ms(3));
        }
        gathering.fixed(0, Span { start: ms(3), end: ms(4) }, ms(4));
        assert_eq!(gathering.outcome(), None);
        gathering.fixed(1, Span { start: ms(3), end: ms(6) }, ms(6));
        let outcome = Outcome { fixed: vec![0, 1], missing: vec![], start: ms(3), skew: ms(3) };
        assert_eq!(gathering.outcome(), Some(outcome));
    }

    #[test]
    fn who_leaves_or_is_late_holds_nobody_up_and_does_not_come_back() {
        let mut gathering = Gathering::new(3, SHORT);
        gathering.come(0, Door::Prepare, ms(0));
        gathering.leave(1, "QEMU is gone", ms(1));
        gathering.advance(ms(9));
        assert_eq!(gathering.standing(0, Door::Prepare), Go::Wait, "the third may still come");
        gathering.advance(ms(10));
        assert_eq!(gathering.standing(0, Door::Prepare), Go::Together);
        gathering.come(2, Door::Prepare, ms(11));
        assert_eq!(gathering.standing(2, Door::Prepare), Go::Alone);
        gathering.come(0, Door::Freeze, ms(11));
        gathering.fixed(0, Span { start: ms(11), end: ms(12) }, ms(12));
        let outcome = gathering.outcome().unwrap();
        assert_eq!((outcome.fixed, outcome.skew), (vec![0], ms(0)));
        let why: Vec<&str> = outcome.missing.iter().map(|(_, why)| why.as_str()).collect();
        assert_eq!(why, ["QEMU is gone", "it was not ready in time"]);
    }

    #[test]
    fn a_gathering_of_which_all_have_left_is_over() {
        let mut gathering = Gathering::new(2, SHORT);
        gathering.leave(0, "a", ms(0));
        gathering.leave(1, "b", ms(0));
        let outcome = gathering.outcome().unwrap();
        assert!(outcome.fixed.is_empty() && outcome.missing.len() == 2, "{outcome:?}");
    }

    /// What a member does next, if it may.
    #[derive(Debug, Clone, Copy)]
    enum Act {
        Step(usize),
        Leave(usize),
        Time(u64),
    }

    fn act(members: usize) -> impl Strategy<Value = Act> {
        prop_oneof![
            8 => (0..members).prop_map(Act::Step),
            1 => (0..members).prop_map(Act::Leave),
            3 => (0..8_u64).prop_map(Act::Time),
        ]
    }

    proptest! {
        /// Members that do as the doors say, in any order, some slow and some gone: no transaction of the moment is sent before
        /// each that is in it has come to the second door; nobody waits longer than the patience; everybody is either in
        /// or missing; and no two real moments lie further apart than the skew.
        #[test]
        fn whoever_comes_the_moment_is_one(
            members in 1..6_usize,
            acts in prop::collection::vec(act(5), 0..80),
            real in prop::collection::vec(0.0..1.0_f64, 5),
        ) {
            let mut gathering = Gathering::new(members, SHORT);
            let mut now = ms(0);
            // How many doors it has come to, when, and its span.
            let mut come = vec![0_usize; members];
            let mut since = vec![ms(0); members];
            let mut spans: Vec<Option<Span>> = vec![None; members];
            let mut gone = vec![false; members];
            let mut frozen_at = vec![None; members];
            for act in acts {
                match act {
                    Act::Time(by) => { now += ms(by); gathering.advance(now); }
                    Act::Leave(member) if member < members && come[member] < 3 => {
                        gone[member] = true;
                        gathering.leave(member, "gone", now);
                    }
                    Act::Step(member) if member < members && !gone[member] && come[member] < 3 => {
                        let passed = come[member] == 0
                            || gathering.standing(member, DOORS[come[member] - 1]) == Go::Together;
                        if !passed { continue }
                        match come[member] {
                            2 => {
                                let start = now;
                                now += ms(1);
                                let span = Span { start, end: now };
                                spans[member] = Some(span);
                                gathering.fixed(member, span, now);
                            }
                            at => gathering.come(member, DOORS[at], now),
                        }
                        if come[member] == 1 { frozen_at[member] = Some(now); }
                        (come[member], since[member]) = (come[member] + 1, now);
                    }
                    _ => {}
                }
                for member in 0..members {
                    if come[member] > 0 && gathering.standing(member, DOORS[come[member] - 1]) == Go::Wait {
                        prop_assert!(now < since[member] + ms(20), "somebody waits too long");
                    }
                }
            }
            gathering.advance(now + ms(10));
            gathering.advance(now + ms(20));
            gathering.advance(now + ms(30));
            let outcome = gathering.outcome().unwrap();
            let mut all: Vec<usize> = outcome.fixed.iter().copied().chain(outcome.missing.iter().map(|m| m.0)).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..members).collect::<Vec<_>>());
            let first = outcome.fixed.iter().filter_map(|&member| spans[member]).map(|span| span.start).min();
            for &member in &outcome.fixed {
                prop_assert!(frozen_at[member].unwrap() <= first.unwrap());
            }
            let moment = |&member: &usize| {
                let Span { start, end } = spans[member].unwrap();
                start + (end - start).mul_f64(real[member])
            };
            let moments: Vec<Duration> = outcome.fixed.iter().map(moment).collect();
            if let (Some(first), Some(last)) = (moments.iter().min(), moments.iter().max()) {
                prop_assert!(*last - *first <= outcome.skew);
                prop_assert!(outcome.start <= *first);
            }
        }
    }
}
