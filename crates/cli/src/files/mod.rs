//! The command `files`: what is inside the disks of a backup or a recovery point, without restoring them.
//!
//! It is read in this process and not in the site: what a guest has written on its disks can at worst end the command.

mod disks;
mod get;

use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use inside::{Entry, FileSystem, Kind, Volume, Walk};
use serde_json::{Value, json};
use site::{Code, Failure};

use crate::args::{Arguments, Files, FilesOf};
use crate::{Said, repositories, show};

/// The most that `find` tells of.
const FOUND_MAX: usize = 100_000;

/// Does what is asked for.
pub async fn run(arguments: &Arguments, files: &Files) -> Result<Said, Failure> {
    let (vm, of) = match files {
        Files::List { vm, of, .. } | Files::Find { vm, of, .. } | Files::Get { vm, of, .. } => (vm, of),
    };
    let shown = disks::show(arguments, vm, of).await?;
    let (opened, wanted) = (shown.clone(), files.clone());
    let outcome = repositories::run(arguments, "reading files", move |_, cancel| {
        let volumes = inside::volumes(opened.disks());
        match &wanted {
            Files::List { place: None, .. } => Ok(list_volumes(&volumes)),
            Files::List { place: Some(place), .. } => list(&volumes, &Place::of(place)?),
            Files::Find { name, volume, .. } => find(&volumes, name.as_bytes(), volume.as_deref(), cancel),
            Files::Get { places, to, .. } => {
                let places: Vec<Place> =
                    places.iter().map(|place| Place::of(place)).collect::<Result<_, _>>()?;
                get::all(&volumes, &places, to, cancel)
            }
        }
    })
    .await;
    shown.end(arguments).await;
    outcome
}

/// A volume, and a path on it: `vda/1:/etc/fstab`.
struct Place {
    volume: String,
    path: Vec<u8>,
}

impl Place {
    fn of(text: &std::ffi::OsStr) -> Result<Self, Failure> {
        let bytes = text.as_bytes();
        let colon = bytes.windows(2).position(|pair| pair == b":/");
        let colon = colon.ok_or_else(|| {
            let message = format!(
                "{:?} is not VOLUME:/PATH; 'afterimage files list VM' without one lists the volumes",
                text.to_string_lossy()
            );
            Failure::new(Code::Usage, message)
        })?;
        let path = match &bytes[colon + 1..] {
            root if root.iter().all(|byte| *byte == b'/') => b"/".to_vec(),
            path => path.to_vec(),
        };
        Ok(Self { volume: String::from_utf8_lossy(&bytes[..colon]).into_owned(), path })
    }

    fn open(&self, volumes: &[Volume]) -> Result<Box<dyn FileSystem>, Failure> {
        let volume = volumes.iter().find(|volume| volume.name == self.volume).ok_or_else(|| {
            let known: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
            let message = format!("there is no volume {}; there is {}", self.volume, known.join(", "));
            Failure::new(Code::Files, message)
        })?;
        inside::open(volume).map_err(|error| failed(&self.volume, &error))
    }
}

fn failed(volume: &str, error: &inside::Error) -> Failure {
    Failure::new(Code::Files, format!("{volume}: {error}"))
}

fn list_volumes(volumes: &[Volume]) -> Said {
    let described = |volume: &Volume| {
        json!({
            "name": volume.name, "size_bytes": volume.size_bytes, "content": volume.content.name(),
            "readable": volume.source.is_some() && volume.content.is_read(),
        })
    };
    let rows: Vec<_> = volumes
        .iter()
        .map(|volume| {
            let kind = if volume.source.is_some() { volume.content.name() } else { "in several pieces" };
            vec![volume.name.clone(), show::bytes(&json!(volume.size_bytes)), kind.to_owned()]
        })
        .collect();
    let json = json!({ "volumes": volumes.iter().map(described).collect::<Vec<_>>() });
    Said::new(json, show::table(&["VOLUME", "SIZE", "CONTENT"], &rows))
}

fn list(volumes: &[Volume], place: &Place) -> Result<Said, Failure> {
    let files = place.open(volumes)?;
    let at_volume = |error| failed(&place.volume, &error);
    let entry = files.entry(&place.path).map_err(at_volume)?;
    let entries = match entry.kind {
        Kind::Folder => files.list(&place.path).map_err(at_volume)?,
        _ => vec![entry],
    };
    let rows: Vec<_> = entries.iter().map(row).collect();
    let json =
        json!({ "volume": place.volume, "entries": entries.iter().map(described).collect::<Vec<_>>() });
    Ok(Said::new(json, show::table(&["MODE", "SIZE", "CHANGED", "NAME"], &rows)))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const fn kind(kind: &Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Folder => "folder",
        Kind::Link(_) => "link",
        Kind::Other => "other",
    }
}

fn described(entry: &Entry) -> Value {
    let mut json = json!({
        "name": text(&entry.name), "kind": kind(&entry.kind), "size_bytes": entry.size_bytes,
        "modified": changed(entry), "mode": entry.mode.map(|mode| format!("{mode:04o}")),
    });
    if let Kind::Link(to) = &entry.kind {
        json["to"] = json!(text(to));
    }
    json
}

/// When a file was changed; a guest may say what no calendar has.
fn changed(entry: &Entry) -> Option<String> {
    jiff::Timestamp::from_second(entry.modified_s).ok().map(|at| at.to_string())
}

fn row(entry: &Entry) -> Vec<String> {
    let letter = match entry.kind {
        Kind::File => '-',
        Kind::Folder => 'd',
        Kind::Link(_) => 'l',
        Kind::Other => '?',
    };
    let mode = entry.mode.map_or_else(String::new, |mode| format!(" {mode:04o}"));
    let to = match &entry.kind {
        Kind::Link(to) => format!(" -> {}", text(to)),
        _ => String::new(),
    };
    // A name with a line's end in it is one name.
    let name = text(&entry.name).replace(['\n', '\t'], "\u{fffd}");
    vec![
        format!("{letter}{mode}"),
        show::bytes(&json!(entry.size_bytes)),
        changed(entry).unwrap_or_else(|| "-".into()),
        name + &to,
    ]
}

fn find(volumes: &[Volume], name: &[u8], only: Option<&str>, cancel: &AtomicBool) -> Result<Said, Failure> {
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for volume in volumes.iter().filter(|volume| only.is_none_or(|only| volume.name == only)) {
        if !volume.content.is_read() || volume.source.is_none() {
            unread.push(json!({ "place": volume.name, "why": volume.content.name() }));
            continue;
        }
        let files = match inside::open(volume) {
            Ok(files) => files,
            Err(error) => {
                unread.push(json!({ "place": volume.name, "why": error.to_string() }));
                continue;
            }
        };
        files.walk(b"/", &mut |path, entry| {
            let place = || format!("{}:{}", volume.name, text(path));
            match entry {
                Ok(entry) if inside::matches(name, &entry.name) => {
                    let mut shown = described(entry);
                    shown["place"] = json!(place());
                    found.push(shown);
                }
                Ok(_) => {}
                Err(error) => unread.push(json!({ "place": place(), "why": error.to_string() })),
            }
            let ends =
                cancel.load(Ordering::Relaxed) || found.len() >= FOUND_MAX || unread.len() >= FOUND_MAX;
            if ends { Walk::End } else { Walk::On }
        });
    }
    let line = |shown: &Value| {
        let place = show::text(&shown["place"]).replace(['\n', '\t'], "\u{fffd}");
        format!("{place}  {}", show::bytes(&shown["size_bytes"]))
    };
    let mut lines: Vec<String> = found.iter().map(line).collect();
    let why =
        |shown: &Value| format!("not read: {} ({})", show::text(&shown["place"]), show::text(&shown["why"]));
    lines.extend(unread.iter().map(why));
    if found.is_empty() {
        lines.insert(0, "Nothing has such a name.".into());
    }
    Ok(Said::new(json!({ "found": found, "unread": unread }), lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn a_place_is_a_volume_and_a_path() {
        let place = |text: &str| Place::of(OsStr::new(text)).map(|place| (place.volume, place.path));
        assert_eq!(place("vda/1:/etc/a:/b").unwrap(), ("vda/1".into(), b"/etc/a:/b".to_vec()));
        assert_eq!(place("vg/root://").unwrap(), ("vg/root".into(), b"/".to_vec()));
        for bad in ["", "vda", "/etc", "vda:etc"] {
            assert_eq!(place(bad).unwrap_err().code, Code::Usage);
        }
    }
}
