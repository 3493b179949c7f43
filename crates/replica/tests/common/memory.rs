//! A file system in memory, as small as can be. It writes down what is done to it, and by which thread.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use files::{Entry, File, FileSystem, Metadata, Open};

#[derive(Debug, Clone)]
enum Node {
    Folder,
    File(Arc<Mutex<Vec<u8>>>),
}

#[derive(Debug)]
pub struct Memory {
    nodes: Mutex<BTreeMap<PathBuf, Node>>,
    done: Arc<Done>,
}

/// What was done, in order, all of it on the thread that made the file system.
#[derive(Debug)]
struct Done {
    calls: Mutex<Vec<String>>,
    thread: ThreadId,
}

impl Done {
    fn note(&self, call: String) {
        assert_eq!(thread::current().id(), self.thread, "the store has a thread of its own: {call}");
        self.calls.lock().unwrap().push(call);
    }
}

impl Memory {
    pub fn new() -> Self {
        let done = Done { calls: Mutex::default(), thread: thread::current().id() };
        Self { nodes: Mutex::new([("/".into(), Node::Folder)].into()), done: Arc::new(done) }
    }

    /// All that was done so far.
    pub fn calls(&self) -> Vec<String> {
        self.done.calls.lock().unwrap().clone()
    }

    /// The paths of all files, with what is in them.
    pub fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let nodes = self.nodes.lock().unwrap();
        let file = |(path, node): (&PathBuf, &Node)| match node {
            Node::File(bytes) => Some((path.clone(), bytes.lock().unwrap().clone())),
            Node::Folder => None,
        };
        nodes.iter().filter_map(file).collect()
    }

    fn folder(&self, path: &Path) -> io::Result<()> {
        match self.nodes.lock().unwrap().get(path) {
            Some(Node::Folder) => Ok(()),
            Some(Node::File(_)) => Err(ErrorKind::NotADirectory.into()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }
}

impl FileSystem for Memory {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        self.done.note(format!("open {} {how:?}", path.display()));
        self.folder(path.parent().unwrap())?;
        let mut nodes = self.nodes.lock().unwrap();
        let bytes = match (nodes.get(path), how) {
            (Some(Node::Folder), _) => return Err(ErrorKind::IsADirectory.into()),
            (Some(_), Open::CreateNew) => return Err(ErrorKind::AlreadyExists.into()),
            (Some(Node::File(bytes)), _) => bytes.clone(),
            (None, Open::Read | Open::ReadWrite) => return Err(ErrorKind::NotFound.into()),
            (None, Open::Create | Open::CreateNew) => Arc::default(),
        };
        nodes.insert(path.to_owned(), Node::File(bytes.clone()));
        Ok(Arc::new(MemoryFile { path: path.to_owned(), bytes, done: self.done.clone() }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.done.note(format!("make {}", path.display()));
        let mut nodes = self.nodes.lock().unwrap();
        for folder in path.ancestors() {
            nodes.entry(folder.to_owned()).or_insert(Node::Folder);
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.done.note(format!("rename {} to {}", from.display(), to.display()));
        self.folder(to.parent().unwrap())?;
        let mut nodes = self.nodes.lock().unwrap();
        match nodes.remove(from) {
            Some(node @ Node::File(_)) => drop(nodes.insert(to.to_owned(), node)),
            Some(Node::Folder) => unimplemented!("the store gives no folder another name"),
            None => return Err(ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.done.note(format!("remove {}", path.display()));
        match self.nodes.lock().unwrap().remove(path) {
            Some(_) => Ok(()),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.done.note(format!("remove all of {}", path.display()));
        self.folder(path)?;
        self.nodes.lock().unwrap().retain(|node, _| !node.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.done.note(format!("sync folder {}", path.display()));
        self.folder(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.folder(path)?;
        let nodes = self.nodes.lock().unwrap();
        let within = nodes.iter().filter(|(node, _)| node.parent() == Some(path));
        let name = |node: &Path| node.file_name().map(OsString::from).unwrap();
        Ok(within
            .map(|(node, kind)| Entry { name: name(node), is_dir: matches!(kind, Node::Folder) })
            .collect())
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        match self.nodes.lock().unwrap().get(path) {
            Some(Node::Folder) => Ok(Metadata { len: 0, allocated_bytes: 0, is_file: false }),
            Some(Node::File(bytes)) => {
                let len = bytes.lock().unwrap().len() as u64;
                Ok(Metadata { len, allocated_bytes: len, is_file: true })
            }
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.folder(path).map(|()| 1 << 40)
    }
}

#[derive(Debug)]
struct MemoryFile {
    path: PathBuf,
    bytes: Arc<Mutex<Vec<u8>>>,
    done: Arc<Done>,
}

impl MemoryFile {
    fn note(&self, what: &str, offset: u64, len: u64) {
        self.done.note(format!("{what} {} {offset} {len}", self.path.display()));
    }
}

impl File for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.note("read", offset, buf.len() as u64);
        let bytes = self.bytes.lock().unwrap();
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    /// Never more than a part, so that nobody takes one write for all.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.note("write", offset, buf.len() as u64);
        let buf = &buf[..buf.len().min(10_000)];
        let mut bytes = self.bytes.lock().unwrap();
        let (start, end) = (offset as usize, offset as usize + buf.len());
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[start..end].copy_from_slice(buf);
        Ok(buf.len())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note("resize", 0, len);
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let data = range.start..range.end.min(self.len()?);
        Ok([data].into_iter().filter(|data| !data.is_empty()).collect())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.note("sync", 0, self.len()?);
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
}
