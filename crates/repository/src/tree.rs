//! The tree: a backup's list of files, in restic's JSON.
//!
//! A disk is one file whose content is the list of its chunks; that list is nearly all of the tree. So it is
//! written and read without a JSON value per chunk, and a run of the same chunk (zeros) costs a copy.

use std::io::{self, Write};

use model::Timestamp;
use serde::Deserialize;

use crate::id::Id;

/// A file in a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TreeFile {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) content: Vec<Id>,
}

/// Writes the tree of these files, all of the same time, in order of their names. The fields are those of
/// restic's own encoder, in its order, so that restic can rewrite the tree without loss.
pub(crate) fn encode(files: &[&TreeFile], time: Timestamp, out: &mut impl Write) -> io::Result<()> {
    let mut sorted = files.to_vec();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let time = rfc3339(time);
    out.write_all(b"{\"nodes\":[")?;
    for (place, file) in sorted.into_iter().enumerate() {
        if place > 0 {
            out.write_all(b",")?;
        }
        let (name, size) = (&file.name, file.size_bytes);
        // Names have passed `DiskName`: nothing in them needs escaping.
        write!(
            out,
            "{{\"name\":\"{name}\",\"type\":\"file\",\"mode\":384,\"mtime\":\"{time}\",\"atime\":\"{time}\",\"ctime\":\"{time}\",\"uid\":0,\"gid\":0"
        )?;
        if size > 0 {
            write!(out, ",\"size\":{size}")?;
        }
        out.write_all(b",\"links\":1,\"content\":[")?;
        write_ids(&file.content, out)?;
        out.write_all(b"]}")?;
    }
    out.write_all(b"]}\n")
}

fn write_ids(ids: &[Id], out: &mut impl Write) -> io::Result<()> {
    let mut quoted = [b'"'; 67];
    let mut last: Option<Id> = None;
    quoted[0] = b',';
    quoted[66] = b'"';
    for (place, id) in ids.iter().enumerate() {
        if last != Some(*id) {
            quoted[2..66].copy_from_slice(&id.hex());
            last = Some(*id);
        }
        out.write_all(&quoted[usize::from(place == 0)..])?;
    }
    Ok(())
}

/// The moment as Go writes it: a fraction without trailing zeros.
fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_microsecond(time.0).unwrap_or_default().to_string()
}

/// Reads a tree's files; folders and links in it are passed over.
pub(crate) fn decode(json: &[u8]) -> Result<Vec<TreeFile>, String> {
    #[derive(Deserialize)]
    struct Tree {
        #[serde(default)]
        nodes: Vec<Node>,
    }
    #[derive(Deserialize)]
    struct Node {
        name: String,
        #[serde(rename = "type", default)]
        kind: String,
        #[serde(default)]
        size: u64,
        #[serde(default)]
        content: Option<Vec<Id>>,
    }
    let tree: Tree = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let files = tree.nodes.into_iter().filter(|node| node.kind == "file");
    Ok(files
        .map(|node| TreeFile {
            name: node.name,
            size_bytes: node.size,
            content: node.content.unwrap_or_default(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_comes_back_in_order_of_names() {
        let (a, b) = (Id::of(b"a"), Id::of(b"b"));
        let disk = TreeFile { name: "vda.raw".into(), size_bytes: 9, content: vec![a, a, b, a] };
        let empty = TreeFile { name: "empty.raw".into(), size_bytes: 0, content: vec![] };
        let mut json = Vec::new();
        encode(&[&disk, &empty], Timestamp(1_500_000), &mut json).unwrap();
        assert_eq!(decode(&json).unwrap(), [empty, disk]);
        let text = String::from_utf8(json).unwrap();
        assert!(text.contains("\"mtime\":\"1970-01-01T00:00:01.5Z\""), "{text}");
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }

    #[test]
    fn dates() {
        let at = |seconds: i64| rfc3339(Timestamp(seconds * 1_000_000));
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_554_266), "2026-11-24T21:04:26Z");
        assert_eq!(at(-1), "1969-12-31T23:59:59Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59Z");
    }

    #[test]
    fn damaged_json_is_an_error() {
        for bad in ["", "{", "{\"nodes\":[{\"name\":\"x\",\"type\":\"file\",\"content\":[\"zz\"]}]}", "[1]"] {
            assert!(decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
