//! Layers of a running VM are laid on other files, while it runs.
//!
//! ```text
//! layer ─▶ what lay below    ──blockdev-reopen──▶    layer ─▶ flat file    ──block-stream of nothing──▶ so says the layer's file, too
//! ```
//!
//! `change-backing-file` would be the plain way to the last step, and writes the *layer's* format as that of the file below
//! it (seen with 7.2): then nobody can open the layer again. A stream down to the flat file copies nothing, since there is
//! nothing in between, and writes the right one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::error::Error;
use crate::qmp::{Command, Qmp};

/// How long QEMU may take to look at what a layer holds of a disk.
const STREAM_TIME: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(20);

/// A qcow2 layer of a VM, and the flat file with the very bytes that lie below it so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The layer's file, as QEMU opened it.
    pub layer: PathBuf,
    /// The file that it is to rest on.
    pub base: PathBuf,
    /// How the layer's file names that one from now on.
    pub named: String,
}

/// Has a QEMU read what lies below its layers from flat files. The guest notices nothing. False if QEMU does not have
/// one of the layers open. It can be done again.
pub async fn rest_layers(qmp: &Qmp, layers: &[Layer]) -> Result<bool, Error> {
    for (place, layer) in layers.iter().enumerate() {
        let found = nodes(qmp).await?;
        let (Some(top), Some(file)) =
            (node(&found, &layer.layer, "qcow2"), node(&found, &layer.layer, "file"))
        else {
            return Ok(false);
        };
        let below = format!("afterimage-base-{place}");
        let mut base = &json!(below);
        if top["backing_file"].as_str().map(Path::new) == Some(&layer.base) {
            base = node(&found, &layer.base, "raw").map_or(base, |node| &node["node-name"]);
        } else {
            if !found.iter().any(|node| node["node-name"] == below.as_str()) {
                qmp.run(Command::new("blockdev-add", flat(&layer.base, &below))).await?;
            }
            let options = json!({ "options": [reopened(top, file, &below)] });
            qmp.run(Command::new("blockdev-reopen", options)).await?;
        }
        write_down(qmp, &top["node-name"], base, &layer.named).await?;
    }
    Ok(true)
}

pub(crate) async fn nodes(qmp: &Qmp) -> Result<Vec<Value>, Error> {
    qmp.ask(Command::new("query-named-block-nodes", json!({"flat": true}))).await
}

/// The node of this driver over a file.
pub(crate) fn node<'a>(nodes: &'a [Value], file: &Path, driver: &str) -> Option<&'a Value> {
    nodes.iter().find(|node| node["drv"] == driver && file_of(node).as_deref().map(Path::new) == Some(file))
}

/// The file of a node. Of one that no longer is as its file's header has it, QEMU tells all options instead.
fn file_of(node: &Value) -> Option<String> {
    let told = node["file"].as_str()?;
    let Some(options) = told.strip_prefix("json:") else { return Some(told.to_owned()) };
    let options: Value = serde_json::from_str(options).ok()?;
    options["file"]["filename"].as_str().map(str::to_owned)
}

fn flat(base: &Path, name: &str) -> Value {
    json!({
        "driver": "raw", "node-name": name, "read-only": true,
        "file": {"driver": "file", "filename": base, "read-only": true},
    })
}

/// A layer as it is, but for what is below it. What QEMU does not tell of a node is as it is by default, and discards
/// get through: they free space.
fn reopened(top: &Value, file: &Value, base: &str) -> Value {
    json!({
        "driver": "qcow2", "node-name": top["node-name"], "file": file["node-name"], "backing": base,
        "read-only": top["ro"], "discard": "unmap", "detect-zeroes": top["detect_zeroes"],
        "cache": {"direct": top["cache"]["direct"], "no-flush": top["cache"]["no-flush"]},
    })
}

/// Has the layer's file name the flat one.
async fn write_down(qmp: &Qmp, top: &Value, base: &Value, named: &str) -> Result<(), Error> {
    let job = "afterimage-rest";
    let failed = |why: String| Error::Answer { command: "block-stream".into(), why };
    let stream = json!({
        "job-id": job, "device": top, "base-node": base, "backing-file": named, "auto-dismiss": false,
    });
    qmp.run(Command::new("block-stream", stream)).await?;
    let began = Instant::now();
    loop {
        let jobs: Vec<Value> = qmp.ask(Command::bare("query-jobs")).await?;
        let ours = jobs.iter().find(|known| known["id"] == job);
        let ours = ours.ok_or_else(|| failed("the job is gone".into()))?;
        if ours["status"] == "concluded" {
            qmp.run(Command::new("job-dismiss", json!({"id": job}))).await?;
            return ours["error"].as_str().map_or(Ok(()), |why| Err(failed(why.to_owned())));
        }
        if began.elapsed() > STREAM_TIME {
            return Err(failed(format!("it did not end within {} s", STREAM_TIME.as_secs())));
        }
        sleep(LOOK).await;
    }
}
