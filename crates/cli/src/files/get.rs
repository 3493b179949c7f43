//! Fetching files out of a disk that somebody else has written.
//!
//! Names come from the guest. They are made only in folders that this command has made itself, and nothing that is there
//! is followed or replaced; links, devices and names that no folder here can have are left out and told. So whatever
//! a guest writes on its disk, nothing outside the folder is touched.

use std::fs::{self, File};
use std::io::{self, Seek as _, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use inside::{Entry, FileSystem, Kind, Volume, Walk};
use serde_json::json;
use site::{Code, Failure};

use super::{Place, failed, text};
use crate::{Said, show};

/// Zeros of this length become holes.
const HOLE_BYTES: usize = 64 * 1024;

/// What was fetched.
#[derive(Default)]
struct Fetched {
    files: u64,
    folders: u64,
    bytes: u64,
    skipped: Vec<(String, String)>,
}

/// Fetches files and folders into a folder.
pub(super) fn all(
    volumes: &[Volume],
    places: &[Place],
    to: &Path,
    cancel: &AtomicBool,
) -> Result<Said, Failure> {
    fs::create_dir_all(to).map_err(|error| Failure::io("make the folder", to, &error))?;
    let mut fetched = Fetched::default();
    for place in places {
        let files = place.open(volumes)?;
        let entry = files.entry(&place.path).map_err(|error| failed(&place.volume, &error))?;
        let name = match place.path.rsplit(|byte| *byte == b'/').find(|name| !name.is_empty()) {
            Some(name) => name.to_vec(),
            None => place.volume.replace('/', "-").into_bytes(),
        };
        let path = path_of(to, &name).ok_or_else(|| {
            Failure::new(Code::Files, format!("{:?} can be no file's name here", text(&name)))
        })?;
        match entry.kind {
            Kind::Folder => folder(files.as_ref(), place, &path, &mut fetched, cancel)?,
            _ => file(files.as_ref(), &place.path, &entry, &path, &mut fetched)?,
        }
    }
    if cancel.load(Ordering::Relaxed) {
        return Err(Failure::new(Code::Stopped, format!("stopped; a part is in {}", to.display())));
    }
    Ok(said(&fetched, to))
}

fn said(fetched: &Fetched, to: &Path) -> Said {
    let skipped: Vec<_> =
        fetched.skipped.iter().map(|(path, why)| json!({ "path": path, "why": why })).collect();
    let json = json!({
        "to": to, "files": fetched.files, "folders": fetched.folders, "bytes": fetched.bytes,
        "skipped": skipped,
    });
    let mut lines = vec![format!(
        "{} files and {} folders, {}, are in {}.",
        fetched.files,
        fetched.folders,
        show::bytes(&json!(fetched.bytes)),
        to.display()
    )];
    let line =
        |(path, why): &(String, String)| format!("left out: {} ({why})", path.replace('\n', "\u{fffd}"));
    lines.extend(fetched.skipped.iter().map(line));
    Said::new(json, lines.join("\n"))
}

fn folder(
    files: &dyn FileSystem,
    place: &Place,
    to: &Path,
    fetched: &mut Fetched,
    cancel: &AtomicBool,
) -> Result<(), Failure> {
    let mut trouble = make_folder(to, fetched).err();
    if trouble.is_some() {
        return trouble.map_or(Ok(()), Err);
    }
    files.walk(&place.path, &mut |path, entry| {
        if cancel.load(Ordering::Relaxed) {
            return Walk::End;
        }
        let shown = text(path);
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                fetched.skipped.push((shown, error.to_string()));
                return Walk::On;
            }
        };
        let names = path[place.path.len()..].split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        let target = names.into_iter().try_fold(to.to_owned(), |folder, name| path_of(&folder, name));
        let Some(target) = target else {
            fetched.skipped.push((shown, "no file here can have that name".into()));
            return Walk::Past;
        };
        let outcome = match entry.kind {
            Kind::Folder => make_folder(&target, fetched),
            _ => file(files, path, entry, &target, fetched),
        };
        match outcome {
            Ok(()) => Walk::On,
            Err(failure) => {
                trouble = Some(failure);
                Walk::End
            }
        }
    });
    trouble.map_or(Ok(()), Err)
}

/// A name in a folder of ours; none if it would be another place.
fn path_of(folder: &Path, name: &[u8]) -> Option<PathBuf> {
    let is_name = !name.is_empty()
        && ![&b"."[..], b".."].contains(&name)
        && !name.iter().any(|byte| [0, b'/'].contains(byte))
        && name.len() <= 255;
    is_name.then(|| folder.join(std::ffi::OsStr::from_bytes(name)))
}

fn make_folder(path: &Path, fetched: &mut Fetched) -> Result<(), Failure> {
    fs::create_dir(path).map_err(|error| Failure::io("make the folder", path, &error))?;
    fetched.folders += 1;
    Ok(())
}

/// Fetches one file. What only the guest is to blame for is noted; what is wrong here ends all.
fn file(
    files: &dyn FileSystem,
    path: &[u8],
    entry: &Entry,
    to: &Path,
    fetched: &mut Fetched,
) -> Result<(), Failure> {
    let why = match &entry.kind {
        Kind::File => None,
        Kind::Link(target) => Some(format!("a link to {}", text(target))),
        Kind::Folder | Kind::Other => Some("a device, a socket or a pipe".into()),
    };
    if let Some(why) = why {
        fetched.skipped.push((text(path), why));
        return Ok(());
    }
    let here = |error: io::Error| Failure::io("write", to, &error);
    let mut out = Sparse { file: File::create_new(to).map_err(here)?, at: 0, failed: None };
    let read = files.read(path, &mut out);
    if let Some(error) = out.failed.take() {
        return Err(here(error));
    }
    out.file.set_len(out.at).map_err(here)?;
    let modified = u64::try_from(entry.modified_s).ok().map(Duration::from_secs);
    if let Some(at) = modified.and_then(|since| UNIX_EPOCH.checked_add(since)) {
        let _ = out.file.set_modified(at);
    }
    match read {
        Ok(bytes) => (fetched.files, fetched.bytes) = (fetched.files + 1, fetched.bytes + bytes),
        Err(error) => {
            let _ = fs::remove_file(to);
            fetched.skipped.push((text(path), error.to_string()));
        }
    }
    Ok(())
}

/// A file in which zeros are holes: a guest's file may say that it has terabytes of them.
struct Sparse {
    file: File,
    at: u64,
    failed: Option<io::Error>,
}

impl Sparse {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(HOLE_BYTES) {
            match piece.iter().all(|byte| *byte == 0) {
                true => drop(self.file.seek(SeekFrom::Current(piece.len() as i64))?),
                false => self.file.write_all(piece)?,
            }
            self.at += piece.len() as u64;
        }
        Ok(())
    }
}

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.put(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let kind = error.kind();
                self.failed = Some(error);
                Err(kind.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system as an attacker would like to write one.
    struct Hostile;

    impl FileSystem for Hostile {
        fn entry(&self, path: &[u8]) -> Result<Entry, inside::Error> {
            Ok(named(path, if path == b"/x" { Kind::Folder } else { Kind::File }))
        }
        fn list(&self, path: &[u8]) -> Result<Vec<Entry>, inside::Error> {
            if path != b"/x" {
                return Ok(Vec::new());
            }
            Ok(vec![
                named(b"..", Kind::Folder),
                named(b"../../out", Kind::File),
                named(b"/abs", Kind::File),
                named(b"zero\0", Kind::File),
                named(b"link", Kind::Link(b"/".to_vec())),
                named(b"good", Kind::File),
            ])
        }
        fn read(&self, _: &[u8], to: &mut dyn Write) -> Result<u64, inside::Error> {
            to.write_all(&vec![0; 1 << 20])?;
            to.write_all(b"end")?;
            Ok((1 << 20) + 3)
        }
    }

    fn named(name: &[u8], kind: Kind) -> Entry {
        Entry { name: name.to_vec(), kind, size_bytes: 0, modified_s: i64::MIN, mode: None }
    }

    #[test]
    fn nothing_is_written_beside_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("a/b");
        fs::create_dir_all(&to).unwrap();
        let place = Place { volume: "vda".into(), path: b"/x".to_vec() };
        let mut fetched = Fetched::default();
        folder(&Hostile, &place, &to.join("x"), &mut fetched, &AtomicBool::new(false)).unwrap();
        let names = |dir: &Path| {
            let mut names: Vec<_> = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!((names(dir.path()), names(&to)), (vec!["a".to_owned()], vec!["x".to_owned()]));
        // A name with a slash in it is a path within the folder at most: its parts are looked at one by one.
        assert!(names(&to.join("x")).iter().all(|name| ["abs", "good"].contains(&name.as_str())));
        let good = fs::metadata(to.join("x/good")).unwrap();
        assert_eq!(good.len(), (1 << 20) + 3);
        assert!(std::os::unix::fs::MetadataExt::blocks(&good) < 64, "zeros are a hole");
        assert!(fetched.skipped.iter().any(|(path, _)| path.ends_with("link")));
        assert!(folder(&Hostile, &place, &to.join("x"), &mut fetched, &AtomicBool::new(false)).is_err());
    }
}
