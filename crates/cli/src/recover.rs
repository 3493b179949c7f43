//! The command `recover`: what is asked for, and what there is to say of it.

use serde_json::Value;
use site::{Failure, RecoverRequest};

use crate::absolute;
use crate::args::Recover;
use crate::failover::{command, disks, networks};
use crate::show::{list, moment, text};

/// What is asked of the site.
pub fn request(recover: &Recover) -> Result<RecoverRequest, Failure> {
    Ok(match recover {
        Recover::Start { vm, backup, repository, connect, show } => RecoverRequest::Start(site::Recover {
            vm: vm.clone(),
            backup: backup.clone(),
            repository: repository.repository.clone(),
            connect: *connect,
            only_show: *show,
        }),
        Recover::Move { vm, to } => RecoverRequest::Move { vm: vm.clone(), to: absolute(to)? },
        Recover::Stop(stop) => RecoverRequest::Stop { vm: stop.vm.clone(), within_s: stop.within_s() },
        Recover::Drop { vm } => RecoverRequest::Drop { vm: vm.clone() },
        Recover::List => RecoverRequest::List,
    })
}

/// What came of it, for a person.
pub fn shown(request: &RecoverRequest, answer: &Value) -> String {
    match request {
        RecoverRequest::Start(start) if start.only_show => {
            format!("{} would be started so:\n  {}\n{}", start.vm, command(answer), networks(answer))
        }
        RecoverRequest::Start(start) => {
            let vm = &start.vm;
            let next = match answer["moved"] == true {
                true => String::new(),
                false => format!(
                    "\nIt reads the backup until 'afterimage recover move {vm} --to DIR' has moved it to files of its own;\n\
                     'afterimage recover drop {vm}' ends it, and drops what it has written."
                ),
            };
            format!("{}\n{}{next}", one(answer), networks(answer))
        }
        RecoverRequest::Move { vm, .. } => {
            format!("{vm} needs nothing of Afterimage any more; it runs from:\n{}", disks(answer))
        }
        RecoverRequest::Stop { vm, .. } => format!("{vm} does not run any more."),
        RecoverRequest::Drop { vm } => match answer["moved"] == true {
            true => format!("{vm} is not known here any more; its disks are in {}.", text(&answer["to"])),
            false => format!("The recovery of {vm} is gone, with all that was written in it."),
        },
        RecoverRequest::List => {
            let recoveries: Vec<String> = list(&answer["recoveries"]).iter().map(one).collect();
            if recoveries.is_empty() { "No VM is recovered here.".into() } else { recoveries.join("\n\n") }
        }
    }
}

fn one(answer: &Value) -> String {
    let cell = |key: &str| text(&answer[key]);
    let runs = match answer["process"].as_u64() {
        Some(process) => format!("runs (process {process})"),
        None => "does not run".into(),
    };
    let from = match answer["moved"] == true {
        true => format!("from {}", cell("to")),
        false => format!("from backup {}", cell("backup").get(..8).unwrap_or_default()),
    };
    format!(
        "{} {runs} {from}, as it was at {}.\n  screen   vnc+unix://{}\n  console  {}\n  monitor  {}",
        cell("vm"),
        moment(&answer["taken_at"]),
        cell("screen"),
        cell("console"),
        cell("qmp")
    )
}
