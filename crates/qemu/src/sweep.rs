//! Takes everything of ours out of QEMU, whatever there is of it: after a capture, after a capture that
//! failed half-way, and after a run of ours that was killed between any two commands. Only bitmaps stay.
//!
//! It asks QEMU what there is instead of remembering what was made: one way for every case.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use steps::durable_step;
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout};

use crate::error::Error;
use crate::graph::Node;
use crate::names::Names;
use crate::qmp::{Command, Event, Qmp};
use crate::scratch::{is_scratch, remove_file};

/// How long QEMU may take to let go of one kind of thing: a job ends after the write that it is at.
const REMOVE_TIME: Duration = Duration::from_secs(30);
/// How long an event is waited for before QEMU is asked anyway.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Removes exports, jobs, nodes and scratch files of this VM, from the outside in. Gives whether there
/// was anything.
pub(crate) async fn sweep(qmp: &Qmp, names: &Names) -> Result<bool, Error> {
    let sweep = Sweep { qmp, names };
    durable_step("qemu::sweep::begin");
    let exports = sweep.exports().await?;
    durable_step("qemu::sweep::exports");
    let jobs = sweep.jobs().await?;
    durable_step("qemu::sweep::jobs");
    let files = sweep.nodes().await?;
    durable_step("qemu::sweep::nodes");
    for path in &files {
        remove_file(path)?;
    }
    durable_step("qemu::sweep::files");
    Ok(exports || jobs || !files.is_empty())
}

struct Sweep<'a> {
    qmp: &'a Qmp,
    names: &'a Names,
}

impl Sweep<'_> {
    async fn exports(&self) -> Result<bool, Error> {
        let remove = |export: &Value| {
            // Hard: a reader that still hangs on it must not keep the guest paying for its moment.
            (!export["shutting-down"].as_bool().unwrap_or(false))
                .then(|| Command::new("block-export-del", json!({"id": export["id"], "mode": "hard"})))
        };
        self.until_none("query-block-exports", "id", remove).await
    }

    async fn jobs(&self) -> Result<bool, Error> {
        let remove = |job: &Value| {
            let command = match job["status"].as_str()? {
                "concluded" => "job-dismiss",
                "aborting" | "null" | "undefined" => return None,
                _ => "job-cancel",
            };
            Some(Command::new(command, json!({"id": job["id"]})))
        };
        self.until_none("query-jobs", "id", remove).await
    }

    /// Overlays before the files below them; filters go with their jobs.
    async fn nodes(&self) -> Result<Vec<PathBuf>, Error> {
        let nodes: Vec<Node> = self.qmp.ask(named_block_nodes()).await?;
        let ours = nodes.into_iter().filter(|node| self.names.is_ours(&node.node_name));
        let files =
            ours.map(|node| PathBuf::from(node.file)).filter(|path| is_scratch(path, self.names)).collect();
        let remove = |node: &Value| {
            let name = node["node-name"].as_str()?;
            (!self.names.is_filter(name)).then(|| Command::new("blockdev-del", json!({"node-name": name})))
        };
        self.until_none("query-named-block-nodes", "node-name", remove).await?;
        Ok(files)
    }

    /// Asks what there is of ours, removes it, and asks again until there is nothing.
    async fn until_none(
        &self,
        query: &'static str,
        key: &str,
        remove: impl Fn(&Value) -> Option<Command>,
    ) -> Result<bool, Error> {
        let mut events = self.qmp.events();
        let deadline = Instant::now() + REMOVE_TIME;
        let ask = || match query {
            "query-named-block-nodes" => named_block_nodes(),
            _ => Command::bare(query),
        };
        let mut there = self.ours(self.qmp.run(ask()).await?, key);
        let found = !there.is_empty();
        let mut refused = None;
        while !there.is_empty() {
            // By name, so that overlays ("-o") go before their files ("-s").
            there.sort_by_key(|item| item[key].as_str().unwrap_or_default().to_owned());
            let mut commands: Vec<_> = there.iter().filter_map(&remove).collect();
            commands.push(ask());
            let mut answers = self.qmp.run_each(commands).await;
            let left = answers.pop().expect("the question is the last one")?;
            there = self.ours(left, key);
            refused = answers.into_iter().find_map(Result::err).or(refused);
            if there.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                let command = format!("the removal of what {query} shows");
                return Err(refused.unwrap_or(Error::Timeout { command, after: REMOVE_TIME }));
            }
            wait_for_change(&mut events).await;
        }
        Ok(found)
    }

    fn ours(&self, answer: Value, key: &str) -> Vec<Value> {
        let Value::Array(items) = answer else { return Vec::new() };
        let is_ours = |item: &Value| item[key].as_str().is_some_and(|name| self.names.is_ours(name));
        items.into_iter().filter(is_ours).collect()
    }
}

async fn wait_for_change(events: &mut broadcast::Receiver<Event>) {
    let _ = timeout(LOOK_AGAIN, async {
        while let Ok(event) = events.recv().await {
            let gone = matches!(event.data["status"].as_str(), Some("null" | "concluded"));
            if event.name == "BLOCK_EXPORT_DELETED" || (event.name == "JOB_STATUS_CHANGE" && gone) {
                return;
            }
        }
    })
    .await;
}

/// Without the backing chains: they are nodes of their own.
pub(crate) fn named_block_nodes() -> Command {
    Command::new("query-named-block-nodes", json!({"flat": true}))
}
