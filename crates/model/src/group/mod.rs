//! Groups: several VMs that are fixed at one moment, share recovery points, and are started in an order.
//!
//! [`Gathering`] is how their cycles come to one moment. What each of them may do, and what the moment is worth, is
//! decided here; who waits and asks is the shell's.

mod gathering;
mod shared;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{GroupName, MomentId, Phase, Timestamp, VmName};

pub use gathering::{Door, Gathering, Go, Outcome, PATIENCE, Span, skew};
pub use shared::{MemberPoints, SharedPoint, UnknownMoment, complete, find_moment, shared_points};

/// The most VMs that a group has: while they are fixed all of them are at once.
pub const GROUP_MEMBERS_MAX: usize = 64;
/// The longest delay before a start, in seconds.
pub const GROUP_DELAY_MAX_S: u64 = 3600;
/// No more of a reason why somebody is missing is kept, in characters.
pub const REASON_CHARS: usize = 200;

/// A VM of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// Its name, the same on both sides.
    pub vm: VmName,
    /// How long after the one before it is started, in seconds.
    #[serde(default)]
    pub delay_s: u64,
}

/// A group, its members in the order in which they are started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: GroupName,
    /// Its members.
    pub members: Vec<GroupMember>,
}

impl Group {
    /// What is wrong with it, if it is none that can be.
    pub fn check(&self) -> Result<(), String> {
        let Self { name, members } = self;
        if !(1..=GROUP_MEMBERS_MAX).contains(&members.len()) {
            return Err(format!("group {name} of {} VMs is none; 1 to {GROUP_MEMBERS_MAX}", members.len()));
        }
        for (place, GroupMember { vm, delay_s }) in members.iter().enumerate() {
            if members[..place].iter().any(|before| before.vm == *vm) {
                return Err(format!("{vm} is named twice in group {name}"));
            }
            if *delay_s > GROUP_DELAY_MAX_S {
                return Err(format!(
                    "a delay of {delay_s} s before {vm} is too long; {GROUP_DELAY_MAX_S} s at most"
                ));
            }
        }
        Ok(())
    }

    /// Whether a VM is one of its members.
    #[must_use]
    pub fn has(&self, vm: &VmName) -> bool {
        self.members.iter().any(|member| member.vm == *vm)
    }

    /// The same without a VM; none if nobody is left.
    #[must_use]
    pub fn without(mut self, vm: &VmName) -> Option<Self> {
        self.members.retain(|member| member.vm != *vm);
        (!self.members.is_empty()).then_some(self)
    }
}

/// One moment of a group, as it was fixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMoment {
    /// Its id.
    pub id: MomentId,
    /// The group.
    pub group: GroupName,
    /// Every write that a guest knew to be done before it is in that guest's point. It is what each of the points says
    /// of itself, too.
    pub at: Timestamp,
    /// The moments of any two members lie no further apart than this, in microseconds; and no write that a guest began
    /// later than `at` and this is in its point.
    pub skew_us: u64,
    /// Who was fixed, in the group's order.
    pub members: Vec<VmName>,
    /// Who was not.
    #[serde(default)]
    pub missing: Vec<Missing>,
}

impl GroupMoment {
    /// Whether every member was fixed.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty()
    }

    /// Bounds what a stranger says, and makes it fit to be shown.
    pub fn tidy(&mut self) {
        self.members.truncate(GROUP_MEMBERS_MAX);
        self.missing.truncate(GROUP_MEMBERS_MAX);
        self.missing.iter_mut().for_each(|missing| missing.why = reason(&missing.why));
    }
}

/// A member that was not fixed with the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Who.
    pub vm: VmName,
    /// Why, for a person.
    pub why: String,
}

impl Missing {
    /// Somebody who is missing.
    #[must_use]
    pub fn new(vm: &VmName, why: &str) -> Self {
        Self { vm: vm.clone(), why: reason(why) }
    }
}

/// A reason, short and in one line.
fn reason(why: &str) -> String {
    why.chars().take(REASON_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Why a member takes no part in the group's next moment; none if it does. One whose last cycle failed tries by itself
/// until a cycle ends well: it would hold up the others.
#[must_use]
pub fn absence(phase: &Phase, paused: bool, error: Option<&str>) -> Option<String> {
    match phase {
        _ if paused => Some("it is paused".into()),
        Phase::Replicating => error.map(|error| format!("its last cycle failed: {error}")),
        Phase::InitialReplication { .. } => Some("its initial replication is under way".into()),
        Phase::ResyncRequired { why } => Some(format!("it must be resynchronized: {why}")),
        Phase::Resynchronizing { .. } => Some("it is being resynchronized".into()),
        Phase::Failover { .. } | Phase::FailedOver => Some("it was failed over".into()),
    }
}

/// How long until the group's next moment is due, `since` the last one was begun. Whoever still sends what the last one
/// had holds the others up, but only for one more interval; then it is missing.
#[must_use]
pub fn due_in(since: Duration, interval: Duration, somebody_sends: bool) -> Duration {
    let due = if somebody_sends { interval * 2 } else { interval };
    due.saturating_sub(since)
}

/// Whether the guests are to be frozen for the next moment: all that can be, as soon as one of them is due. Of each:
/// how often it is to be, and when it last was.
#[must_use]
pub fn freeze_is_due(now: Timestamp, members: &[(Option<Duration>, Option<Timestamp>)]) -> bool {
    let is_due = |(every, last): &(Option<Duration>, Option<Timestamp>)| {
        every.is_some_and(|every| last.is_none_or(|last| now.since(last) >= every))
    };
    members.iter().any(is_due)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Progress, ResyncReason};

    fn group(members: &[(&str, u64)]) -> Group {
        let member = |(vm, delay_s): &(&str, u64)| GroupMember { vm: vm.parse().unwrap(), delay_s: *delay_s };
        Group { name: "shop".parse().unwrap(), members: members.iter().map(member).collect() }
    }

    #[test]
    fn a_group_names_each_vm_once_and_waits_no_longer_than_an_hour() {
        assert_eq!(group(&[("db", 0), ("web", 30)]).check(), Ok(()));
        assert!(group(&[]).check().unwrap_err().contains("1 to 64"));
        assert!(group(&[("db", 0), ("db", 1)]).check().unwrap_err().contains("named twice"));
        assert!(group(&[("db", 3601)]).check().unwrap_err().contains("too long"));
        let left = group(&[("db", 0), ("web", 30)]).without(&"db".parse().unwrap());
        assert_eq!(left, Some(group(&[("web", 30)])));
        assert_eq!(left.unwrap().without(&"web".parse().unwrap()), None);
    }

    #[test]
    fn only_who_replicates_changes_and_has_no_trouble_takes_part() {
        assert_eq!(absence(&Phase::Replicating, false, None), None);
        assert!(absence(&Phase::Replicating, true, None).unwrap().contains("paused"));
        assert!(absence(&Phase::Replicating, false, Some("QEMU is gone")).unwrap().contains("QEMU is gone"));
        let progress = Progress { covered_bytes: 0, total_bytes: 1 };
        for phase in [
            Phase::InitialReplication { progress },
            Phase::ResyncRequired { why: ResyncReason::Requested },
            Phase::Resynchronizing { progress },
            Phase::FailedOver,
        ] {
            assert!(absence(&phase, false, None).is_some(), "{phase:?}");
        }
    }

    #[test]
    fn who_still_sends_holds_the_others_up_for_one_interval() {
        let s = Duration::from_secs;
        assert_eq!(due_in(s(10), s(30), false), s(20));
        assert_eq!(due_in(s(10), s(30), true), s(50));
        assert_eq!(due_in(s(61), s(30), true), s(0));
    }

    #[test]
    fn one_that_is_due_freezes_all() {
        let (hour, at) = (Some(Duration::from_secs(3600)), |s: i64| Some(Timestamp(s * 1_000_000)));
        let now = Timestamp(7200 * 1_000_000);
        assert!(!freeze_is_due(now, &[(None, None), (hour, at(3601))]));
        assert!(freeze_is_due(now, &[(None, None), (hour, at(3601)), (hour, at(3600))]));
        assert!(freeze_is_due(now, &[(hour, None)]));
    }

    #[test]
    fn what_a_stranger_says_of_a_moment_is_bounded() {
        let why = format!("\u{1b}[2J{}", "x".repeat(1000));
        let vm: VmName = "web".parse().unwrap();
        let mut moment = GroupMoment {
            id: MomentId::from_bytes([1; 16]),
            group: "shop".parse().unwrap(),
            at: Timestamp(0),
            skew_us: 0,
            members: vec![vm.clone(); 1000],
            missing: vec![Missing { vm, why }; 1000],
        };
        moment.tidy();
        assert_eq!((moment.members.len(), moment.missing.len()), (GROUP_MEMBERS_MAX, GROUP_MEMBERS_MAX));
        assert!(moment.missing.iter().all(|m| m.why.len() == REASON_CHARS && !m.why.contains('\u{1b}')));
    }
}
