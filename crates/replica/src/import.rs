//! Takes in an initial replication that comes on media: the logs of a set go the way of logs from the wire.
//!
//! ```text
//! card ─▶ the VM that waits for it ─▶ end: what the set consists of ─▶ all files there, of their sizes, of their places
//!   ─▶ log after log: opened ─▶ appended ─▶ verified, durable, in the chain
//! ```
//!
//! Cut off anywhere, it goes on with the next call: with the log that was arriving, from the byte that is here. What was
//! changed, cut off or mixed up is refused with the file's name; the logs before it are good and stay.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use files::File;
use media::{
    CARD_BYTES_MAX, CARD_FILE, Card, END_FILE, End, HEADER_BYTES, Header, Kind, Opener, log_file,
    sealed_bytes,
};
use model::{Head, LogNumber, MediaId, VmId, VmName};

use crate::error::{Error, Refused, Result};
use crate::fs::Files;
use crate::rows::Awaited;
use crate::store::Store;
use crate::vm::read_exact;

/// So much of a file is read at a time.
const PIECE_BYTES: usize = 4 << 20;

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The VM.
    pub vm: VmId,
    /// What people call it.
    pub name: VmName,
    /// The logs of the set.
    pub logs: u64,
    /// Those of them that were here before.
    pub here_before: u64,
    /// The bytes of the set's files.
    pub bytes: u64,
}

/// Where an import is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwaitedMedia {
    /// The set that the replica is to begin with.
    pub set: MediaId,
    /// How many logs it has, once the primary has said that it is whole.
    pub logs: Option<LogNumber>,
    /// It is being imported.
    pub importing: bool,
}

impl Store {
    /// Imports the set in a folder, and tells how many of its bytes are in. It takes as long as reading them. What is
    /// here already is not read again.
    pub fn import_media(&self, dir: &Path, tell: impl Fn(&VmName, u64, u64)) -> Result<Imported> {
        let folder = SetFolder { files: self.files(), dir: dir.to_owned() };
        let card = folder.card()?;
        let vm = self.vm(card.vm).map_err(|_| stranger(dir, card.vm))?;
        let name = vm.live()?.row.name.clone();
        if !self.staging().importing.insert(name.clone()) {
            let message = format!("media of {name} are being imported already; wait for that to end");
            return Err(Refused::lasting("media", message).into());
        }
        let outcome = self.import_set(&folder, card, &name, &tell);
        self.staging().importing.remove(&name);
        outcome
    }

    fn import_set(
        &self,
        folder: &SetFolder,
        card: Card,
        name: &VmName,
        tell: &impl Fn(&VmName, u64, u64),
    ) -> Result<Imported> {
        let (_, awaited, head) = self.awaited(card, name, &folder.dir)?;
        let end = folder.end(card, &awaited)?;
        folder.check_files(card, &end)?;
        folder.check_begun(card, head)?;
        let (logs, bytes) = (end.files.len() as u64, end.bytes());
        let mut done: u64 = end.files.iter().take(usize::try_from(head.number.0).unwrap_or(usize::MAX)).sum();
        tell(name, done, bytes);
        for number in head.number.0 + 1..=logs {
            // It may have been given up at the other site since the last one.
            let (peer, awaited, _) = self.awaited(card, name, &folder.dir)?;
            let log = folder.log(card, LogNumber(number))?;
            self.import_log(&peer, &log, &awaited, |within| tell(name, done + within, bytes))?;
            done += log.len;
        }
        Ok(Imported { vm: card.vm, name: name.clone(), logs, here_before: head.number.0.min(logs), bytes })
    }

    /// Whose the VM is, what it waits for, and the newest log here; refused if it does not wait for this set.
    fn awaited(&self, card: Card, name: &VmName, dir: &Path) -> Result<(String, Awaited, Head)> {
        let vm = self.vm(card.vm)?;
        let state = vm.live()?;
        let (doc, dir) = (&state.row.doc, dir.display());
        let message = match &doc.media {
            Some(awaited) if awaited.set == card.set => {
                return Ok((state.row.peer.clone(), awaited.clone(), doc.head));
            }
            Some(awaited) => format!(
                "{dir} holds set {} of {name}, and the one that {name} waits for is {}: it is of an earlier attempt; bring the media that were written last",
                card.set, awaited.set
            ),
            None => format!(
                "{name} does not wait for the media in {dir}: they were imported already, or given up at {}",
                doc.primary_name
            ),
        };
        Err(Refused::lasting("media", message).into())
    }

    /// Appends a log from its file, from the byte that is here already.
    fn import_log(&self, peer: &str, log: &LogFile, awaited: &Awaited, tell: impl Fn(u64)) -> Result<()> {
        let Header { vm, number, id, .. } = log.header;
        let here = self.upload_state(peer, vm, number, id)?;
        let mut opener = Opener::new(&awaited.key, &log.header);
        let (mut piece, mut plain) = (vec![0; PIECE_BYTES], Vec::new());
        let (mut at, mut opened) = (HEADER_BYTES as u64, 0);
        // The last of it is held back until the file has shown its end.
        while at < log.len {
            let len = usize::try_from(log.len - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            read_exact(&*log.file, &log.path, &mut piece[..len], at)?;
            at += len as u64;
            opener.push(&piece[..len], &mut plain).map_err(|error| log.spoilt(&error))?;
            if at < log.len {
                opened = self.append_from(peer, log, here.offset, opened, &plain, false)?;
                plain.clear();
                tell(at);
            }
        }
        opener.finish(&mut plain).map_err(|error| log.spoilt(&error))?;
        self.append_from(peer, log, here.offset, opened, &plain, true)?;
        Ok(())
    }

    /// Appends what begins at byte `opened` of the log, as far as it lies beyond what was `here`; gives where it ends.
    fn append_from(
        &self,
        peer: &str,
        log: &LogFile,
        here: u64,
        opened: u64,
        plain: &[u8],
        last: bool,
    ) -> Result<u64> {
        let Header { vm, number, id, .. } = log.header;
        let end = opened + plain.len() as u64;
        let skipped = here.saturating_sub(opened).min(plain.len() as u64);
        let fresh = &plain[usize::try_from(skipped).unwrap_or(plain.len())..];
        if fresh.is_empty() && !last {
            return Ok(end);
        }
        let state = self.append(peer, vm, number, id, opened + skipped, fresh, last)?;
        if state.offset == end || state.durable {
            return Ok(end);
        }
        Err(Error::busy(
            vm,
            format!("log {number} was begun anew by somebody else while it was imported; import once more"),
        ))
    }
}

/// A folder with a set.
struct SetFolder {
    files: Files,
    dir: PathBuf,
}

/// A file that was opened.
struct Opened {
    file: Arc<dyn File>,
    len: u64,
    /// What it begins with.
    bytes: Vec<u8>,
}

/// The file of a log.
struct LogFile {
    path: PathBuf,
    file: Arc<dyn File>,
    len: u64,
    header: Header,
}

impl SetFolder {
    fn card(&self) -> Result<Card> {
        let path = self.dir.join(CARD_FILE);
        let none = || {
            let message = format!(
                "there are no media in {}: it has no {CARD_FILE}; name the folder that 'protect … --initial media:DIR' has written",
                self.dir.display()
            );
            Error::from(Refused::lasting("media-none", message))
        };
        let Opened { bytes, .. } = self.begin(&path, CARD_BYTES_MAX + 1)?.ok_or_else(none)?;
        Card::decode(&bytes).map_err(|error| spoilt(&path, &error))
    }

    fn end(&self, card: Card, awaited: &Awaited) -> Result<End> {
        let path = self.dir.join(END_FILE);
        let most = usize::try_from(End::file_bytes_max()).unwrap_or(usize::MAX);
        let Some(Opened { len, bytes, .. }) = self.begin(&path, most)? else {
            let message = format!(
                "the media in {} are not whole: {END_FILE} is missing; they are still being written ('afterimage status' at the other site tells how far), or not all files were brought",
                self.dir.display()
            );
            return Err(Refused::lasting("media-unfinished", message).into());
        };
        if len > End::file_bytes_max() {
            return Err(spoilt(&path, &media::Error::TooLarge));
        }
        End::decode(&bytes, &awaited.key, card.set, card.vm).map_err(|error| spoilt(&path, &error))
    }

    /// Opens a file and reads what it begins with, no more than so much. None if it is not there.
    fn begin(&self, path: &Path, bytes_max: usize) -> Result<Option<Opened>> {
        let Some(len) = self.files.len(path)? else { return Ok(None) };
        let file = self.files.open_read(path)?;
        let mut bytes = vec![0; usize::try_from(len).map_or(bytes_max, |len| len.min(bytes_max))];
        read_exact(&*file, path, &mut bytes, 0)?;
        Ok(Some(Opened { file, len, bytes }))
    }

    /// Opens the file of a log, whose header must be that of its place.
    fn log(&self, card: Card, number: LogNumber) -> Result<LogFile> {
        let path = self.dir.join(log_file(number));
        let Some(Opened { file, len, bytes }) = self.begin(&path, HEADER_BYTES)? else {
            let message = format!("{} is missing: bring all files of the set", path.display());
            return Err(Refused::lasting("media-missing", message).into());
        };
        let header = Header::decode(&bytes).map_err(|error| spoilt(&path, &error))?;
        header.check(Kind::Log, card.set, card.vm, number).map_err(|error| spoilt(&path, &error))?;
        Ok(LogFile { path, file, len, header })
    }

    /// Whether all files are there and of their sizes: better known before hours of reading than after.
    fn check_files(&self, card: Card, end: &End) -> Result<()> {
        for (place, &bytes) in end.files.iter().enumerate() {
            let log = self.log(card, LogNumber(place as u64 + 1))?;
            if log.len < bytes.max(sealed_bytes(0)) {
                return Err(log.spoilt(&media::Error::Truncated));
            }
            if log.len != bytes {
                return Err(log.spoilt(&media::Error::Field("length")));
            }
        }
        Ok(())
    }

    /// Whether the logs that are here are the set's.
    fn check_begun(&self, card: Card, head: Head) -> Result<()> {
        if head == Head::EMPTY || self.log(card, head.number)?.header.id == head.id {
            return Ok(());
        }
        let message = format!(
            "log {} of VM {} here is not that of the media in {}; what is here came another way",
            head.number,
            card.vm,
            self.dir.display()
        );
        Err(Refused::lasting("media-foreign", message).into())
    }
}

impl LogFile {
    fn spoilt(&self, error: &media::Error) -> Error {
        spoilt(&self.path, error)
    }
}

fn spoilt(path: &Path, error: &media::Error) -> Error {
    let message = format!(
        "{}: {error}; copy the file from the media once more, or write the media anew ('afterimage configure VM --initial media:DIR' where the VM runs)",
        path.display()
    );
    Refused::lasting(error.code(), message).into()
}

fn stranger(dir: &Path, vm: VmId) -> Error {
    let message = format!(
        "the media in {} are of VM {vm}, which no site has offered here: run this at the replica's site, and let the site where the VM runs reach this one once, so that the key comes over",
        dir.display()
    );
    Refused::lasting("no-such-vm", message).into()
}
