//! A repository on a host with an SFTP server: temporary name, fsync, rename, and fsync again, because a file
//! system that journals makes a name durable with the file that has it. Where the server knows no fsync, its
//! own habits decide.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::ssh::{Connection, Fields, Reply};
use super::{FileKind, FileName, Storage, Trouble, TroubleKind, id_of};
use crate::id::Id;
use crate::location::{Access, Host};
use crate::partial;

/// Packs are written by this many threads.
const WRITERS: usize = 3;
/// Every server takes and gives this much in one packet.
const PIECE_BYTES: usize = 32 << 10;
/// So many packets of one file are on their way at a time.
const IN_FLIGHT: usize = 64;
/// The delays after which a connection that was lost is made anew.
const AGAIN: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];

const FSYNC: &str = "fsync@openssh.com";
const RENAME: &str = "posix-rename@openssh.com";
const SPACE: &str = "statvfs@openssh.com";

/// Types of packets.
mod packet {
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const STAT: u8 = 17;
    pub const RENAME: u8 = 18;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
    pub const EXTENDED: u8 = 200;
    pub const EXTENDED_REPLY: u8 = 201;
}

const OPEN_READ: u32 = 1;
/// Write, create, truncate.
const OPEN_WRITE: u32 = 2 | 8 | 16;

#[derive(Debug)]
pub(crate) struct SftpStorage {
    shown: String,
    host: Host,
    access: Access,
    connection: Mutex<Option<Arc<Connection>>>,
}

/// What a status means; 1 is the end of a file or list.
fn of_status(reply: &Reply) -> Trouble {
    let mut fields = Fields(&reply.body);
    let code = fields.u32().unwrap_or(4);
    let said = String::from_utf8_lossy(fields.text().unwrap_or_default()).into_owned();
    match code {
        1 => Trouble::new(TroubleKind::Short, "the file is shorter"),
        2 => Trouble::new(TroubleKind::Missing, "the server has no such file"),
        3 => Trouble::new(TroubleKind::Denied, "the server does not allow it (permission denied)"),
        6 | 7 => Trouble::unavailable("the server has lost its connection"),
        _ => Trouble::other(format!("the server says: {said}")),
    }
}

fn text(bytes: &[u8]) -> Vec<u8> {
    // Names and handles are far shorter than 4 GiB.
    [&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()[..], bytes].concat()
}

/// One open connection, with what the protocol can do.
struct Session<'a>(&'a Connection);

impl Session<'_> {
    fn ask(&self, kind: u8, body: &[&[u8]]) -> Result<Reply, Trouble> {
        self.0.wait(&self.0.send(kind, body)?)
    }

    /// Asks for what is answered by a status alone.
    fn done(&self, kind: u8, body: &[&[u8]]) -> Result<(), Trouble> {
        is_done(&self.ask(kind, body)?)
    }

    fn can(&self, extension: &str) -> bool {
        self.0.extensions.iter().any(|known| known == extension)
    }

    fn open(&self, kind: u8, path: &str, flags: &[u8]) -> Result<Handle<'_>, Trouble> {
        let reply = self.ask(kind, &[&text(path.as_bytes()), flags])?;
        match (reply.kind, Fields(&reply.body).text()) {
            (packet::HANDLE, Some(handle)) => Ok(Handle { session: self, handle: text(handle) }),
            (packet::STATUS, _) => Err(of_status(&reply)),
            _ => Err(no_protocol()),
        }
    }

    fn open_file(&self, path: &str, flags: u32) -> Result<Handle<'_>, Trouble> {
        self.open(packet::OPEN, path, &[&flags.to_be_bytes()[..], &[0; 4]].concat())
    }

    fn size(&self, path: &str) -> Result<Option<u64>, Trouble> {
        let reply = self.ask(packet::STAT, &[&text(path.as_bytes())])?;
        match reply.kind {
            packet::ATTRS => Ok(Some(Fields(&reply.body).size().unwrap_or_default())),
            packet::STATUS => match of_status(&reply) {
                trouble if trouble.kind == TroubleKind::Missing => Ok(None),
                trouble => Err(trouble),
            },
            _ => Err(no_protocol()),
        }
    }

    /// The names in a folder, with sizes.
    fn names(&self, path: &str) -> Result<Vec<(String, u64)>, Trouble> {
        let folder = match self.open(packet::OPENDIR, path, &[]) {
            Err(trouble) if trouble.kind == TroubleKind::Missing => return Ok(Vec::new()),
            folder => folder?,
        };
        let mut names = Vec::new();
        loop {
            let reply = self.ask(packet::READDIR, &[&folder.handle])?;
            if reply.kind == packet::STATUS {
                return match of_status(&reply) {
                    trouble if trouble.kind == TroubleKind::Short => Ok(names),
                    trouble => Err(trouble),
                };
            }
            let mut fields = Fields(&reply.body);
            let count = fields.u32().filter(|_| reply.kind == packet::NAME).ok_or_else(no_protocol)?;
            for _ in 0..count {
                let (Some(name), Some(_)) = (fields.text(), fields.text()) else { return Err(no_protocol()) };
                let size = fields.size().unwrap_or_default();
                names.push((String::from_utf8_lossy(name).into_owned(), size));
            }
        }
    }

    fn remove(&self, path: &str) -> Result<(), Trouble> {
        match self.done(packet::REMOVE, &[&text(path.as_bytes())]) {
            Err(trouble) if trouble.kind != TroubleKind::Missing => Err(trouble),
            _ => Ok(()),
        }
    }

    /// Makes a folder and those that it lies in; those that are there are left as they are.
    fn make_folders(&self, path: &str) -> Result<(), Trouble> {
        let mut ends: Vec<usize> =
            path.match_indices('/').map(|(place, _)| place).filter(|end| *end > 0).collect();
        ends.push(path.len());
        for end in ends {
            let folder = &path[..end];
            if self.size(folder)?.is_none()
                && let Err(trouble) = self.done(packet::MKDIR, &[&text(folder.as_bytes()), &[0; 4]])
                // Somebody else may have been faster.
                && self.size(folder)?.is_none()
            {
                return Err(trouble);
            }
        }
        Ok(())
    }

    fn move_over(&self, from: &str, to: &str) -> Result<(), Trouble> {
        let (from, to) = (text(from.as_bytes()), text(to.as_bytes()));
        if self.can(RENAME) {
            return self.done(packet::EXTENDED, &[&text(RENAME.as_bytes()), &from, &to]);
        }
        // The protocol's own renames over nothing; a file of this name would be the same one, left by a try whose
        // answer was lost.
        self.done(packet::RENAME, &[&from, &to]).or_else(|_| {
            self.done(packet::REMOVE, &[&to])?;
            self.done(packet::RENAME, &[&from, &to])
        })
    }

    fn write(&self, path: &str, temporary: &str, bytes: &[u8]) -> Result<(), Trouble> {
        let file = match self.open_file(temporary, OPEN_WRITE) {
            Err(trouble) if trouble.kind == TroubleKind::Missing => {
                self.make_folders(path.rsplit_once('/').map_or("", |(folder, _)| folder))?;
                self.open_file(temporary, OPEN_WRITE)?
            }
            file => file?,
        };
        file.write(bytes)?;
        file.sync()?;
        self.move_over(temporary, path)?;
        file.sync()?;
        file.close()
    }

    /// Whether the file system of this folder is full; a failed write does not say.
    fn is_full(&self, folder: &str, wanted: usize) -> bool {
        let free = || {
            let reply =
                self.ask(packet::EXTENDED, &[&text(SPACE.as_bytes()), &text(folder.as_bytes())]).ok()?;
            let mut fields = Fields(&reply.body);
            // Size of a block, of a fragment, blocks, free ones, those free for this user.
            let (_, fragment, _, _, free) =
                (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
            (reply.kind == packet::EXTENDED_REPLY).then_some(free.saturating_mul(fragment))
        };
        self.can(SPACE) && free().is_some_and(|free| free < wanted as u64)
    }
}

/// An open file or folder at the server.
struct Handle<'a> {
    session: &'a Session<'a>,
    handle: Vec<u8>,
}

impl Handle<'_> {
    fn write(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut on_the_way: VecDeque<Receiver<Reply>> = VecDeque::new();
        for (number, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            if on_the_way.len() == IN_FLIGHT
                && let Some(oldest) = on_the_way.pop_front()
            {
                is_done(&self.session.0.wait(&oldest)?)?;
            }
            let offset = (number * PIECE_BYTES) as u64;
            on_the_way.push_back(
                self.session.0.send(packet::WRITE, &[&self.handle, &offset.to_be_bytes(), &text(piece)])?,
            );
        }
        on_the_way.iter().try_for_each(|receiver| is_done(&self.session.0.wait(receiver)?))
    }

    fn ask_for(&self, offset: u64, len: usize) -> Result<Receiver<Reply>, Trouble> {
        let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        self.session.0.send(packet::READ, &[&self.handle, &offset.to_be_bytes(), &len])
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Trouble> {
        let mut asked: VecDeque<Receiver<Reply>> = VecDeque::new();
        let pieces = into.len().div_ceil(PIECE_BYTES);
        let piece = |number: usize, len: usize| {
            let start = number * PIECE_BYTES;
            start..(start + PIECE_BYTES).min(len)
        };
        let (mut next, len) = (0, into.len());
        for number in 0..pieces {
            while next < pieces && asked.len() < IN_FLIGHT {
                let bytes = piece(next, len);
                asked.push_back(self.ask_for(offset + bytes.start as u64, bytes.len())?);
                next += 1;
            }
            let bytes = piece(number, len);
            let Some(receiver) = asked.pop_front() else { return Err(no_protocol()) };
            let mut reply = self.session.0.wait(&receiver)?;
            let mut filled = bytes.start;
            loop {
                let data = data_of(&reply)?;
                let end = filled + data.len();
                if data.is_empty() || end > bytes.end {
                    return Err(no_protocol());
                }
                into[filled..end].copy_from_slice(data);
                filled = end;
                if filled == bytes.end {
                    break;
                }
                // A server may give less than it was asked for.
                let rest = self.ask_for(offset + filled as u64, bytes.end - filled)?;
                reply = self.session.0.wait(&rest)?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Trouble> {
        if !self.session.can(FSYNC) {
            return Ok(());
        }
        self.session.done(packet::EXTENDED, &[&text(FSYNC.as_bytes()), &self.handle])
    }

    /// Closes it, and says whether that went well; a handle that is dropped is closed all the same.
    fn close(mut self) -> Result<(), Trouble> {
        let handle = std::mem::take(&mut self.handle);
        self.session.done(packet::CLOSE, &[&handle])
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.handle.is_empty() {
            let _ = self.session.0.send(packet::CLOSE, &[&self.handle]);
        }
    }
}

fn is_done(reply: &Reply) -> Result<(), Trouble> {
    match (reply.kind, Fields(&reply.body).u32()) {
        (packet::STATUS, Some(0)) => Ok(()),
        (packet::STATUS, _) => Err(of_status(reply)),
        _ => Err(no_protocol()),
    }
}

fn data_of(reply: &Reply) -> Result<&[u8], Trouble> {
    match reply.kind {
        packet::DATA => Fields(&reply.body).text().ok_or_else(no_protocol),
        packet::STATUS => Err(of_status(reply)),
        _ => Err(no_protocol()),
    }
}

fn no_protocol() -> Trouble {
    Trouble::other("the server does not answer as SFTP has it")
}

impl SftpStorage {
    pub(crate) fn new(shown: String, host: &Host, access: &Access) -> Self {
        Self { shown, host: host.clone(), access: access.clone(), connection: Mutex::default() }
    }

    fn path_of(&self, path: &str) -> String {
        format!("{}/{path}", self.host.folder)
    }

    /// The connection, or a new one where it was lost.
    fn connection(&self) -> Result<Arc<Connection>, Trouble> {
        let mut kept = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = kept.as_ref().filter(|connection| connection.is_alive()) {
            return Ok(connection.clone());
        }
        let connection = Arc::new(Connection::open(&self.host, &self.access)?);
        *kept = Some(connection.clone());
        Ok(connection)
    }

    /// Does something, again over a new connection where one was lost.
    fn with<T>(&self, work: impl Fn(&Session<'_>) -> Result<T, Trouble>) -> Result<T, Trouble> {
        let began = SystemTime::now();
        let mut delays = AGAIN.iter();
        loop {
            let trouble = match self.connection().and_then(|connection| work(&Session(&connection))) {
                Err(trouble) if trouble.is_transient() => trouble,
                settled => return settled,
            };
            match delays.next() {
                Some(delay) if began.elapsed().unwrap_or_default() < self.access.timeout => {
                    tracing::debug!(%trouble, "connecting to the server again");
                    std::thread::sleep(*delay);
                }
                _ => return Err(trouble),
            }
        }
    }

    /// The folders that have files of this kind.
    fn folders(&self, session: &Session<'_>, kind: FileKind) -> Result<Vec<String>, Trouble> {
        let top = self.path_of(kind.folder());
        if kind != FileKind::Pack {
            return Ok(vec![top]);
        }
        let names = session.names(&top)?;
        let is_part = |name: &str| name.len() == 2 && hex::decode(name).is_ok();
        Ok(names
            .into_iter()
            .filter(|(name, _)| is_part(name))
            .map(|(name, _)| format!("{top}/{name}"))
            .collect())
    }
}

impl Storage for SftpStorage {
    fn location(&self) -> &str {
        &self.shown
    }

    /// The folders of packs are made as they are needed.
    fn create(&self) -> Result<(), Trouble> {
        self.with(|session| {
            FileKind::WITH_FOLDER
                .iter()
                .try_for_each(|kind| session.make_folders(&self.path_of(kind.folder())))
        })
    }

    fn list(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Trouble> {
        self.with(|session| {
            let mut found = Vec::new();
            for folder in self.folders(session, kind)? {
                let names = session.names(&folder)?;
                found.extend(names.into_iter().filter_map(|(name, size)| Some((id_of(&name)?, size))));
            }
            Ok(found)
        })
    }

    fn size(&self, file: &FileName) -> Result<Option<u64>, Trouble> {
        self.with(|session| session.size(&self.path_of(&file.path())))
    }

    fn read(&self, file: &FileName) -> Result<Vec<u8>, Trouble> {
        let path = self.path_of(&file.path());
        self.with(|session| {
            let len = session.size(&path)?;
            let len = len.ok_or_else(|| Trouble::new(TroubleKind::Missing, "the server has no such file"))?;
            let mut bytes = vec![0; usize::try_from(len).map_err(|_| no_protocol())?];
            session.open_file(&path, OPEN_READ)?.read(0, &mut bytes)?;
            Ok(bytes)
        })
    }

    fn read_at(&self, file: &FileName, offset: u64, into: &mut [u8]) -> Result<(), Trouble> {
        let path = self.path_of(&file.path());
        let bytes = self.with(|session| {
            let mut bytes = vec![0; into.len()];
            session.open_file(&path, OPEN_READ)?.read(offset, &mut bytes)?;
            Ok(bytes)
        })?;
        into.copy_from_slice(&bytes);
        Ok(())
    }

    fn write(&self, file: &FileName, bytes: &[u8]) -> Result<(), Trouble> {
        let path = self.path_of(&file.path());
        let temporary = partial::name(std::path::Path::new(&path));
        let temporary = temporary.to_string_lossy();
        self.with(|session| {
            session.write(&path, &temporary, bytes).map_err(|trouble| {
                if trouble.is_transient() {
                    return trouble;
                }
                let full =
                    trouble.kind == TroubleKind::Other && session.is_full(&self.host.folder, bytes.len());
                let _ = session.remove(&temporary);
                if full { Trouble::unavailable("the server has no space left") } else { trouble }
            })
        })
    }

    fn remove(&self, file: &FileName) -> Result<(), Trouble> {
        self.with(|session| session.remove(&self.path_of(&file.path())))
    }

    fn sweep(&self) {
        let swept = self.with(|session| {
            for kind in FileKind::WITH_FOLDER {
                for folder in self.folders(session, kind)? {
                    for (name, _) in session.names(&folder)? {
                        let path = format!("{folder}/{name}");
                        if partial::is_abandoned(path.as_ref()) {
                            tracing::info!(file = path, "removed what a dead process had half written");
                            session.remove(&path)?;
                        }
                    }
                }
            }
            Ok(())
        });
        if let Err(trouble) = swept {
            tracing::info!(%trouble, "what dead processes had half written could not be removed");
        }
    }

    fn writers(&self) -> usize {
        WRITERS
    }
}
