//! What other programs are doing to a VM that they share with us through libvirt: backups, copies, commits,
//! snapshots, migrations. All of them are left alone.

use serde_json::Value;

use crate::error::Error;
use crate::names::is_any_ours;
use crate::qmp::{Command, Qmp};
use crate::vm::optional;

/// An error that names what is under way, if anything is. Libvirt's own jobs are jobs of QEMU or a migration (saving
/// a VM is one to a file); the rest of what it does to a domain it does while our question waits.
pub(crate) async fn check(qmp: &Qmp) -> Result<(), Error> {
    let commands = ["query-jobs", "query-migrate"].map(Command::bare).into();
    let mut answers = qmp.run_each(commands).await.into_iter().map(optional);
    let mut next = || answers.next().expect("an answer for each command").map(Option::unwrap_or_default);
    match job(&next()?).or(migration(&next()?)) {
        Some(what) => Err(Error::InTheWay { what }),
        None => Ok(()),
    }
}

fn job(jobs: &Value) -> Option<String> {
    let goes_on = |job: &&Value| !matches!(job["status"].as_str(), Some("concluded" | "null" | "undefined"));
    let others = |job: &&Value| !job["id"].as_str().is_some_and(is_any_ours);
    let job = jobs.as_array()?.iter().filter(goes_on).find(others)?;
    let (kind, id) = (job["type"].as_str().unwrap_or("block"), job["id"].as_str().unwrap_or_default());
    Some(format!("a {kind} job ({id})"))
}

fn migration(told: &Value) -> Option<String> {
    match told["status"].as_str()? {
        "none" | "completed" | "failed" | "cancelled" => None,
        status => Some(format!("a migration or a saving of its state ({status})")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_others_have_under_way_is_in_the_way() {
        let jobs = |id: &str, status: &str| json!([{"id": id, "type": "commit", "status": status}]);
        assert_eq!(job(&json!([])), None);
        assert_eq!(job(&jobs("afterimage-abababab-j0", "running")), None);
        assert_eq!(job(&jobs("commit-vda-libvirt-1-format", "concluded")), None);
        let what = job(&jobs("commit-vda-libvirt-1-format", "ready")).unwrap();
        assert_eq!(what, "a commit job (commit-vda-libvirt-1-format)");
        assert_eq!((migration(&json!({})), migration(&json!({"status": "completed"}))), (None, None));
        assert!(migration(&json!({"status": "postcopy-active"})).unwrap().contains("postcopy"));
    }
}
