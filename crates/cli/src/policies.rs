//! Policies and the report on the command line.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Args, Subcommand};
use model::{PolicyName, VmName};
use serde_json::{Value, json};
use site::{Code, Config, Failure, PolicyRequest, Request};

use crate::Said;
use crate::show::{bytes, list, moment, number, seconds, table, text};

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Write a policy to begin with, as a file with every setting explained.
    New {
        name: PolicyName,
        /// The VMs that it is for: names; '*' for anything, commas between.
        #[arg(long, default_value = "*", value_name = "PATTERNS")]
        vms: String,
        /// When backups are due, every day.
        #[arg(long, default_value = "22:00", value_name = "HH:MM")]
        at: String,
        /// The repository, by its name in the config.
        #[arg(long, default_value = site::LOCAL_REPOSITORY)]
        repository: String,
    },
    /// The policies there are, and whether they can be used.
    List,
    /// One policy: its VMs, how they stand, and what comes next.
    Show { name: PolicyName },
    /// What its retention would keep and forget now.
    Plan {
        name: PolicyName,
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// Back its VMs up now, whatever is due.
    Run {
        name: PolicyName,
        /// One VM only.
        vm: Option<VmName>,
    },
}

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Who has the backups that are promised, who is at risk and whose promise is broken, and why. Exits with 1 if one is
    /// broken.
    Report(Report),
}

#[derive(Debug, Args)]
pub struct Report {
    /// How far back jobs are counted.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=3660))]
    pub days: u32,
    /// A line for each VM, for a spreadsheet.
    #[arg(long, conflicts_with = "html")]
    pub csv: bool,
    /// A page that stands by itself.
    #[arg(long)]
    pub html: bool,
}

/// What is asked of the site; `new` is not.
pub fn request(policy: &Policy) -> Result<PolicyRequest, Failure> {
    Ok(match policy {
        Policy::New { .. } => {
            return Err(Failure::new(Code::Internal, "this command is not for a running site"));
        }
        Policy::List => PolicyRequest::List,
        Policy::Show { name } => PolicyRequest::Show { policy: name.clone() },
        Policy::Plan { name, vm } => PolicyRequest::Plan { policy: name.clone(), vm: vm.clone() },
        Policy::Run { name, vm } => PolicyRequest::Run { policy: name.clone(), vm: vm.clone() },
    })
}

/// Writes a new policy's file.
pub fn write(dir: &Path, name: &PolicyName, vms: &str, at: &str, repository: &str) -> Result<Said, Failure> {
    let config = Config::load(dir)?;
    config.repository(dir, repository)?;
    let text = site::policy_template(vms, at, repository)?;
    let folder = dir.join("policies");
    let path = folder.join(format!("{name}.toml"));
    std::fs::create_dir_all(&folder).map_err(|error| Failure::io("make the folder", &folder, &error))?;
    let file = std::fs::File::create_new(&path);
    let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Failure::new(Code::Exists, format!("there is a policy {name} already: {}", path.display()))
        }
        _ => Failure::io("write", &path, &error),
    })?;
    let shown = format!(
        "Policy {name} is in {}.\nA running site takes it up within seconds: 'afterimage policy show {name}'.",
        path.display()
    );
    Ok(Said::new(json!({ "policy": name, "path": path }), shown))
}

/// What came of it, for a person.
pub fn shown(request: &PolicyRequest, answer: &Value) -> String {
    match request {
        PolicyRequest::List => policies(list(&answer["policies"])),
        PolicyRequest::Show { .. } => policy(answer),
        PolicyRequest::Plan { .. } => plan(answer),
        PolicyRequest::Run { policy, .. } => {
            let what = match list(&answer["jobs"]).len() {
                0 => "No backup is begun; all are under way".to_owned(),
                1 => "One backup is begun".to_owned(),
                made => format!("{made} backups are begun"),
            };
            format!(
                "{what}: 'afterimage jobs' shows them, 'afterimage policy show {policy}' what came of them."
            )
        }
    }
}

fn policies(policies: &[Value]) -> String {
    if policies.is_empty() {
        return "There is no policy; 'afterimage policy new nightly' writes one to begin with.".into();
    }
    let (broken, usable): (Vec<_>, Vec<_>) = policies.iter().partition(|policy| policy["error"].is_string());
    let row = |policy: &&Value| {
        vec![
            text(&policy["name"]).to_owned(),
            number(&policy["vms"]),
            moment(&policy["next_start"]),
            moment(&policy["deadline"]),
            text(&policy["repository"]).to_owned(),
            seconds(&policy["promise_s"]),
        ]
    };
    let rows: Vec<_> = usable.iter().map(row).collect();
    let mut shown = if rows.is_empty() {
        String::new()
    } else {
        table(&["POLICY", "VMS", "NEXT", "UNTIL", "REPOSITORY", "PROMISE"], &rows)
    };
    for policy in broken {
        let _ =
            writeln!(shown, "Policy {} cannot be used: {}", text(&policy["name"]), text(&policy["error"]));
    }
    shown
}

fn policy(answer: &Value) -> String {
    let vms = list(&answer["vms"]);
    let mut shown = format!(
        "Policy {}: next at {}, tried until {}, into {}\n",
        text(&answer["name"]),
        moment(&answer["next_start"]),
        moment(&answer["deadline"]),
        text(&answer["repository"])
    );
    if vms.is_empty() {
        return shown + "It selects no replica of this site.";
    }
    shown.push('\n');
    shown.push_str(&of_vms(vms));
    shown
}

/// Name, policy, promise, age, when the next one is there, jobs with a backup, those at the first try.
fn columns(vm: &Value) -> [String; 7] {
    [
        text(&vm["vm"]).to_owned(),
        text(&vm["policy"]).to_owned(),
        standing(vm).to_owned(),
        vm["age_s"].as_u64().map_or_else(|| "-".into(), age),
        moment(&vm["expected_by"]),
        format!("{}/{}", number(&vm["done"]), number(&vm["ended"])),
        number(&vm["first_try"]),
    ]
}

fn of_vms(vms: &[Value]) -> String {
    let rows: Vec<_> = vms.iter().map(|vm| columns(vm).to_vec()).collect();
    let mut shown = table(&["VM", "POLICY", "PROMISE", "AGE", "NEXT BY", "DONE", "FIRST TRY"], &rows);
    for vm in vms.iter().filter(|vm| vm["why"].is_string()) {
        let _ = write!(shown, "\n{}: {}", text(&vm["vm"]), text(&vm["why"]));
        let refused: Vec<String> = list(&vm["refused"])
            .iter()
            .map(|one| format!("{} {}", moment(&one["at"]), text(&one["by"])))
            .collect();
        if !refused.is_empty() {
            let _ = write!(shown, "\n  refused: {}", refused.join(", "));
        }
    }
    shown
}

fn standing(vm: &Value) -> &str {
    vm["standing"].as_str().unwrap_or("none")
}

fn age(seconds: u64) -> String {
    model::human_duration(std::time::Duration::from_secs(seconds)).to_string()
}

fn plan(answer: &Value) -> String {
    let mut shown = String::new();
    for vm in list(&answer["vms"]) {
        let backups = list(&vm["backups"]);
        let rows: Vec<_> = backups
            .iter()
            .map(|backup| {
                let by: Vec<&str> = list(&backup["kept_by"]).iter().map(text).collect();
                vec![
                    short(text(&backup["backup"])),
                    moment(&backup["taken_at"]),
                    bytes(&backup["bytes_added"]),
                    if by.is_empty() { "forgotten".into() } else { format!("kept: {}", by.join(", ")) },
                ]
            })
            .collect();
        let kept = backups.iter().filter(|backup| backup["kept"] == true).count();
        let _ = writeln!(
            shown,
            "{} in {}: {kept} of {} kept",
            text(&vm["vm"]),
            text(&answer["repository"]),
            backups.len()
        );
        if !rows.is_empty() {
            let _ = writeln!(shown, "{}", table(&["BACKUP", "TAKEN AT", "ADDED", "VERDICT"], &rows));
        }
    }
    if shown.is_empty() { "The policy selects no replica of this site.".into() } else { shown }
}

fn short(id: &str) -> String {
    id.chars().take(8).collect()
}

/// The report, for a person.
pub fn report(answer: &Value) -> String {
    let all = &answer["all"];
    let mut shown = format!(
        "Promises: {} kept, {} at risk, {} broken\nJobs of the last {} days: {} ended, {} with a backup, {} at the first try, {} in their window, {} open\n",
        number(&answer["kept"]),
        number(&answer["at_risk"]),
        number(&answer["broken"]),
        number(&answer["days"]),
        number(&all["ended"]),
        number(&all["done"]),
        number(&all["first_try"]),
        number(&all["in_window"]),
        number(&all["open"])
    );
    let setbacks = all["setbacks"]
        .as_object()
        .map(|setbacks| setbacks.iter().map(|(by, count)| format!("{by} {count}")).collect::<Vec<_>>());
    if let Some(setbacks) = setbacks.filter(|setbacks| !setbacks.is_empty()) {
        let _ = writeln!(shown, "Attempts that were refused: {}", setbacks.join(", "));
    }
    let vms = list(&answer["vms"]);
    if !vms.is_empty() {
        let _ = write!(shown, "\n{}", of_vms(vms));
    }
    let without: Vec<&str> = list(&answer["without_policy"]).iter().map(text).collect();
    if !without.is_empty() {
        let _ = write!(shown, "\nNo policy is for: {}", without.join(", "));
    }
    for (name, why) in answer["unusable_policies"].as_object().into_iter().flatten() {
        let _ = write!(shown, "\nPolicy {name} cannot be used: {}", text(why));
    }
    shown
}

/// The columns of the comma-separated form, by their names in the JSON form. New ones come last.
const COLUMNS: &[&str] = &[
    "vm",
    "peer",
    "policy",
    "repository",
    "promise_s",
    "standing",
    "why",
    "backup",
    "taken_at",
    "age_s",
    "expected_by",
    "ended",
    "done",
    "first_try",
    "in_window",
    "open",
    "last_error",
];

/// The report, for a spreadsheet.
pub fn csv(answer: &Value) -> String {
    crate::measurements::csv_lines(COLUMNS, list(&answer["vms"]))
}

/// The report as a page.
pub fn html(answer: &Value) -> String {
    let rows: String = list(&answer["vms"])
        .iter()
        .map(|vm| {
            let [name, rest @ ..] = columns(vm);
            let (peer, why) =
                (text(&vm["peer"]).to_owned(), vm["why"].as_str().unwrap_or_default().to_owned());
            let cells = [name, peer].into_iter().chain(rest).chain([why]);
            let cells: String = cells.map(|cell| format!("<td>{}</td>", escaped(&cell))).collect();
            format!("<tr class=\"{}\">{cells}</tr>\n", escaped(standing(vm)))
        })
        .collect();
    let days: String = answer["by_day"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(day, count)| {
            let cells = ["ended", "done", "first_try", "in_window"]
                .map(|of| format!("<td>{}</td>", number(&count[of])));
            format!("<tr><td>{}</td>{}</tr>\n", escaped(day), cells.concat())
        })
        .collect();
    format!(
        r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Backups</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2430; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.sums span {{ display: inline-block; min-width: 7rem; margin-right: 1rem; padding: .5rem .8rem; border-radius: .4rem; background: #eef1f5; }}
.sums b {{ font-size: 1.5rem; display: block; }}
.sums .bad {{ background: #fbe3e1; }} .sums .risk {{ background: #fdf1d8; }} .sums .good {{ background: #e2f2e5; }}
table {{ border-collapse: collapse; width: 100%; }} th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #dde2e8; }}
tr.broken td:nth-child(4) {{ color: #b3261e; font-weight: 600; }} tr.at-risk td:nth-child(4) {{ color: #8a5a00; font-weight: 600; }}
tr.kept td:nth-child(4) {{ color: #1e7b34; }}
</style></head><body>
<h1>Backups, {at}</h1>
<p class="sums"><span class="good"><b>{kept}</b>kept</span><span class="risk"><b>{at_risk}</b>at risk</span><span class="bad"><b>{broken}</b>broken</span></p>
<h2>VMs</h2>
<table><tr><th>VM</th><th>Site</th><th>Policy</th><th>Promise</th><th>Age</th><th>Next by</th><th>Done</th><th>First try</th><th>Why</th></tr>
{rows}</table>
<h2>Days</h2>
<table><tr><th>Day</th><th>Ended</th><th>With a backup</th><th>At the first try</th><th>In their window</th></tr>
{days}</table>
</body></html>"#,
        at = escaped(&moment(&answer["at"])),
        kept = number(&answer["kept"]),
        at_risk = number(&answer["at_risk"]),
        broken = number(&answer["broken"]),
    )
}

/// Names and reasons come from elsewhere.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// What is asked for with `backup report`.
pub fn report_request(report: &Report) -> Request {
    Request::BackupReport { days: report.days }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_named_stays_text() {
        let answer = json!({
            "at": "2026-11-28T20:00:00.000Z", "kept": 0, "at_risk": 0, "broken": 1, "by_day": {},
            "vms": [{"vm": "web", "peer": "<script>", "standing": "broken", "why": "a \"quoted\", reason"}],
        });
        let page = html(&answer);
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script>"));
        assert!(csv(&answer).contains("\"a \"\"quoted\"\", reason\""), "{}", csv(&answer));
    }
}
