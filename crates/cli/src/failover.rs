//! The command `failover`: what is asked for, and what there is to say of it.

use std::fmt::Write as _;

use model::GroupName;
use serde_json::Value;
use site::{FailoverRequest, Failure, GroupFailover};

use crate::absolute;
use crate::args::Failover;
use crate::groups::{self, Aim};
use crate::show::{list, moment, relationships, text};

/// What is asked of the site.
pub fn request(failover: &Failover) -> Result<FailoverRequest, Failure> {
    let together = |group: GroupName, what| FailoverRequest::Group { group, what };
    Ok(match failover {
        Failover::Test { target, point, disks_only } => {
            let (point, start) = (point.clone(), !disks_only);
            match groups::target(target)? {
                Aim::Vm(vm) => FailoverRequest::Test { vm, point, start },
                Aim::Group(group) => together(group, GroupFailover::Test { point, start }),
            }
        }
        Failover::EndTest { test, group } => match (test, group) {
            (_, Some(group)) => together(group.clone(), GroupFailover::EndTests),
            (test, None) => FailoverRequest::EndTest { test: test.clone().unwrap_or_default() },
        },
        Failover::Tests { vm } => FailoverRequest::Tests { vm: vm.clone() },
        Failover::Planned { target, shutdown } => {
            let shut_down_s = shutdown.map(|patience| patience.as_secs().max(1));
            match groups::target(target)? {
                Aim::Vm(vm) => FailoverRequest::Planned { vm, shut_down_s },
                Aim::Group(group) => together(group, GroupFailover::Planned { shut_down_s }),
            }
        }
        Failover::Start { vm, show } => FailoverRequest::Start { vm: vm.clone(), only_show: *show },
        Failover::Stop(stop) => FailoverRequest::Stop { vm: stop.vm.clone(), within_s: stop.within_s() },
        Failover::Unplanned { target, point, starts } => {
            let point = point.clone();
            match groups::target(target)? {
                Aim::Vm(vm) => FailoverRequest::Unplanned { vm, point, start: starts.start },
                // They are started one after the other, when all are failed over.
                Aim::Group(group) => together(group, GroupFailover::Unplanned { point }),
            }
        }
        Failover::Cancel { target } => match groups::target(target)? {
            Aim::Vm(vm) => FailoverRequest::Cancel { vm },
            Aim::Group(group) => together(group, GroupFailover::Cancel),
        },
        Failover::Complete { target, qmp } => match groups::target(target)? {
            Aim::Vm(vm) => FailoverRequest::Complete { vm, qmp: qmp.as_deref().map(absolute).transpose()? },
            Aim::Group(group) => together(group, GroupFailover::Complete),
        },
        Failover::Reverse { vm, qmp, nbd, to, every, guest_agent } => {
            FailoverRequest::Reverse(Box::new(site::Reverse {
                vm: vm.clone(),
                qmp: qmp.as_deref().map(absolute).transpose()?,
                nbd: nbd.as_deref().map(absolute).transpose()?,
                to: to.clone(),
                every_s: every.map(|every| every.as_secs()),
                guest_agent: guest_agent.as_deref().map(absolute).transpose()?,
            }))
        }
    })
}

/// What came of it, for a person.
pub fn shown(request: &FailoverRequest, answer: &Value) -> String {
    match request {
        FailoverRequest::Test { .. } => format!(
            "{}\n'afterimage failover end-test {}' ends it; nothing of it stays.",
            test(answer),
            text(&answer["test"])
        ),
        FailoverRequest::EndTest { test } => format!("The test failover {test} is ended."),
        FailoverRequest::Tests { .. } => {
            let tests: Vec<String> = list(&answer["tests"]).iter().map(test).collect();
            if tests.is_empty() { "No test failover is open.".into() } else { tests.join("\n\n") }
        }
        FailoverRequest::Unplanned { vm, start: true, .. } => format!(
            "{vm} is failed over to the point of {}. {}\n\n\
             The replica takes no logs now. 'afterimage failover cancel {vm}' ends the VM and goes back, and drops what it has written;\n\
             'afterimage failover complete {vm}' makes it final. Until then every recovery point stays.",
            moment(&answer["taken_at"]),
            machine(&answer["machine"])
        ),
        FailoverRequest::Start { vm, only_show: true } => {
            format!("{vm} would be started so:\n  {}\n{}", command(answer), networks(answer))
        }
        FailoverRequest::Start { .. } => machine(answer),
        FailoverRequest::Stop { vm, .. } => format!("{vm} does not run any more."),
        FailoverRequest::Unplanned { vm, .. } => format!(
            "Start the VM with these disks (the point of {}):\n{}\n\
             The replica takes no logs now. 'afterimage failover cancel {vm}' goes back, and drops what is written meanwhile;\n\
             'afterimage failover complete {vm}' makes it final. Until then every recovery point stays.",
            moment(&answer["taken_at"]),
            disks(answer)
        ),
        FailoverRequest::Planned { vm, .. } => format!(
            "{vm} is off here, and everything is at {} (the point of {}). Start it there, with 'afterimage failover start {vm}' or\n\
             with these disks:\n{}\n\
             When it runs, 'afterimage failover reverse {vm}' there replicates it back to here.",
            text(&answer["site"]),
            moment(&answer["taken_at"]),
            disks(answer)
        ),
        FailoverRequest::Complete { vm, .. } if answer["released"] == true => {
            format!("The failover of {vm} is final, and its disks need nothing of Afterimage any more.")
        }
        FailoverRequest::Complete { vm, .. } => format!(
            "The failover of {vm} is final. Its logs are being folded in; after that its disks need nothing of Afterimage\n\
             any more as soon as the VM is started anew, or at once with '--qmp SOCKET'. 'afterimage status {vm}' tells."
        ),
        FailoverRequest::Group { group, what } => groups::failover(group, what, answer),
        FailoverRequest::Cancel { .. } | FailoverRequest::Reverse(_) => {
            relationships(std::slice::from_ref(answer))
        }
    }
}

pub fn test(answer: &Value) -> String {
    let cell = |key: &str| text(&answer[key]);
    let mut shown = format!("Test failover {} of {} (point {}):", cell("test"), cell("vm"), cell("point"));
    for disk in list(&answer["disks"]) {
        let _ = write!(shown, "\n  {}  {}", text(&disk["name"]), text(&disk["uri"]));
    }
    match (answer["running"].as_bool(), answer["vnc"].as_str()) {
        (Some(true), Some(vnc)) => {
            let _ = write!(shown, "\n  it runs, without a network; its screen: vnc+unix://{vnc}");
        }
        (Some(true), None) => shown.push_str("\n  it runs, without a network"),
        (_, Some(_)) => shown.push_str("\n  its QEMU has ended"),
        _ => {}
    }
    shown
}

/// A VM that was started.
fn machine(answer: &Value) -> String {
    let cell = |key: &str| text(&answer[key]);
    format!(
        "It runs (process {}), and goes on without us.\n  screen   vnc+unix://{}\n  console  {}\n  monitor  {}\n{}",
        answer["process"],
        cell("screen"),
        cell("console"),
        cell("qmp"),
        networks(answer)
    )
}

pub fn networks(answer: &Value) -> String {
    let networks = list(&answer["networks"]).iter().map(|card| {
        let (mac, network, to) = (text(&card["mac"]), text(&card["network"]), text(&card["to"]));
        match to {
            "none" => format!(
                "  network  {mac}: no cable; name what '{network}' is here under [networks] of config.toml"
            ),
            _ => format!("  network  {mac}: {to} (was '{network}')"),
        }
    });
    networks.collect::<Vec<_>>().join("\n")
}

/// A command line as a shell takes it.
pub fn command(answer: &Value) -> String {
    let quoted = |word: &Value| {
        let word = text(word);
        let is_plain =
            !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,+".contains(c));
        if is_plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    list(&answer["command"]).iter().map(quoted).collect::<Vec<_>>().join(" ")
}

pub fn disks(answer: &Value) -> String {
    let mut shown = String::new();
    for disk in list(&answer["disks"]) {
        let _ = writeln!(shown, "  {}  {}", text(&disk["name"]), text(&disk["path"]));
    }
    shown
}
