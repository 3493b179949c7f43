//! A disk of a running VM is moved to another file, while it runs.
//!
//! ```text
//!  layer ─▶ what lies below    ──mirror: all of it is copied, and what is written meanwhile goes to both──▶ ready
//!        ──job-complete──▶ the device has the new file, and nothing has the layer open any more
//! ```
//!
//! From "ready" on a write of the guest is done when it is in both files (`write-blocking`), so that at every moment
//! from then on the new file alone would do.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::error::Error;
use crate::qmp::{Command, Qmp};
use crate::rest::{node, nodes};

const LOOK: Duration = Duration::from_millis(50);

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moving {
    /// So many bytes of so many are copied.
    Copying(u64, u64),
    /// The new file is complete, and the disk is about to be switched over to it.
    Switching,
}

/// Moves a disk of a running VM from one qcow2 file to another, which is there and empty. `place` tells the VM's disks
/// apart. It can be called again, whatever an earlier call has come to. False if QEMU has neither file open.
pub async fn move_disk(
    qmp: &Qmp,
    place: usize,
    from: &Path,
    to: &Path,
    mut progress: impl FnMut(Moving) -> Result<(), Error>,
) -> Result<bool, Error> {
    let (job, target) = (format!("afterimage-move-{place}"), format!("afterimage-moved-{place}"));
    let found = nodes(qmp).await?;
    let there = node(&found, to, "qcow2").is_some();
    let Some(layer) = node(&found, from, "qcow2").map(|layer| layer["node-name"].clone()) else {
        return Ok(there);
    };
    if job_of(qmp, &job).await?.is_none() {
        if there {
            qmp.run(Command::new("blockdev-del", json!({"node-name": target}))).await?;
        }
        qmp.run(Command::new("blockdev-add", opened(to, &target))).await?;
        let mirror = json!({
            "job-id": job, "device": layer, "target": target, "sync": "full", "copy-mode": "write-blocking",
            "auto-dismiss": false,
        });
        qmp.run(Command::new("blockdev-mirror", mirror)).await?;
    }
    let mut switched = false;
    loop {
        let Some(state) = job_of(qmp, &job).await? else { break };
        let bytes = |key: &str| state[key].as_u64().unwrap_or(0);
        match state["status"].as_str().unwrap_or_default() {
            "ready" if !switched => {
                progress(Moving::Switching)?;
                // What was copied is in the page cache so far.
                File::open(to).and_then(|file| file.sync_all()).map_err(|source| Error::Answer {
                    command: "blockdev-mirror".into(),
                    why: format!("{} cannot be made durable: {source}", to.display()),
                })?;
                qmp.run(Command::new("job-complete", json!({"id": job}))).await?;
                switched = true;
            }
            "concluded" => {
                qmp.run(Command::new("job-dismiss", json!({"id": job}))).await?;
                if let Some(why) = state["error"].as_str() {
                    let why = why.to_owned();
                    return Err(Error::Answer { command: "blockdev-mirror".into(), why });
                }
                break;
            }
            _ if !switched => {
                progress(Moving::Copying(bytes("current-progress"), bytes("total-progress")))?;
            }
            _ => {}
        }
        sleep(LOOK).await;
    }
    // With it what lay below is let go.
    qmp.run(Command::new("blockdev-del", json!({"node-name": layer}))).await?;
    Ok(true)
}

async fn job_of(qmp: &Qmp, id: &str) -> Result<Option<Value>, Error> {
    let jobs: Vec<Value> = qmp.ask(Command::bare("query-jobs")).await?;
    Ok(jobs.into_iter().find(|job| job["id"] == id))
}

fn opened(path: &Path, name: &str) -> Value {
    json!({
        "driver": "qcow2", "node-name": name, "discard": "unmap",
        "file": {"driver": "file", "filename": path, "discard": "unmap"},
    })
}
