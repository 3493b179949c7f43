//! What QEMU tells of a VM: kept with its backups, for the person who has to build it again.

use serde_json::{Map, Value};

use crate::error::Error;
use crate::names::is_any_ours;
use crate::qmp::Command;
use crate::sweep::named_block_nodes;
use crate::vm::{Vm, optional};

/// Questions that change nothing; a QEMU that does not know one leaves it out.
const QUESTIONS: &[&str] = &[
    "query-name",
    "query-uuid",
    "query-version",
    "query-status",
    "query-current-machine",
    "query-memory-size-summary",
    "query-cpus-fast",
    "query-block",
    "query-pci",
    "query-iothreads",
    "query-chardev",
];

impl Vm {
    /// What QEMU tells of the VM, one entry per question.
    pub async fn definition(&self) -> Result<Value, Error> {
        let mut commands: Vec<_> = QUESTIONS.iter().map(|&question| Command::bare(question)).collect();
        commands.push(named_block_nodes());
        let mut answers = self.qmp().run_each(commands).await;
        let nodes = answers.pop().expect("an answer for each command")?;
        let mut told = Map::new();
        told.insert("source".into(), "qmp".into());
        for (question, answer) in QUESTIONS.iter().zip(answers) {
            // Some QEMUs know a question and cannot answer it (no PCI bus): that is an answer too.
            match optional(answer) {
                Ok(Some(answer)) => drop(told.insert((*question).into(), answer)),
                Err(error) if error.is_gone() => return Err(error),
                Ok(None) | Err(_) => {}
            }
        }
        told.insert("query-named-block-nodes".into(), without_ours(nodes));
        Ok(Value::Object(told))
    }
}

fn without_ours(mut nodes: Value) -> Value {
    if let Some(nodes) = nodes.as_array_mut() {
        nodes.retain(|node| !node["node-name"].as_str().is_some_and(is_any_ours));
    }
    nodes
}
