//! Files of any file system that is read here.

use std::io::Write;

use crate::detect::Content;
use crate::ext::Ext;
use crate::ntfs_files::NtfsFiles;
use crate::volumes::Volume;
use crate::{DEPTH_MAX, Error};

/// What a name in a folder stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File,
    /// A folder.
    Folder,
    /// A link to another name.
    Link(Vec<u8>),
    /// A device, a socket, a pipe.
    Other,
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name as the guest wrote it: any bytes but `/` and zero.
    pub name: Vec<u8>,
    /// What it stands for.
    pub kind: Kind,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// When it was changed last, in seconds since 1970.
    pub modified_s: i64,
    /// Its rights, as Unix writes them, where there are any.
    pub mode: Option<u16>,
}

/// The files of a volume. Paths begin with `/`, and links in them are followed within the volume.
pub trait FileSystem {
    /// What is at a path.
    fn entry(&self, path: &[u8]) -> Result<Entry, Error>;
    /// The names in a folder, in order.
    fn list(&self, path: &[u8]) -> Result<Vec<Entry>, Error>;
    /// Writes a file's bytes; gives how many.
    fn read(&self, path: &[u8], to: &mut dyn Write) -> Result<u64, Error>;
}

/// Opens the file system of a volume.
pub fn open(volume: &Volume) -> Result<Box<dyn FileSystem>, Error> {
    let source = volume.source.clone().ok_or(Error::Unsupported(volume.content))?;
    match volume.content {
        Content::Ext => Ok(Box::new(Ext::open(source)?)),
        Content::Ntfs => Ok(Box::new(NtfsFiles::open(source)?)),
        other => Err(Error::Unsupported(other)),
    }
}

/// What is told of each path of a walk.
pub type Visit<'a> = dyn FnMut(&[u8], Result<&Entry, Error>) -> Walk + 'a;

/// What a walk does after an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// Goes on, into a folder too.
    On,
    /// Goes on, and leaves this folder out.
    Past,
    /// Ends.
    End,
}

impl dyn FileSystem + '_ {
    /// Everything below a folder, each with its path, a folder before what is in it. Links are not followed. A folder
    /// that cannot be read is told with its error, and the walk goes on.
    pub fn walk(&self, from: &[u8], each: &mut Visit<'_>) {
        let mut folders = vec![(from.to_vec(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            if depth > DEPTH_MAX {
                let too_deep = Error::TooMuch("folders lie deeper in one another than is followed");
                if each(&folder, Err(too_deep)) == Walk::End {
                    return;
                }
                continue;
            }
            let entries = match self.list(&folder) {
                Ok(entries) => entries,
                Err(error) => match each(&folder, Err(error)) {
                    Walk::End => return,
                    Walk::On | Walk::Past => continue,
                },
            };
            for entry in entries {
                let path = join(&folder, &entry.name);
                match each(&path, Ok(&entry)) {
                    Walk::End => return,
                    Walk::On if entry.kind == Kind::Folder => folders.push((path, depth + 1)),
                    Walk::On | Walk::Past => {}
                }
            }
        }
    }
}

/// A name in a folder.
pub(crate) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let slash: &[u8] = if folder.ends_with(b"/") { b"" } else { b"/" };
    [folder, slash, name].concat()
}

/// Whether a name fits a pattern: `*` stands for any text, `?` for one byte; capitals make no difference.
#[must_use]
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut back) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p + 1, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || byte.eq_ignore_ascii_case(&name[n]) => {
                (p, n) = (p + 1, n + 1);
            }
            _ => match back {
                Some((after, at)) => {
                    back = Some((after, at + 1));
                    (p, n) = (after, at + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let fits = |pattern: &str, name: &str| matches(pattern.as_bytes(), name.as_bytes());
        for (pattern, name) in [
            ("*", ""),
            ("*.conf", "a.CONF"),
            ("a?c", "abc"),
            ("a*b*c", "axxbyybzc"),
            ("fstab", "fstab"),
            ("**x", "x"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("", "a"), ("a", ""), ("a?c", "ac"), ("*.conf", "conf"), ("a*b", "abc")] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn a_name_that_almost_fits_everywhere_takes_no_time() {
        assert!(!matches(&b"*a".repeat(50), &b"ab".repeat(2000)));
    }
}
