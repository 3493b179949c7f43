//! What QEMU tells of a VM: kept with its backups, for the person who has to build it again, and for boot checks.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::libvirt::network_sources;
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
        let mut networks = self.networks().await?;
        if let Some(domain) = self.domain() {
            let at = domain.address();
            let xml = domain.definition().await?;
            name_networks(&mut networks, &network_sources(&xml));
            told.insert(
                "libvirt".into(),
                json!({"uri": at.uri, "name": at.name, "uuid": at.uuid, "xml": xml}),
            );
        }
        told.insert("networks".into(), Value::Array(networks));
        Ok(Value::Object(told))
    }

    /// The network cards: kind, address, and the network, by QEMU's name of what is behind it.
    async fn networks(&self) -> Result<Vec<Value>, Error> {
        let cards: Vec<(String, String)> =
            self.devices().await?.into_iter().filter(|(_, kind)| is_card(kind)).collect();
        let ask = |property: &'static str| {
            move |(path, _): &(String, String)| {
                Command::new("qom-get", json!({"path": path, "property": property}))
            }
        };
        let macs = self.qmp().run_each(cards.iter().map(ask("mac")).collect()).await;
        let netdevs = self.qmp().run_each(cards.iter().map(ask("netdev")).collect()).await;
        let mut networks = Vec::new();
        for ((_, device), (mac, netdev)) in cards.into_iter().zip(macs.into_iter().zip(netdevs)) {
            match mac {
                Ok(mac) => networks
                    .push(json!({"device": device, "mac": mac, "network": netdev.unwrap_or_default()})),
                Err(error) if error.is_gone() => return Err(error),
                // Another kind of device with a like name.
                Err(_) => {}
            }
        }
        Ok(networks)
    }

    /// The devices that a VM was given, with an id or without one: the path of each, and its type.
    async fn devices(&self) -> Result<Vec<(String, String)>, Error> {
        let folders = ["/machine/peripheral", "/machine/peripheral-anon"];
        let list = |path: &&str| Command::new("qom-list", json!({ "path": path }));
        let answers = self.qmp().run_each(folders.iter().map(list).collect()).await;
        let mut devices = Vec::new();
        for (folder, answer) in folders.iter().zip(answers) {
            let listed = match answer {
                Ok(listed) => listed,
                Err(error) if error.is_gone() => return Err(error),
                // A storage daemon has no devices.
                Err(_) => continue,
            };
            devices.extend(listed.as_array().into_iter().flatten().filter_map(|entry| {
                let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
                Some((format!("{folder}/{}", entry["name"].as_str()?), kind.to_owned()))
            }));
        }
        Ok(devices)
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

/// Whether a device can be a network card; one that has no address then is none.
fn is_card(kind: &str) -> bool {
    ["virtio-net", "e1000", "rtl8139", "vmxnet3"].iter().any(|known| kind.starts_with(known))
}

/// Names the networks of cards as libvirt does, which calls the netdev after the card.
fn name_networks(networks: &mut [Value], sources: &BTreeMap<String, String>) {
    for network in networks {
        let mac = network["mac"].as_str().unwrap_or_default().to_ascii_lowercase();
        if let Some(source) = sources.get(&mac) {
            network["network"] = json!(source);
        }
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
