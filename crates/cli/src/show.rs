//! Answers as a person reads them: tables that fit a terminal, units, and the next step where there is one.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;
use site::{Failure, Made, Request};

use crate::{measurements, peers, points};

/// A failure: what happened, and when to come again.
pub fn failure(failure: &Failure) -> String {
    let mut text = format!("afterimage: {}", failure.message);
    if let Some(condition) = failure.condition {
        let _ = write!(text, "\n  condition: {condition}");
    }
    if let Some(seconds) = failure.retry_after_s {
        let _ = write!(text, "\n  try again in: {seconds} s");
    }
    text
}

/// The text without characters that control a terminal: it may hold what a stranger wrote.
pub fn harmless(text: &str) -> String {
    let is_harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().map(|c| if is_harmless(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

pub fn init(dir: &Path, made: &Made) -> String {
    let dir = dir.display();
    format!(
        "Site {} is ready in {dir}.\n  fingerprint  {}\n  address      {}\n  repository   {dir}/repository\n  \
         password     {dir}/repository.password (keep a copy elsewhere: without it no backup can be read)\n\n\
         Next: afterimage --dir {dir} serve",
        made.name, made.fingerprint, made.address
    )
}

/// The answer of a running site.
pub fn answer(request: &Request, answer: &Value) -> String {
    match request {
        Request::PeerInvite { .. }
        | Request::PeerAccept { .. }
        | Request::PeerList
        | Request::PeerShow { .. }
        | Request::PeerAllow { .. }
        | Request::PeerRevoke { .. }
        | Request::Identity
        | Request::IdentityRenew { .. }
        | Request::IdentityUse { .. }
        | Request::PeerRemove { .. } => peers::shown(request, answer),
        Request::Protect(protect) => {
            format!("{} is protected now.\n\n{}", protect.vm, relationships(std::slice::from_ref(answer)))
        }
        Request::Status { vm } => {
            let vms = list(&answer["vms"]);
            if vms.is_empty() {
                return "No VM is protected here, and there is no replica.\n".to_owned()
                    + &peers::warnings(answer);
            }
            let mut shown = relationships(vms);
            for vm in vms.iter().filter(|entry| vm.is_some() || noteworthy(entry)) {
                let _ = write!(shown, "\n{}", details(vm));
            }
            shown + &peers::warnings(answer)
        }
        Request::Pause { .. } | Request::Resume { .. } | Request::Sync { .. } => {
            relationships(std::slice::from_ref(answer))
        }
        Request::Extend(extend) => format!(
            "The replica of {} is passed on to {} now.\n\n{}",
            extend.vm,
            extend.to,
            relationships(std::slice::from_ref(answer))
        ),
        Request::Unextend { vm } => {
            format!(
                "The replica of {vm} is not passed on any more; {} keeps what it has.",
                text(&answer["peer"])
            )
        }
        Request::AddDisks { .. } | Request::RemoveDisks { .. } => details(answer),
        Request::Resync { .. } | Request::Configure { .. } | Request::Relocate { .. } => {
            format!("{}\n{}", relationships(std::slice::from_ref(answer)), details(answer))
        }
        Request::Seed(request) => seeded(request.vm.as_str(), answer),
        Request::Import { .. } => imported(answer),
        Request::Unprotect { vm } => {
            let left = answer["left_group"]["message"].as_str().map(|left| format!("\n{left}."));
            format!("{vm} is not protected any more.{}", left.unwrap_or_default())
        }
        Request::Points { plan: false, .. } => points::points(list(&answer["points"])),
        Request::Points { plan: true, .. } => points::plan(answer),
        Request::Pin { vm, .. } => {
            let name = answer["name"].as_str().map(|name| format!(" ({name})")).unwrap_or_default();
            let point = text(&answer["point"]);
            format!("Point {point}{name} of {vm} stays until 'afterimage unpin {vm} {point}'.")
        }
        Request::Unpin { vm, .. } => {
            format!("Point {} of {vm} is not pinned any more.", text(&answer["point"]))
        }
        Request::Backup(request) => backup(request.vm.as_str(), answer),
        Request::Jobs => jobs(list(&answer["jobs"])),
        Request::Hold { .. } => hold(answer),
        Request::Release { hold } => format!("Hold {hold} is released; it was valid to its end."),
        Request::Export(_) => export(answer),
        Request::Unexport { export } => format!("Export {export} is ended."),
        // A part of 'restore', which says it itself.
        Request::Overwriting { .. } => String::new(),
        Request::Check(_) => check(answer),
        Request::Checks { .. } => checks(list(&answer["checks"])),
        Request::Failover(request) => crate::failover::shown(request, answer),
        Request::Recover(request) => crate::recover::shown(request, answer),
        Request::Group(request) => crate::groups::shown(request, answer),
        Request::Policy(request) => crate::policies::shown(request, answer),
        Request::BackupReport { .. } => crate::policies::report(answer),
        Request::Migrate { vm, storage } => format!("The replica of {vm} is in {} now.", storage.display()),
        Request::Measurements { .. } => measurements::tables(list(&answer["measurements"])),
        Request::Events { .. } => events(list(&answer["events"])),
    }
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

pub fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".into(), |number| number.to_string())
}

/// "1.4 GiB".
pub fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".into(), |bytes| indicatif::BinaryBytes(bytes).to_string())
}

/// "12.3 s".
pub fn seconds(value: &Value) -> String {
    match value.as_f64() {
        None => "-".into(),
        Some(seconds) if seconds < 120.0 => format!("{seconds:.1} s"),
        Some(seconds) => {
            model::human_duration(std::time::Duration::from_secs_f64(seconds.clamp(0.0, 1e12))).to_string()
        }
    }
}

/// "2026-11-24 21:00:12": a moment without what only a machine needs.
pub fn moment(value: &Value) -> String {
    value.as_str().map_or_else(|| "-".into(), |text| text.replace('T', " ").chars().take(19).collect())
}

/// Columns as wide as their widest cell; no trailing blanks.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let mut shown = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(shown, "{}", cells.join("  ").trim_end());
    }
    shown
}

pub fn relationships(vms: &[Value]) -> String {
    let rows: Vec<_> = vms
        .iter()
        .map(|vm| {
            let cell = |key: &str| text(&vm[key]).to_owned();
            vec![
                cell("name"),
                cell("role"),
                cell("peer"),
                state(vm),
                cell("health"),
                seconds(&vm["lag_s"]),
                bytes(&vm["pending_bytes"]),
                moment(&vm["last_point"]),
            ]
        })
        .collect();
    table(&["VM", "ROLE", "PEER", "STATE", "HEALTH", "LAG", "PENDING", "LAST POINT"], &rows)
}

fn state(vm: &Value) -> String {
    let mut state = text(&vm["state"]).to_owned();
    let progress = &vm["progress"];
    if let (Some(done), Some(total)) = (progress["covered_bytes"].as_u64(), progress["total_bytes"].as_u64())
    {
        let _ = write!(state, " {}%", (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100));
    }
    if vm["paused"] == true {
        state.push_str(" (paused)");
    }
    state
}

fn noteworthy(vm: &Value) -> bool {
    let joins = |disk: &Value| disk["copied_bytes"].is_u64();
    vm["health"] != "normal"
        || vm["media"].is_object()
        || vm["moving"].is_object()
        || !vm["error"].is_null()
        || list(&vm["disks"]).iter().any(joins)
}

fn details(vm: &Value) -> String {
    let mut shown = format!("{} ({})\n", text(&vm["name"]), text(&vm["role"]));
    let mut line = |what: &str, value: String| {
        let _ = writeln!(shown, "  {what:<12} {value}");
    };
    if let Some(reason) = vm["health_reason"].as_str().filter(|reason| !reason.is_empty()) {
        line("health", reason.to_owned());
    } else if let Some(message) = vm["rests"]["message"].as_str() {
        line("waits", message.to_owned());
    }
    if vm["progress"].is_object() && vm["resync_reason"].is_string() {
        line("because", text(&vm["resync_reason"]).to_owned());
    }
    if vm["media"].is_object() {
        line("media", media(&vm["media"]));
    }
    if vm["moving"].is_object() {
        line("moves", moving(&vm["moving"]));
    }
    if let Some(to) = vm["moving_to"].as_str() {
        line("moves", format!("to {to}"));
    }
    if vm["resync"].as_str().is_some_and(|policy| policy != "auto") {
        line("resync", text(&vm["resync"]).to_owned());
    }
    let told = text(&vm["health_reason"]);
    // That media wait is said already.
    let says_more = |message: &&str| !told.starts_with(message) && vm["error"]["code"] != "media-awaited";
    if let Some(message) = vm["error"]["message"].as_str().filter(says_more) {
        match vm["failures"].as_u64() {
            Some(0) => line("waits", message.to_owned()),
            _ => line("last error", format!("{message} (failed {} times in a row)", number(&vm["failures"]))),
        }
    }
    let goes_on = !vm["error"].is_null() && vm["rests"].is_null();
    if let Some(at) = vm["next_cycle_at"].as_str().filter(|_| goes_on) {
        line("next try", moment(&at.into()));
    }
    for disk in list(&vm["disks"]) {
        let copied = match disk["copied_bytes"].as_u64() {
            Some(_) => format!(", joins: {} copied", bytes(&disk["copied_bytes"])),
            None => String::new(),
        };
        line("disk", format!("{}  {}{copied}", text(&disk["name"]), bytes(&disk["size_bytes"])));
    }
    if vm["interval_s"].is_u64() {
        line("interval", format!("{} s, {} hourly points", number(&vm["interval_s"]), number(&vm["points"])));
    }
    if vm["app_every_s"].is_u64() {
        line("application", format!("a consistent point every {}", seconds(&vm["app_every_s"])));
    }
    if vm["bandwidth_bytes_per_s"].is_u64() {
        let rate = vm["bandwidth_bytes_per_s"].as_u64().unwrap_or_default();
        line("bandwidth", format!("at most {}/s", indicatif::DecimalBytes(rate)));
    }
    if let Some(sign) = vm["sign_of_life"].as_str() {
        line("shows life", sign.to_owned());
    }
    if let Some(group) = vm["group"].as_str() {
        line("group", format!("{group}; 'afterimage group show {group}'"));
    }
    let cycle = &vm["last_cycle"];
    if !cycle.is_null() {
        let sent = format!("{} in {}", bytes(&cycle["log_bytes"]), seconds(&cycle["total_s"]));
        line("last cycle", format!("{sent}, at {}", moment(&cycle["moment"])));
    }
    if vm["role"] == "replica" {
        let (received, applied) = (number(&vm["received"]), number(&vm["applied"]));
        line("logs", format!("{received} received, {applied} applied; apply is {}", text(&vm["apply"])));
        if vm["pinned"].as_u64() > Some(0) {
            let (pinned, cost) = (number(&vm["pinned"]), bytes(&vm["pin_bytes"]));
            line("pinned", format!("{pinned} points by hand; {cost} of logs are there only for them"));
        }
    }
    shown
}

/// What a set of media waits for, and how far it is.
fn media(media: &Value) -> String {
    let logs = match (media["imported"].as_u64(), media["logs"].as_u64()) {
        (Some(imported), Some(logs)) => format!("{imported} of {logs} logs imported"),
        (Some(imported), None) => format!("{imported} logs imported"),
        (None, _) => format!("{} logs written", number(&media["logs"])),
    };
    let size = media["bytes"].as_u64().map(|_| format!(", {}", bytes(&media["bytes"]))).unwrap_or_default();
    format!("{} ({logs}{size})", text(&media["message"]))
}

fn seeded(vm: &str, answer: &Value) -> String {
    let mut shown = format!("The replica of {vm} will begin with these images, which can be removed now:\n");
    for disk in list(&answer["disks"]) {
        let _ = writeln!(shown, "  {}  {}", text(&disk["name"]), bytes(&disk["size_bytes"]));
    }
    shown.push_str(
        "Both sides are compared as soon as the site that protects it asks; only what differs travels.",
    );
    shown
}

fn imported(answer: &Value) -> String {
    let vm = text(&answer["vm"]);
    let before = match answer["here_before"].as_u64() {
        Some(0) | None => String::new(),
        Some(_) => format!(" ({} of them were here before)", number(&answer["here_before"])),
    };
    format!(
        "The initial replication of {vm} is imported: {} logs{before}, {}.\nThe site that protects it goes on within half a minute, and sends what has changed since. The media can be wiped.",
        number(&answer["logs"]),
        bytes(&answer["bytes"])
    )
}

/// "to far: 42% of the oldest point is there".
fn moving(moving: &Value) -> String {
    let Some(to) = moving["to"].as_str() else {
        return format!("it has; {} is still to hear of it", text(&moving["from"]));
    };
    let progress = &moving["progress"];
    let how_far = match (progress["covered_bytes"].as_u64(), progress["total_bytes"].as_u64()) {
        (Some(done), Some(total)) => {
            let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(100);
            format!("{percent}% of the oldest point is there")
        }
        _ if moving["pending_bytes"].is_u64() => {
            format!("{} of logs are still to go", bytes(&moving["pending_bytes"]))
        }
        _ => "it is being prepared".into(),
    };
    let error = moving["error"].as_str().map(|error| format!("; it waits: {error}")).unwrap_or_default();
    format!("to {to}: {how_far}{error}")
}

pub fn backup(vm: &str, answer: &Value) -> String {
    let mut shown = format!(
        "{vm} is backed up: backup {}, point {} of {} ({}-consistent)\n  read {}, added {}, {}\n",
        &text(&answer["backup"]).chars().take(8).collect::<String>(),
        number(&answer["number"]),
        moment(&answer["taken_at"]),
        text(&answer["consistency"]),
        bytes(&answer["bytes_read"]),
        bytes(&answer["bytes_added"]),
        seconds(&answer["seconds"]),
    );
    for attempt in list(&answer["attempts"]) {
        let _ = writeln!(shown, "  refused at {}: {}", moment(&attempt["at"]), text(&attempt["refused"]));
    }
    shown
}

fn jobs(jobs: &[Value]) -> String {
    let rows: Vec<_> = jobs
        .iter()
        .map(|job| {
            let refused: Vec<&str> =
                list(&job["attempts"]).iter().map(|attempt| text(&attempt["refused"])).collect();
            vec![
                number(&job["id"]),
                text(&job["vm"]).to_owned(),
                text(&job["state"]).to_owned(),
                moment(&job["made_at"]),
                moment(&job["next_at"]),
                if refused.is_empty() { "-".into() } else { refused.join(", ") },
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No backup has been asked for yet.".into();
    }
    table(&["JOB", "VM", "STATE", "SINCE", "NEXT TRY", "REFUSED BY"], &rows)
}

fn hold(answer: &Value) -> String {
    let mut shown = format!(
        "Hold {} until {}: the flat files equal point {}\n",
        text(&answer["hold"]),
        moment(&answer["expires_at"]),
        text(&answer["point"])
    );
    for disk in list(&answer["disks"]) {
        let _ =
            writeln!(shown, "  {}  {}  {}", text(&disk["name"]), text(&disk["path"]), bytes(&disk["bytes"]));
    }
    let _ = write!(shown, "\nWhen the files are read: afterimage release {}", text(&answer["hold"]));
    shown
}

fn export(answer: &Value) -> String {
    let mut shown = String::new();
    for disk in list(&answer["disks"]) {
        let _ = writeln!(shown, "{}  {}", text(&disk["name"]), text(&disk["uri"]));
    }
    let _ = write!(shown, "\nEnd it: afterimage unexport {}", text(&answer["export"]));
    shown
}

fn check(answer: &Value) -> String {
    let kind = text(&answer["kind"]);
    let what = format!("{} ({kind} {})", text(&answer["vm"]), text(&answer[kind]));
    let mut shown = match answer["boot_s"].as_f64() {
        Some(boot_s) => {
            format!("{what} boots: it showed {} after {boot_s:.1} s.\n", text(&answer["sign"]))
        }
        None => format!("{what} does NOT boot: {}.\n", text(&answer["why"])),
    };
    for (name, key) in [("screen", "screenshot"), ("console", "console")] {
        let _ = writeln!(shown, "  {name:<8} {}", text(&answer[key]));
    }
    shown
}

fn checks(checks: &[Value]) -> String {
    let rows: Vec<_> = checks
        .iter()
        .map(|check| {
            let kind = text(&check["kind"]);
            let outcome = match check["boot_s"].as_f64() {
                Some(boot_s) => format!("boots in {boot_s:.1} s"),
                None => format!("FAILED: {}", text(&check["why"])),
            };
            vec![
                moment(&check["at"]),
                text(&check["vm"]).to_owned(),
                format!("{kind} {}", text(&check[kind])),
                text(&check["sign"]).to_owned(),
                outcome,
            ]
        })
        .collect();
    if rows.is_empty() {
        return "Nothing was boot-checked yet: 'afterimage check VM' does it.".into();
    }
    table(&["AT", "VM", "WHAT", "SIGN OF LIFE", "OUTCOME"], &rows)
}

fn events(events: &[Value]) -> String {
    let rows: Vec<_> = events
        .iter()
        .map(|event| {
            let cell = |key: &str| text(&event[key]).to_owned();
            vec![moment(&event["at"]), cell("kind"), cell("vm"), cell("peer"), cell("message")]
        })
        .collect();
    if rows.is_empty() {
        return "Nothing noteworthy has happened.".into();
    }
    table(&["AT", "KIND", "VM", "PEER", "WHAT"], &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_lines_up_and_has_no_trailing_blanks() {
        let shown =
            table(&["VM", "STATE"], &[vec!["web".into(), "x".into()], vec!["database".into(), "yy".into()]]);
        assert_eq!(shown, "VM        STATE\nweb       x\ndatabase  yy\n");
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        assert_eq!(
            (bytes(&json!(null)), seconds(&json!(null)), moment(&json!(null))),
            ("-".into(), "-".into(), "-".into())
        );
        assert_eq!(moment(&json!("2026-11-24T21:00:12.345Z")), "2026-11-24 21:00:12");
        assert_eq!(seconds(&json!(7200.0)), "2 h");
    }
}
