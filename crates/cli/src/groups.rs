//! Groups on the command line: what is asked for, what there is to say, and the starts of a group's VMs.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use model::group::GroupMember;
use model::{GroupName, NameError, VmName};
use serde_json::{Value, json};
use site::{Code, FailoverRequest, Failure, GroupFailover, GroupRequest, Request};

use crate::args::{Command, Failover, Group, Starts, Target};
use crate::failover::{disks, test};
use crate::show::{backup, list, moment, number, table, text};

/// What a command is for.
pub enum Aim {
    Vm(VmName),
    Group(GroupName),
}

/// The parser lets exactly one of the two through.
pub fn target(target: &Target) -> Result<Aim, Failure> {
    match (&target.vm, &target.group) {
        (Some(vm), None) => Ok(Aim::Vm(vm.clone())),
        (None, Some(group)) => Ok(Aim::Group(group.clone())),
        _ => Err(Failure::new(Code::Usage, "name a VM, or a group with --group")),
    }
}

/// `web`, `web:30s` or `web:30`.
pub fn member(text: &str) -> Result<GroupMember, String> {
    let (vm, delay) = match text.split_once(':') {
        Some((vm, delay)) => (vm, Some(delay)),
        None => (text, None),
    };
    let vm = vm.parse::<VmName>().map_err(|error| error.to_string())?;
    let delay_s = match delay {
        None => 0,
        Some(delay) => match (delay.parse::<u64>(), humantime::parse_duration(delay)) {
            (Ok(seconds), _) => seconds,
            (_, Ok(delay)) if delay.subsec_nanos() == 0 => delay.as_secs(),
            _ => return Err(format!("{delay:?} is no delay in whole seconds, such as 30s or 2min")),
        },
    };
    Ok(GroupMember { vm, delay_s })
}

/// What is asked of the site.
pub fn request(group: &Group) -> GroupRequest {
    match group {
        Group::Create { name, members, every } => GroupRequest::Create {
            group: name.clone(),
            members: members.clone(),
            every_s: every.map(|every| every.as_secs()),
        },
        Group::List => GroupRequest::List,
        Group::Show { name } => GroupRequest::Show { group: name.clone() },
        Group::Remove { name } => GroupRequest::Remove { group: name.clone() },
    }
}

/// What came of it, for a person.
pub fn shown(request: &GroupRequest, answer: &Value) -> String {
    match request {
        GroupRequest::Create { group, .. } => {
            format!("The VMs of group {group} are fixed at one moment from now on.\n\n{}", one(answer))
        }
        GroupRequest::List => groups(list(&answer["groups"])),
        GroupRequest::Show { .. } => one(answer),
        GroupRequest::Remove { group } => {
            format!("Group {group} is removed. Its VMs stay protected, each by itself.")
        }
        GroupRequest::Points { .. } => moments(list(&answer["moments"])),
        GroupRequest::Sync { group } => format!("Group {group}: {}", of_moment(answer)),
        GroupRequest::Backup { group, .. } => {
            let mut shown = format!("Group {group} at {}:\n", moment(&answer["taken_at"]));
            for one in list(&answer["backups"]) {
                shown.push_str(&backup(text(&one["vm"]), one));
            }
            shown
        }
    }
}

/// What came of a failover of a group, for a person.
pub fn failover(group: &GroupName, what: &GroupFailover, answer: &Value) -> String {
    match what {
        GroupFailover::Test { .. } => {
            let tests: Vec<String> = list(&answer["tests"]).iter().map(test).collect();
            format!(
                "{}\n'afterimage failover end-test --group {group}' ends them; nothing of them stays.",
                tests.join("\n")
            )
        }
        GroupFailover::EndTests => {
            format!("{} test failovers of {group} are ended.", list(&answer["tests"]).len())
        }
        GroupFailover::Unplanned { .. } => unplanned(group, answer),
        GroupFailover::Planned { .. } => format!(
            "The VMs of group {group} are off here, and everything is at {}. Start them there, in this order:\n{}\
             When they run, 'afterimage failover reverse VM --qmp SOCKET' there replicates each back to here.",
            text(&answer["site"]),
            in_order(list(&answer["members"]))
        ),
        GroupFailover::Cancel => {
            format!("The failover of group {group} is taken back; its VMs are replicated again.")
        }
        GroupFailover::Complete => format!(
            "The failover of all VMs of group {group} is final. Their logs are being folded in; after that the disks need \
             nothing of\nAfterimage any more as soon as each VM is started anew, or at once with 'failover complete VM --qmp SOCKET'."
        ),
    }
}

fn unplanned(group: &GroupName, answer: &Value) -> String {
    let members = list(&answer["members"]);
    let are_started = members.iter().any(|member| member["started"] == true);
    let asked = if are_started { "They were started in this order" } else { "Start them in this order" };
    format!(
        "The VMs of group {group} are failed over to the moment of {} ({}).\n{asked}:\n{}\
         The replicas take no logs now. 'afterimage failover cancel --group {group}' goes back, and drops what is written\n\
         meanwhile; 'afterimage failover complete --group {group}' makes it final. Until then every recovery point stays.",
        moment(&answer["taken_at"]),
        apart(answer),
        in_order(members)
    )
}

/// The VMs one after the other, and what each is started from.
fn in_order(members: &[Value]) -> String {
    let mut shown = String::new();
    for (place, member) in members.iter().enumerate() {
        let later = match member["delay_s"].as_u64() {
            Some(1..) if place > 0 => format!(", {} s later", number(&member["delay_s"])),
            _ => String::new(),
        };
        let _ =
            writeln!(shown, "{}. {}{later}\n{}", place + 1, text(&member["vm"]), disks(member).trim_end());
    }
    shown
}

fn groups(groups: &[Value]) -> String {
    let rows: Vec<_> = groups
        .iter()
        .map(|group| {
            let members: Vec<&str> =
                list(&group["members"]).iter().map(|member| text(&member["vm"])).collect();
            let newest = newest(group);
            vec![
                text(&group["name"]).to_owned(),
                text(&group["role"]).to_owned(),
                text(&group["peer"]).to_owned(),
                members.join(", "),
                format!("{} s", number(&group["interval_s"])),
                moment(&newest["at"]),
                if newest.is_null() { "-".into() } else { apart(newest) },
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No group is known here; 'afterimage group create' makes one.".into();
    }
    table(&["GROUP", "ROLE", "PEER", "VMS", "EVERY", "NEWEST MOMENT", "APART"], &rows)
}

/// The newest moment that is worth showing: at the replicas' site one that is complete.
fn newest(group: &Value) -> &Value {
    if group["last_complete"].is_object() { &group["last_complete"] } else { &group["last"] }
}

fn one(group: &Value) -> String {
    let mut shown = groups(std::slice::from_ref(group));
    shown.push('\n');
    let rows: Vec<_> = list(&group["members"])
        .iter()
        .enumerate()
        .map(|(place, member)| {
            let delay = member["delay_s"].as_u64().unwrap_or(0);
            vec![
                (place + 1).to_string(),
                text(&member["vm"]).to_owned(),
                if delay == 0 { "-".into() } else { format!("{delay} s") },
                text(&member["state"]).to_owned(),
                text(&member["health"]).to_owned(),
            ]
        })
        .collect();
    shown.push_str(&table(&["START", "VM", "DELAY", "STATE", "HEALTH"], &rows));
    if group["last"].is_object() {
        let _ = write!(shown, "\nNewest moment: {}", of_moment(&group["last"]));
    }
    shown
}

/// "2.31 ms": how far apart the points of a moment lie at the most.
fn apart(of: &Value) -> String {
    if of["members"].as_array().is_some_and(Vec::is_empty) {
        return "nobody was fixed".into();
    }
    of["skew_ms"].as_f64().map_or_else(|| "-".into(), |ms| format!("at most {ms:.1} ms apart"))
}

fn of_moment(moment_of: &Value) -> String {
    let id: String = text(&moment_of["id"]).chars().take(8).collect();
    let mut shown = format!("moment {id} of {}, {}", moment(&moment_of["at"]), apart(moment_of));
    let missing = list(&moment_of["missing"]);
    if !missing.is_empty() {
        let _ = write!(shown, "; INCOMPLETE, without {}", missing_text(missing));
    }
    shown
}

fn missing_text(missing: &[Value]) -> String {
    let one = |missing: &Value| format!("{} ({})", text(&missing["vm"]), text(&missing["why"]));
    missing.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn moments(moments: &[Value]) -> String {
    let rows: Vec<_> = moments
        .iter()
        .map(|of| {
            let missing = list(&of["missing"]);
            let whole =
                if missing.is_empty() { "yes".into() } else { format!("no: {}", missing_text(missing)) };
            vec![
                text(&of["id"]).to_owned(),
                moment(&of["at"]),
                of["skew_ms"].as_f64().map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms")),
                text(&of["consistency"]).to_owned(),
                whole,
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No moment of this group has arrived yet.".into();
    }
    table(&["MOMENT", "TAKEN AT", "APART", "CONSISTENCY", "COMPLETE"], &rows)
}

/// Starts the VMs of a group that was failed over, if a command was given for that: in their order, each so long after
/// the one before was started.
pub async fn start_all(dir: &Path, command: &Command, answer: &mut Value) -> Result<(), Failure> {
    let Command::Failover(Failover::Unplanned { target, starts: Starts { start, start_with, from }, .. }) =
        command
    else {
        return Ok(());
    };
    if target.group.is_none() || !(*start || start_with.is_some()) {
        return Ok(());
    }
    let group = target.group.as_ref().map_or("", GroupName::as_str);
    let context =
        [("AFTERIMAGE_GROUP", group.to_owned()), ("AFTERIMAGE_MOMENT", text(&answer["moment"]).to_owned())];
    let Some(members) = answer["members"].as_array_mut() else { return Ok(()) };
    let names: Vec<String> = members.iter().map(|member| text(&member["vm"]).to_owned()).collect();
    let first = match from {
        None => 0,
        Some(from) => names.iter().position(|vm| vm == from.as_str()).ok_or_else(|| {
            Failure::new(
                Code::NoSuchVm,
                format!("{from} is not in group {group}: its VMs are {}", names.join(", ")),
            )
        })?,
    };
    for (place, member) in members.iter_mut().enumerate().skip(first) {
        let delay_s = member["delay_s"].as_u64().filter(|_| place > first).unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(delay_s)).await;
        let started = match start_with {
            Some(command) => run(command, &context, member),
            None => start_here(dir, &names[place], member).await,
        };
        started.map_err(|why| {
            let vm = &names[place];
            let message = format!(
                "{vm} was not started: {why}. Started before it: {}; not tried: {}. All are failed over: mend it and run the same command again with '--from {vm}', or stop those that run and go back with 'afterimage failover cancel --group {group}'",
                or_none(&names[..place]),
                or_none(&names[place + 1..])
            );
            Failure::new(Code::Failover, message)
        })?;
        member["started"] = json!(true);
    }
    Ok(())
}

/// Has the site start one VM.
async fn start_here(dir: &Path, vm: &str, member: &mut Value) -> Result<(), String> {
    let vm = vm.parse().map_err(|error: NameError| error.to_string())?;
    let request = Request::Failover(FailoverRequest::Start { vm, only_show: false });
    member["machine"] = site::ask(dir, &request, |_| {}).await.map_err(|failure| failure.message)?;
    Ok(())
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// Runs the command for one VM. What it says goes to standard error: standard output is the answer's.
fn run(start: &str, context: &[(&str, String)], member: &Value) -> Result<(), String> {
    let status = std::process::Command::new("sh")
        .args(["-c", start])
        .envs(context.iter().map(|(name, value)| (*name, value.as_str())))
        .env("AFTERIMAGE_VM", text(&member["vm"]))
        .env("AFTERIMAGE_DISKS", member["disks"].to_string())
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .map_err(|error| format!("sh cannot be run: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the command ended with {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_may_have_a_delay() {
        let read = |text: &str| member(text).map(|member| (member.vm.to_string(), member.delay_s));
        assert_eq!(read("db"), Ok(("db".into(), 0)));
        assert_eq!(
            (read("web:30s"), read("web:30"), read("web:2min")),
            (Ok(("web".into(), 30)), Ok(("web".into(), 30)), Ok(("web".into(), 120)))
        );
        for bad in ["", "a b", "web:", "web:soon", "web:10ms"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_incomplete_moment_says_who_is_missing() {
        let of = json!({ "id": "abcdef0123", "at": "2026-11-24T21:00:12Z", "skew_ms": 2.34, "consistency": "crash",
            "missing": [{ "vm": "web", "why": "it is paused" }] });
        let shown = moments(std::slice::from_ref(&of));
        assert!(shown.contains("2.3 ms") && shown.contains("no: web (it is paused)"), "{shown}");
        assert!(of_moment(&of).ends_with("INCOMPLETE, without web (it is paused)"));
    }
}
