//! A night of many VMs: all of them are backed up at once under a policy, while each is replicated every 5 s; with views that
//! are refused while logs are applied, and with pinned ones.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use super::scale::Fleet;
use super::{Folder, PATIENCE, Sites};
use crate::peers::Restic;
use crate::table::{Table, Wanted};
use crate::{Arguments, say};

const INTERVAL_S: u64 = 5;
/// How long the night is.
const WINDOW: &str = "30m";

/// Refused while logs are applied, and not.
const VIEWS: [&str; 2] = ["strict", "pinned"];

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let vms = arguments.nightly_vms;
    let folder = Folder::new(arguments, "nightly")?;
    say(&format!("{vms} VMs: starting daemons, protecting"));
    let fleet = Fleet::start(&folder, vms)?;
    let repositories = VIEWS.map(|view| folder.join(view));
    for view in VIEWS {
        Restic::new(&folder.join(""), view, &folder.password()).init()?;
    }
    let sites = Sites::start(&folder, &repositories.each_ref().map(|path| path.as_path()))?;
    fleet.protect(&sites, INTERVAL_S)?;
    let _writer = fleet.write(INTERVAL_S);
    std::thread::sleep(Duration::from_secs(2 * INTERVAL_S));
    let mut nights = Vec::new();
    for view in VIEWS {
        nights.push((view, night(&sites, view, vms)?));
    }
    for (view, night) in &nights {
        let mut row = |what: &str, figure, unit, wanted| {
            table.figure(format!("{vms} VMs, {view} views: {what}"), figure, unit, wanted);
        };
        row(
            "backed up in the window",
            100.0 * night.in_window / vms as f64,
            "%",
            Some(Wanted::AtLeast(100.0)),
        );
        row("at the first try", 100.0 * night.first_try / vms as f64, "%", None);
        row(
            "collisions with an apply",
            night.collisions,
            "",
            (*view == "pinned").then_some(Wanted::AtMost(0.0)),
        );
        row("the whole night", night.seconds, "s", None);
    }
    table.note(&format!(
        "nightly: {vms} VMs, each replicated every {INTERVAL_S} s with 256 KiB changed in each interval, all due at one moment, a window of {WINDOW}; both sites, the storage daemons and the writer share this machine"
    ));
    Ok(())
}

/// What came of a night.
struct Night {
    in_window: f64,
    first_try: f64,
    collisions: f64,
    seconds: f64,
}

fn night(sites: &Sites, view: &str, vms: usize) -> anyhow::Result<Night> {
    say(&format!("{vms} VMs: a night with {view} views"));
    let policies = sites.replica.dir().join("policies");
    std::fs::create_dir_all(&policies)?;
    // Due on one day of the year: the night begins when it is told to.
    let policy = format!(
        "vms = \"*\"\nschedule = \"0 0 1 1 *\"\nwindow = \"{WINDOW}\"\nview = \"{view}\"\nrepository = \"{view}\"\n"
    );
    std::fs::write(policies.join(format!("{view}.toml")), policy)?;
    let began = Instant::now();
    sites.replica.ok(&["policy", "run", view])?;
    let shown = rig::wait_for("the night to end", PATIENCE, || {
        std::thread::sleep(Duration::from_secs(1));
        let shown = sites.replica.ok(&["policy", "show", view])?;
        let ended = sum(&shown, |vm| vm["ended"].as_f64());
        Ok((ended.is_some_and(|ended| ended >= vms as f64)).then_some(shown))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let figure = |of: &str| sum(&shown, |vm| vm[of].as_f64()).with_context(|| format!("no {of} in {shown}"));
    let collisions = sum(&shown, |vm| Some(vm["setbacks"]["apply-in-progress"].as_f64().unwrap_or(0.0)));
    Ok(Night {
        in_window: figure("in_window")?,
        first_try: figure("first_try")?,
        collisions: collisions.context("no VMs")?,
        seconds,
    })
}

fn sum(shown: &Value, of: impl Fn(&Value) -> Option<f64>) -> Option<f64> {
    shown["vms"].as_array()?.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_figure_that_one_vm_lacks_is_none() {
        let shown = json!({"vms": [{"done": 1}, {"done": 2}]});
        assert_eq!(sum(&shown, |vm| vm["done"].as_f64()), Some(3.0));
        assert_eq!(sum(&shown, |vm| vm["ended"].as_f64()), None);
    }
}
