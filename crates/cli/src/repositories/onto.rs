//! `restore --onto`: over block devices and images that are there.

use repository::{OntoDisk, OntoOptions};
use serde_json::json;
use site::{Failure, Fenced};

use super::{damages, open, run};
use crate::args::{Arguments, Restore};
use crate::{Said, show};

/// Restores disks of a backup onto what is there, and writes only what differs.
pub async fn restore(arguments: &Arguments, restore: &Restore) -> Result<Said, Failure> {
    let options = OntoOptions {
        disks: restore.onto.clone(),
        keep_going: restore.keep_going,
        overwrite: restore.overwrite,
    };
    let (dir, name) = (arguments.dir.clone(), restore.repository.repository.clone());
    let (vm, wanted) = (restore.vm.clone(), restore.backup.clone());
    let runtime = tokio::runtime::Handle::current();
    let (backup, report, fenced) = run(arguments, "comparing and restoring", move |progress, cancel| {
        let repository = open(&dir, &name)?;
        let backup = site::find_backup(&repository, &vm, &wanted)?;
        let onto = repository.onto(&backup, &options)?;
        let targets = onto.targets().map(ToOwned::to_owned).collect();
        // Before the first byte is written it is written down whose disks these are.
        let fenced = runtime.block_on(site::fence(&dir, targets))?;
        let report = onto.run(progress, cancel)?;
        Ok((backup, report, fenced))
    })
    .await?;
    let mut json = json!(report);
    json["backup"] = json!(backup.id);
    json["point"] = json!(backup.point.id);
    json["taken_at"] = json!(site::rfc3339(backup.point.taken_at));
    json["fenced"] = json!(fenced);
    let mut text = format!("{} as it was at {}:\n", restore.vm, show::moment(&json["taken_at"]));
    text.extend(report.disks.iter().map(shown));
    text.push_str(&damages(&report.damaged));
    text.push_str(&after(&fenced));
    Ok(Said { json, text, status: u8::from(!report.damaged.is_empty()) })
}

fn shown(disk: &OntoDisk) -> String {
    let bytes = |bytes: u64| show::bytes(&json!(bytes));
    let mut line = format!("  {}  {}, ", disk.path.display(), bytes(disk.size_bytes));
    line += &match disk.written_bytes {
        0 => "all of it the same already".to_owned(),
        written => format!("{} differed and were written", bytes(written)),
    };
    if disk.beyond_bytes > 0 {
        line += &format!("; {} beyond the disk's end were left as they were", bytes(disk.beyond_bytes));
    }
    line + "\n"
}

/// What is to come for VMs whose disks these are.
fn after(fenced: &[Fenced]) -> String {
    let mut vms: Vec<_> = fenced.iter().map(|fenced| &fenced.vm).collect();
    vms.dedup();
    let line = |vm: &&model::VmName| {
        format!(
            "These are disks of {vm}, which is protected: when it runs again, both sides are compared first.\n"
        )
    };
    vms.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differed_and_what_was_left_is_said() {
        let disk = OntoDisk {
            name: "vda".parse().unwrap(),
            path: "/dev/sdb".into(),
            size_bytes: 8 << 30,
            written_bytes: 4096,
            read_bytes: 1 << 20,
            beyond_bytes: 1 << 30,
        };
        let line = shown(&disk);
        assert!(line.contains("/dev/sdb") && line.contains("differed") && line.contains("beyond"), "{line}");
        assert!(shown(&OntoDisk { written_bytes: 0, ..disk }).contains("the same already"));
    }

    #[test]
    fn a_vm_is_named_once() {
        let fenced = |disk: &str| Fenced { vm: "web".parse().unwrap(), disk: disk.parse().unwrap() };
        assert_eq!(after(&[fenced("vda"), fenced("vdb")]).lines().count(), 1);
        assert_eq!(after(&[]), "");
    }
}
