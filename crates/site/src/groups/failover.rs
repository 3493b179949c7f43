//! The VMs of a group change their site together: all to one moment, and then started in their order.
//!
//! All are failed over before the first is to be started: a failover takes no time, and whatever is in its way is found
//! while nothing runs. The delays lie between the starts.

use std::sync::Arc;
use std::time::Duration;

use model::{GroupName, PointRef, VmName};
use serde_json::{Value, json};

use super::{Meant, Place};
use crate::clock::rfc3339;
use crate::commands::Site;
use crate::control::Reporter;
use crate::exports::Shown;
use crate::failure::{Code, Failure};
use crate::points::skew_ms;
use crate::request::GroupFailover;

impl Site {
    pub(crate) async fn group_failover(
        self: &Arc<Self>,
        group: &GroupName,
        what: GroupFailover,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        match what {
            GroupFailover::Test { point, start } => {
                self.test_group(group, point.as_ref(), start, reporter).await
            }
            GroupFailover::EndTests => self.trials.end_group(group).await,
            GroupFailover::Planned { shut_down_s } => {
                self.planned_group(group, shut_down_s.map(Duration::from_secs), reporter).await
            }
            GroupFailover::Unplanned { point } => self.unplanned_group(group, point.as_ref()).await,
            GroupFailover::Cancel => self.cancel_group(group).await,
            GroupFailover::Complete => self.complete_group(group, reporter).await,
        }
    }

    async fn unplanned_group(&self, group: &GroupName, point: Option<&PointRef>) -> Result<Value, Failure> {
        let Meant { moment, places, _kept } = self.moment_meant(group, point)?;
        let mut members = Vec::new();
        for place in &places {
            let vm = &place.member.vm;
            let begun = self.unplanned(vm, Some(place.point.id.into())).await.map_err(|failure| {
                let next = format!(
                    "nothing is to be started yet: mend it and run 'afterimage failover unplanned --group {group} --point {}' again, or go back with 'afterimage failover cancel --group {group}'",
                    moment.id
                );
                stopped("failed over", &of(&places), members.len(), &next, failure)
            })?;
            members.push(json!({
                "vm": vm, "delay_s": place.member.delay_s, "point": begun["point"], "disks": begun["disks"],
            }));
        }
        Ok(json!({
            "group": group, "moment": moment.id, "taken_at": rfc3339(moment.at), "skew_ms": skew_ms(&moment),
            "members": members,
        }))
    }

    async fn cancel_group(&self, group: &GroupName) -> Result<Value, Failure> {
        let vms = self.members_here(group)?;
        // The last that was started first.
        let backwards: Vec<VmName> = vms.iter().rev().cloned().collect();
        let mut members = Vec::new();
        for vm in &backwards {
            let cancelled = self.cancel(vm).await.map_err(|failure| {
                let next = format!("mend it and run 'afterimage failover cancel --group {group}' again");
                stopped("taken back", &backwards, members.len(), &next, failure)
            })?;
            members.insert(0, cancelled);
        }
        Ok(json!({ "group": group, "vms": members }))
    }

    async fn complete_group(
        self: &Arc<Self>,
        group: &GroupName,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let vms = self.members_here(group)?;
        self.check_all_failed_over(group, &vms)?;
        let mut members = Vec::new();
        for vm in &vms {
            let completed = self.complete(vm, None, reporter).await.map_err(|failure| {
                let next = "those that are completed stay so; mend it, and complete the others each by itself \
                            ('afterimage failover complete VM')";
                stopped("completed", &vms, members.len(), next, failure)
            })?;
            members.push(completed);
        }
        Ok(json!({ "group": group, "members": members }))
    }

    /// One that is not failed over is found before the points of the others go.
    fn check_all_failed_over(&self, group: &GroupName, vms: &[VmName]) -> Result<(), Failure> {
        for vm in vms {
            let status = self.store.status(self.replica(vm)?)?;
            if !status.failover.is_some_and(|failover| failover.ready) {
                let message = format!(
                    "{vm} of group {group} is not failed over; fail the group over first ('afterimage failover unplanned --group {group}'), or complete the others each by itself"
                );
                return Err(Failure::new(Code::Failover, message));
            }
        }
        Ok(())
    }

    async fn test_group(
        &self,
        group: &GroupName,
        point: Option<&PointRef>,
        start: bool,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let Meant { moment, places, _kept } = self.moment_meant(group, point)?;
        let vms = of(&places);
        let mut shown = self.show_all(&places).await?.into_iter();
        let mut tests = Vec::new();
        for place in &places {
            let Some(disks) = shown.next() else { break };
            if start && !tests.is_empty() {
                self.wait_for_turn(place, reporter).await;
            }
            let vm = place.member.vm.clone();
            match self.trials.take_up(&self.checks, vm, Some(group.clone()), disks, start).await {
                Ok(test) => tests.push(test),
                Err(failure) => {
                    for disks in shown {
                        self.trials.discard(disks).await;
                    }
                    let next = format!(
                        "'afterimage failover end-test --group {group}' ends those that were begun; nothing of them stays"
                    );
                    return Err(stopped("begun", &vms, tests.len(), &next, failure));
                }
            }
        }
        Ok(json!({
            "group": group, "moment": moment.id, "taken_at": rfc3339(moment.at), "skew_ms": skew_ms(&moment),
            "tests": tests,
        }))
    }

    /// The disks of all, before anything is started from any of them.
    async fn show_all(&self, places: &[Place]) -> Result<Vec<Shown>, Failure> {
        let mut shown = Vec::new();
        for place in places {
            match self.trials.show(&place.member.vm, Some(place.point.id.into())).await {
                Ok(disks) => shown.push(disks),
                Err(failure) => {
                    for disks in shown {
                        self.trials.discard(disks).await;
                    }
                    let message = format!(
                        "{} cannot be shown, and nothing was begun: {}",
                        place.member.vm, failure.message
                    );
                    return Err(Failure { message, ..failure });
                }
            }
        }
        Ok(shown)
    }

    async fn wait_for_turn(&self, place: &Place, reporter: &Reporter) {
        let delay_s = place.member.delay_s;
        if delay_s > 0 {
            reporter.progress(format!("{} is started in {delay_s} s", place.member.vm), 0, 0);
            tokio::time::sleep(Duration::from_secs(delay_s)).await;
        }
    }

    async fn planned_group(
        &self,
        group: &GroupName,
        shut_down: Option<Duration>,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let status = match self.primary.group(group) {
            Ok(status) => status,
            Err(_) => {
                self.replica_group(group)?;
                let message = format!(
                    "the VMs of group {group} are replicas here; a planned failover begins at the site where they run, for nothing to be lost"
                );
                return Err(Failure::new(Code::NoSuchGroup, message));
            }
        };
        let members = &status.group.members;
        if shut_down.is_none() {
            for member in members {
                self.primary.check_off(&member.vm).await?;
            }
        }
        // As people shut them down: the last that was started first.
        let backwards: Vec<VmName> = members.iter().rev().map(|member| member.vm.clone()).collect();
        let mut handed = Vec::new();
        for (vm, member) in backwards.iter().zip(members.iter().rev()) {
            reporter.progress(format!("{vm} is handed over"), 0, 0);
            let one = self.planned(vm, shut_down).await.map_err(|failure| {
                let next = format!(
                    "nothing is lost: mend it and run the same command again to go on, or start {vm} here again and run 'afterimage failover cancel --group {group}' at {} to go back",
                    peer(&handed)
                );
                stopped("handed over", &backwards, handed.len(), &next, failure)
            })?;
            let shown = json!({
                "vm": vm, "delay_s": member.delay_s, "taken_at": one["taken_at"], "site": one["site"], "disks": one["disks"],
            });
            handed.insert(0, shown);
        }
        Ok(
            json!({ "group": group, "site": handed.first().map(|one| one["site"].clone()), "members": handed }),
        )
    }

    /// The members of a group, of which there must be replicas here.
    fn members_here(&self, group: &GroupName) -> Result<Vec<VmName>, Failure> {
        let found = self.replica_group(group)?;
        Ok(found.group.members.into_iter().map(|member| member.vm).collect())
    }
}

fn of(places: &[Place]) -> Vec<VmName> {
    places.iter().map(|place| place.member.vm.clone()).collect()
}

fn peer(handed: &[Value]) -> &str {
    handed.first().and_then(|one| one["site"].as_str()).unwrap_or("the replicas' site")
}

/// What was to be done with several VMs, one after the other, and came to its end at one of them.
fn stopped(done: &str, vms: &[VmName], at: usize, next: &str, failure: Failure) -> Failure {
    let list = |vms: &[VmName]| match vms {
        [] => "none".to_owned(),
        vms => vms.iter().map(VmName::as_str).collect::<Vec<_>>().join(", "),
    };
    let message = format!(
        "{} could not be {done}: {}. Done before it: {}; not tried: {}. To go on: {next}",
        vms.get(at).map_or("a VM", VmName::as_str),
        failure.message,
        list(&vms[..at.min(vms.len())]),
        list(vms.get(at + 1..).unwrap_or_default()),
    );
    Failure { message, ..failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_off_says_who_is_where_and_how_to_go_on() {
        let vms: Vec<VmName> = ["db", "web", "app"].map(|vm| vm.parse().unwrap()).into();
        let failure = Failure::transient(Code::Failover, "its files are held");
        let told = stopped("failed over", &vms, 1, "run it again", failure);
        assert_eq!(
            told.message,
            "web could not be failed over: its files are held. Done before it: db; not tried: app. To go on: run it again"
        );
        assert!(told.transient);
    }
}
