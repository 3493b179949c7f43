//! Which disks a VM has. Pure.

use std::path::PathBuf;

use model::DiskName;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::graph::{Graph, Node};
use crate::libvirt::TargetDisk;
use crate::names::is_any_ours;

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// How to find it again, after QEMU was restarted too: its node name, or the id of its device where
    /// QEMU made the node name up.
    pub node: String,
    /// What people call it.
    pub name: DiskName,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The path of its device in QEMU, if it is attached to one.
    pub qdev: Option<String>,
    /// The name of its node in this QEMU process, for commands.
    pub block_node: String,
    /// The file or device that it lies in, where it lies in one.
    pub image: Option<Image>,
}

/// A file or a device that a disk lies in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its format, in QEMU's words.
    pub format: String,
}

/// Every writable disk: those of the devices; without devices (a storage daemon) those that are exported
/// writable; without exports those that nothing else is built on.
pub(crate) fn find(graph: &Graph) -> Vec<Disk> {
    let of_devices = graph.devices.iter().filter(|device| !device.removable).filter_map(|device| {
        let inserted = device.inserted.as_ref().filter(|inserted| !inserted.ro)?;
        Some((inserted.node_name.as_str(), device.device.as_str()))
    });
    let found = take(graph, of_devices);
    if !found.is_empty() {
        return found;
    }
    let mut found = {
        let exported = graph.exports.iter().map(|export| (export.node_name.as_str(), ""));
        take(graph, exported.filter(|(node, _)| graph.is_written_from_outside(node)))
    };
    if found.is_empty() {
        let is_top = |node: &&Node| graph.is_root(&node.node_name) && !node.is_protocol();
        found = take(graph, graph.nodes.values().filter(is_top).map(|node| (node.node_name.as_str(), "")));
    }
    // Devices come in the machine's order; exports and nodes in one that differs between QEMU's versions.
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The disks of these nodes or devices, in this order.
pub(crate) fn resolve(graph: &Graph, wanted: &[String]) -> Result<Vec<Disk>, Error> {
    let mut disks: Vec<Disk> = Vec::new();
    for node in wanted {
        let unusable = |why: &str| Error::UnusableDisk { node: node.clone(), why: why.to_owned() };
        let device = graph.devices.iter().find(|device| is_called(device, node));
        let start = match (graph.nodes.get(node), device) {
            (Some(found), _) => found.node_name.clone(),
            (None, Some(device)) => device
                .inserted
                .as_ref()
                .ok_or_else(|| unusable("the device holds no medium"))?
                .node_name
                .clone(),
            (None, None) => return Err(Error::NoSuchDisk { node: node.clone(), known: known(graph) }),
        };
        let block_node = graph.below_filters(&start);
        let found = graph.nodes.get(&block_node).ok_or_else(|| unusable("its node cannot be found"))?;
        if is_any_ours(&block_node) {
            return Err(unusable("it is a scratch of Afterimage"));
        }
        if found.ro {
            return Err(unusable(
                "it is read-only; if an external overlay was put on it, protect the overlay's node instead",
            ));
        }
        if disks.iter().any(|disk| disk.block_node == block_node) {
            return Err(unusable("it is named twice"));
        }
        disks.push(disk(graph, found, node, &disks));
    }
    Ok(disks)
}

/// A disk of a domain of libvirt's: found by its device, and called by its target.
pub(crate) fn of_target(graph: &Graph, target: &TargetDisk) -> Result<Disk, Error> {
    let unusable = |why: String| Error::UnusableDisk { node: target.target.clone(), why };
    let alias = target.alias.clone().ok_or_else(|| unusable("libvirt does not tell its device".into()))?;
    let mut found = resolve(graph, &[alias]).map_err(|error| match error {
        Error::UnusableDisk { why, .. } => unusable(why),
        error => unusable(error.to_string()),
    })?;
    let mut disk = found.pop().ok_or_else(|| unusable("its node cannot be found".into()))?;
    disk.name = target.target.parse().map_err(|error| unusable(format!("{error}")))?;
    disk.node.clone_from(&target.target);
    Ok(disk)
}

fn is_called(device: &crate::graph::Device, name: &str) -> bool {
    let qdev = device.qdev.as_deref().unwrap_or_default();
    let id = qdev.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
    (!device.device.is_empty() && device.device == name) || qdev == name || id == Some(name)
}

fn known(graph: &Graph) -> String {
    let nodes: Vec<_> = find(graph).into_iter().map(|disk| disk.node).collect();
    if nodes.is_empty() { "no writable disk".to_owned() } else { nodes.join(", ") }
}

fn take<'a>(graph: &Graph, candidates: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for (node, device) in candidates {
        let Some(found) = graph.nodes.get(&graph.below_filters(node)) else { continue };
        let is_known = disks.iter().any(|disk| disk.block_node == found.node_name);
        if found.ro || is_any_ours(&found.node_name) || is_known || found.image.virtual_size == 0 {
            continue;
        }
        let stable = if found.has_made_up_name() && !device.is_empty() { device } else { &found.node_name };
        disks.push(disk(graph, found, stable, &disks));
    }
    disks
}

fn disk(graph: &Graph, node: &Node, called: &str, others: &[Disk]) -> Disk {
    let device = graph.devices.iter().find(|device| {
        device
            .inserted
            .as_ref()
            .is_some_and(|inserted| graph.below_filters(&inserted.node_name) == node.node_name)
    });
    Disk {
        node: called.to_owned(),
        name: name(called, others),
        size_bytes: node.image.virtual_size,
        qdev: device.and_then(|device| device.qdev.clone()),
        block_node: node.node_name.clone(),
        image: image(node),
    }
}

/// What a node lies in, if that is a file or a device whose place is told in full.
fn image(node: &Node) -> Option<Image> {
    let format = if node.is_protocol() { "raw" } else { node.drv.as_str() };
    node.file.starts_with('/').then(|| Image { path: node.file.clone().into(), format: format.to_owned() })
}

/// A name that can be a file's, made of QEMU's, and different from the others.
fn name(called: &str, others: &[Disk]) -> DiskName {
    let usable: String = called
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
        .collect();
    // 59 bytes leave room for a number.
    let usable: String = usable.trim_start_matches(['.', '-']).chars().take(59).collect();
    let first = if usable.is_empty() { "disk".to_owned() } else { usable };
    let numbered = (2_u32..).map(|n| format!("{first}-{n}"));
    std::iter::once(first.clone())
        .chain(numbered)
        .filter_map(|name| name.parse::<DiskName>().ok())
        .find(|name| others.iter().all(|other| other.name != *name))
        .expect("one of infinitely many names is free")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, drv: &str, ro: bool) -> Value {
        json!({"node-name": name, "drv": drv, "ro": ro, "file": "f", "image": {"virtual-size": 65536}})
    }

    fn device(device: &str, node: &str, ro: bool, removable: bool, qdev: &str) -> Value {
        json!({"device": device, "removable": removable, "qdev": qdev, "inserted": {"node-name": node, "ro": ro}})
    }

    fn graph(nodes: Value, devices: Value, exports: Value, edges: Value) -> Graph {
        fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
            serde_json::from_value(value).unwrap()
        }
        Graph::new(read(nodes), read(devices), read(exports), read(edges))
    }

    fn vm() -> Graph {
        let nodes = json!([
            node("#block1", "raw", false),
            node("fmt", "qcow2", false),
            node("limit", "throttle", false),
            node("rom", "raw", true),
            node("cd", "raw", false),
            node("afterimage-00000000-o0", "qcow2", false),
        ]);
        let devices = json!([
            device("virtio0", "#block1", false, false, "/machine/peripheral-anon/device[0]"),
            device("", "limit", false, false, "/machine/peripheral/root/virtio-backend"),
            device("rom", "rom", true, false, ""),
            device("cd0", "cd", false, true, ""),
            {"device": "floppy0", "removable": true},
        ]);
        let edges = json!({
            "nodes": [{"id": 1, "name": "limit", "type": "block-driver"}, {"id": 2, "name": "fmt", "type": "block-driver"}],
            "edges": [{"parent": 1, "child": 2, "name": "file", "perm": ["write"], "shared-perm": []}],
        });
        graph(nodes, devices, json!([]), edges)
    }

    #[test]
    fn the_disks_of_devices_are_found_below_their_filters() {
        let found = find(&vm());
        let brief: Vec<_> =
            found.iter().map(|d| (d.node.as_str(), d.name.as_str(), d.block_node.as_str())).collect();
        assert_eq!(brief, [("virtio0", "virtio0", "#block1"), ("fmt", "fmt", "fmt")]);
        assert_eq!(found[1].qdev.as_deref(), Some("/machine/peripheral/root/virtio-backend"));
    }

    #[test]
    fn disks_are_found_again_by_node_device_or_id() {
        let wanted =
            |names: &[&str]| resolve(&vm(), &names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>());
        assert_eq!(wanted(&["root", "virtio0"]).unwrap()[0].block_node, "fmt");
        assert_eq!(wanted(&["limit"]).unwrap()[0].block_node, "fmt");
        let error = wanted(&["vdz"]).unwrap_err().to_string();
        assert!(error.contains("vdz") && error.contains("virtio0, fmt"), "{error}");
        for (bad, why) in [
            (&["rom"][..], "read-only"),
            (&["floppy0"], "no medium"),
            (&["afterimage-00000000-o0"], "scratch"),
            (&["fmt", "limit"], "twice"),
        ] {
            let error = wanted(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn names_become_file_names_and_differ() {
        let mut disks = vec![];
        for called in ["a/b", "a:b", "..", "ü", &"x".repeat(80)] {
            let disk = Disk {
                node: called.to_owned(),
                name: name(called, &disks),
                size_bytes: 0,
                qdev: None,
                block_node: String::new(),
                image: None,
            };
            disks.push(disk);
        }
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["a-b", "a-b-2", "disk", "disk-2", &"x".repeat(59)]);
    }
}
