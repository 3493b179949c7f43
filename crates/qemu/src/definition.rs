//! What QEMU tells of a VM: kept with its backups, for the person who has to build it again, and for boot checks.

use serde_json::{Map, Value, json};

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
        let machine = [("/machine".to_owned(), "machine-type")].into();
        told.extend(self.types(machine).await?);
        let disks = self.disks().await.unwrap_or_default();
        let devices = disks.iter().filter_map(|disk| Some((path(disk.qdev.as_ref()?), disk.name.as_str())));
        told.insert("disk-devices".into(), Value::Object(self.types(devices.collect()).await?));
        if let Some(domain) = self.domain() {
            let at = domain.address();
            let xml = domain.definition().await?;
            told.insert(
                "libvirt".into(),
                json!({"uri": at.uri, "name": at.name, "uuid": at.uuid, "xml": xml}),
            );
        }
        Ok(Value::Object(told))
    }

    /// The types of objects, by the names given; those that there are none of are left out.
    async fn types(&self, objects: Vec<(String, &str)>) -> Result<Map<String, Value>, Error> {
        let ask = |path: &String| Command::new("qom-get", json!({"path": path, "property": "type"}));
        let answers = self.qmp().run_each(objects.iter().map(|(path, _)| ask(path)).collect()).await;
        let mut types = Map::new();
        for ((_, name), answer) in objects.iter().zip(answers) {
            match answer {
                Ok(found) => drop(types.insert((*name).to_owned(), found)),
                Err(error) if error.is_gone() => return Err(error),
                Err(_) => {}
            }
        }
        Ok(types)
    }
}

/// The QOM path of a device: QEMU tells the id of one that was given an id, and else its path.
fn path(qdev: &String) -> String {
    if qdev.starts_with('/') { qdev.clone() } else { format!("/machine/peripheral/{qdev}") }
}

fn without_ours(mut nodes: Value) -> Value {
    if let Some(nodes) = nodes.as_array_mut() {
        nodes.retain(|node| !node["node-name"].as_str().is_some_and(is_any_ours));
    }
    nodes
}
