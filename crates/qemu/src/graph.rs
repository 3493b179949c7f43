//! QEMU's block nodes, as it tells them. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Drivers that pass every write on to their one child: the disk is what is below them.
const FILTERS: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "replication",
    "throttle",
];

/// Drivers that stand for a file or a device, below a format.
const PROTOCOLS: &[&str] = &[
    "curl",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "rbd",
    "ssh",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
];

/// A node of `query-named-block-nodes`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Node {
    #[serde(default)]
    pub node_name: String,
    pub drv: String,
    pub ro: bool,
    #[serde(default)]
    pub file: String,
    pub image: Image,
    #[serde(default)]
    pub dirty_bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Image {
    pub virtual_size: u64,
}

/// A dirty bitmap as QEMU describes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Bitmap {
    /// Its name; QEMU makes bitmaps without one for itself.
    pub name: Option<String>,
    /// Bytes that it marks.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether writes are being marked.
    pub recording: bool,
    /// Whether something (a job, an export) uses it.
    pub busy: bool,
    /// It was read from an image that was not closed properly, and tells nothing.
    #[serde(default)]
    pub inconsistent: bool,
}

/// A device of `query-block`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Device {
    #[serde(default)]
    pub device: String,
    #[serde(default)]
    pub qdev: Option<String>,
    pub removable: bool,
    pub inserted: Option<Inserted>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Inserted {
    #[serde(default)]
    pub node_name: String,
    pub ro: bool,
}

/// An export of `query-block-exports`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Export {
    pub node_name: String,
}

/// The answer of `x-debug-query-block-graph`: who uses which node, and for what.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Edges {
    nodes: Vec<EdgeNode>,
    edges: Vec<Edge>,
}

#[derive(Debug, Clone, Deserialize)]
struct EdgeNode {
    id: u64,
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    name: String,
    perm: Vec<String>,
}

/// All of it.
#[derive(Debug, Clone)]
pub(crate) struct Graph {
    pub nodes: BTreeMap<String, Node>,
    /// In the order in which QEMU lists them.
    pub devices: Vec<Device>,
    pub exports: Vec<Export>,
    edges: Option<Edges>,
}

impl Graph {
    pub fn new(nodes: Vec<Node>, devices: Vec<Device>, exports: Vec<Export>, edges: Option<Edges>) -> Self {
        let nodes = nodes.into_iter().map(|node| (node.node_name.clone(), node)).collect();
        Self { nodes, devices, exports, edges }
    }

    /// The disk below filters: a filter comes and goes with a job or a policy, the disk stays.
    pub fn below_filters(&self, name: &str) -> String {
        let mut name = name.to_owned();
        for _ in 0..self.nodes.len() {
            let is_filter = self.nodes.get(&name).is_some_and(|node| FILTERS.contains(&node.drv.as_str()));
            match self.filtered_child(&name) {
                Some(child) if is_filter => name = child,
                _ => break,
            }
        }
        name
    }

    fn filtered_child(&self, name: &str) -> Option<String> {
        let edges = self.edges.as_ref()?;
        let id = edges.nodes.iter().find(|node| node.name == name && node.kind == "block-driver")?.id;
        // Filters of jobs call their disk "backing" or "file"; "log" and "target" are something else.
        let child = |of: &str| edges.edges.iter().find(|edge| edge.parent == id && edge.name == of);
        let child = child("file").or_else(|| child("backing"))?.child;
        edges.nodes.iter().find(|node| node.id == child).map(|node| node.name.clone())
    }

    /// Whether somebody outside the graph (a device, an export) writes to the node. Unknown counts as yes.
    pub fn is_written_from_outside(&self, name: &str) -> bool {
        let Some(edges) = &self.edges else { return true };
        self.parents(edges, name).any(|(edge, parent)| {
            parent.kind != "block-driver" && edge.perm.iter().any(|perm| perm == "write")
        })
    }

    /// Whether no other node is above it.
    pub fn is_root(&self, name: &str) -> bool {
        let Some(edges) = &self.edges else { return false };
        self.parents(edges, name).all(|(_, parent)| parent.kind == "block-backend")
    }

    fn parents<'a>(&self, edges: &'a Edges, name: &str) -> impl Iterator<Item = (&'a Edge, &'a EdgeNode)> {
        let id =
            edges.nodes.iter().find(|node| node.name == name && node.kind == "block-driver").map(|n| n.id);
        edges.edges.iter().filter(move |edge| Some(edge.child) == id).filter_map(|edge| {
            edges.nodes.iter().find(|node| node.id == edge.parent).map(|parent| (edge, parent))
        })
    }
}

impl Node {
    pub fn is_protocol(&self) -> bool {
        PROTOCOLS.contains(&self.drv.as_str())
    }

    /// QEMU made the name up, and makes up another one in its next life.
    pub fn has_made_up_name(&self) -> bool {
        self.node_name.starts_with('#')
    }
}
