//! The folder on removable media that an initial replication is written to. `media` has the format.
//!
//! ```text
//! card ─▶ log 1 ─▶ log 2 ─▶ … ─▶ end          each: NAME.….part written ─▶ synced ─▶ renamed to NAME ─▶ folder synced
//! ```
//!
//! A file is whole or absent: what a kill leaves of one has another name, and its next attempt another name and another
//! key: a write that is still under way when its cycle is stopped goes nowhere.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use media::{CARD_FILE, Card, END_FILE, End, HEADER_BYTES, Header, Kind, MediaKey, Sealer, log_file};
use model::{Head, LogId, LogNumber, MediaId, Shipped, VmId};
use steps::durable_step;
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{Failure, FailureCode};
use crate::ports::Upload;
use crate::rows::Media;

/// What file systems and other systems leave on a disk that people call empty.
const NOT_OURS: [&str; 2] = ["lost+found", "System Volume Information"];

/// What the name of a file ends with that is being written.
const PART: &str = ".part";

/// A set in its folder.
#[derive(Debug, Clone)]
pub(crate) struct MediaFolder {
    dir: PathBuf,
    card: Card,
    key: MediaKey,
    /// A set that was begun here before, and is worth nothing.
    before: Option<MediaId>,
}

impl MediaFolder {
    pub fn new(vm: VmId, media: &Media) -> Self {
        let Media { dir, set, key, before, .. } = media.clone();
        Self { dir, card: Card { set, vm }, key, before }
    }

    /// Makes sure that the set is there: its card, written if nothing is there yet and nothing `is_begun`.
    pub async fn open(&self, is_begun: bool) -> Result<(), Failure> {
        match self.card_there().await? {
            Some(card) if card == self.card => return self.remove_files(|name| name.ends_with(PART)).await,
            Some(card) if Some(card.set) == self.before => self.discard(card.set).await?,
            Some(card) => return Err(other_set(&self.dir, card)),
            None if is_begun => {
                let message = format!(
                    "the media are not at {}: the set that was begun there is missing; mount them there again, and it goes on where it stopped",
                    self.dir.display()
                );
                return Err(Failure::transient(FailureCode::Media, message));
            }
            None => check_empty(&self.dir).await?,
        }
        self.put(CARD_FILE, &self.card.encode()).await
    }

    async fn card_there(&self) -> Result<Option<Card>, Failure> {
        card_in(&self.dir).await
    }

    /// The newest log that is whole here, of the two that it may be; a failure if it is neither.
    pub async fn head(&self, shipped: &Shipped) -> Result<Head, Failure> {
        let attempt = shipped.attempt.map(|attempt| attempt.head);
        for head in attempt.into_iter().chain([shipped.acked]) {
            if head == Head::EMPTY || self.has(head).await? {
                return Ok(head);
            }
        }
        let (dir, number) = (self.dir.display(), shipped.acked.number);
        let message = format!(
            "the media at {dir} are not as they were left: log {number} is missing or another one; bring back what was there, or begin anew in an empty folder with 'afterimage configure VM --initial media:DIR'"
        );
        Err(Failure::lasting(FailureCode::Media, message))
    }

    async fn has(&self, head: Head) -> Result<bool, Failure> {
        let path = self.dir.join(log_file(head.number));
        let mut bytes = [0; HEADER_BYTES];
        let read = async { File::open(&path).await?.read_exact(&mut bytes).await };
        match read.await {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof) => {
                return Ok(false);
            }
            Err(error) => return Err(media_failure("reading", &path, &error)),
        }
        let Card { set, vm } = self.card;
        let wanted = Header { kind: Kind::Log, set, vm, number: head.number, id: head.id };
        Ok(Header::decode(&bytes) == Ok(wanted))
    }

    /// Begins the file of a log.
    pub fn upload(&self, head: Head) -> MediaUpload {
        let Card { set, vm } = self.card;
        let header = Header { kind: Kind::Log, set, vm, number: head.number, id: head.id };
        let sealer = Sealer::new(&self.key, &header);
        let part = self.begin(log_file(head.number), &format!(".{}", head.id));
        MediaUpload { sealer, sealed: Vec::new(), part }
    }

    /// Ends the set with its newest log; gives the bytes of all logs' files.
    pub async fn close(&self, head: Head, attempt: LogId) -> Result<u64, Failure> {
        let mut files = Vec::new();
        for number in 1..=head.number.0 {
            let path = self.dir.join(log_file(LogNumber(number)));
            let file = fs::metadata(&path).await.map_err(|error| media_failure("finding", &path, &error))?;
            files.push(file.len());
        }
        let end = End { head, files };
        let file = end.encode(&self.key, self.card.set, self.card.vm, attempt).map_err(seal_failure)?;
        self.put(END_FILE, &file).await?;
        Ok(end.bytes())
    }

    /// Removes what there is of a set, the card last. Nothing else in the folder is touched.
    pub async fn discard(&self, set: MediaId) -> Result<(), Failure> {
        if self.card_there().await?.is_none_or(|card| card.set != set) {
            return Ok(());
        }
        self.remove_files(|name| name != CARD_FILE).await?;
        self.remove(CARD_FILE).await
    }

    /// Removes some of the files that are written here.
    async fn remove_files(&self, goes: impl Fn(&str) -> bool) -> Result<(), Failure> {
        for name in names(&self.dir).await? {
            if is_of_a_set(&name) && goes(&name) {
                self.remove(&name).await?;
            }
        }
        Ok(())
    }

    async fn remove(&self, name: &str) -> Result<(), Failure> {
        let path = self.dir.join(name);
        match fs::remove_file(&path).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(media_failure("removing", &path, &error))
            }
            _ => Ok(()),
        }
    }

    fn begin(&self, name: String, attempt: &str) -> Part {
        let path = self.dir.join(format!("{name}{attempt}{PART}"));
        Part { folder: self.clone(), name, path, file: None }
    }

    /// Writes a small file.
    async fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let mut part = self.begin(name.to_owned(), "");
        part.write(bytes).await?;
        part.finish().await
    }

    async fn sync_folder(&self) -> Result<(), Failure> {
        let synced = async { File::open(&self.dir).await?.sync_all().await };
        synced.await.map_err(|error| media_failure("syncing", &self.dir, &error))
    }
}

/// A log on its way into its file. Dropped before its end, what there is of it makes no log.
pub(crate) struct MediaUpload {
    sealer: Sealer,
    sealed: Vec<u8>,
    part: Part,
}

impl Upload for MediaUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        self.sealer.push(&bytes, &mut self.sealed).map_err(seal_failure)?;
        if !self.sealed.is_empty() {
            self.part.write(&self.sealed).await?;
            self.sealed.clear();
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), Failure> {
        self.sealer.finish(&mut self.sealed).map_err(seal_failure)?;
        self.part.write(&self.sealed).await?;
        self.part.finish().await
    }
}

/// A file that is being written.
struct Part {
    folder: MediaFolder,
    name: String,
    path: PathBuf,
    file: Option<File>,
}

impl Part {
    async fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = async {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(File::create(&self.path).await?),
            };
            // What the file still has in hand is an error that it has not told of.
            file.write_all(bytes).await?;
            file.flush().await
        };
        match written.await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.gives_room(&error).await),
        }
    }

    /// Makes it durable, under its own name.
    async fn finish(mut self) -> Result<(), Failure> {
        let Some(file) = self.file.take() else { return Ok(()) };
        durable_step("primary::media::written");
        if let Err(error) = file.sync_all().await {
            return Err(self.gives_room(&error).await);
        }
        durable_step("primary::media::synced");
        let target = self.folder.dir.join(&self.name);
        fs::rename(&self.path, &target).await.map_err(|error| media_failure("naming", &target, &error))?;
        durable_step("primary::media::renamed");
        self.folder.sync_folder().await?;
        durable_step("primary::media::listed");
        Ok(())
    }

    /// Takes away what could not be written to its end.
    async fn gives_room(&self, error: &std::io::Error) -> Failure {
        let _ = fs::remove_file(&self.path).await;
        media_failure("writing", &self.folder.dir.join(&self.name), error)
    }
}

/// Whether a set can be begun in a folder: it is there, and nothing is in it.
pub(crate) async fn check_empty(dir: &Path) -> Result<(), Failure> {
    if let Some(card) = card_in(dir).await? {
        return Err(other_set(dir, card));
    }
    let half_a_card = format!("{CARD_FILE}{PART}");
    let counts = |name: &String| {
        !NOT_OURS.contains(&name.as_str()) && !name.starts_with(".Trash") && *name != half_a_card
    };
    if let Some(name) = names(dir).await?.into_iter().find(counts) {
        let message = format!(
            "{} is not empty ({name}); a set of media is written into a folder of its own: make one there",
            dir.display()
        );
        return Err(Failure::lasting(FailureCode::Media, message));
    }
    Ok(())
}

/// The card in a folder, if there is one.
async fn card_in(dir: &Path) -> Result<Option<Card>, Failure> {
    let path = dir.join(CARD_FILE);
    match fs::read(&path).await {
        Ok(bytes) => Card::decode(&bytes).map(Some).map_err(|error| {
            Failure::lasting(FailureCode::Media, format!("{}: {error}; remove it", path.display()))
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(media_failure("reading", &path, &error)),
    }
}

fn other_set(dir: &Path, card: Card) -> Failure {
    let message = format!(
        "{} holds a set of media already (set {} of VM {}); remove it, or name another folder",
        dir.display(),
        card.set,
        card.vm
    );
    Failure::lasting(FailureCode::Media, message)
}

async fn names(dir: &Path) -> Result<Vec<String>, Failure> {
    let failed = |error| media_failure("reading", dir, &error);
    let mut entries = fs::read_dir(dir).await.map_err(failed)?;
    let mut names = Vec::new();
    while let Some(entry) = entries.next_entry().await.map_err(failed)? {
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Whether a file is one that this page writes, whole or in part.
fn is_of_a_set(name: &str) -> bool {
    let is_whole_or_part = |rest: &str| rest.is_empty() || rest.ends_with(PART);
    let begins_as = |file| name.strip_prefix(file).is_some_and(is_whole_or_part);
    let log = name.strip_prefix("log-").and_then(|rest| rest.split_once(".sealed"));
    let is_log = log.is_some_and(|(number, rest)| {
        number.bytes().all(|byte| byte.is_ascii_digit()) && is_whole_or_part(rest)
    });
    begins_as(CARD_FILE) || begins_as(END_FILE) || is_log
}

fn seal_failure(error: media::Error) -> Failure {
    Failure::lasting(FailureCode::Media, format!("the log could not be sealed: {error}"))
}

/// Media come and go, and room can be made on them: what fails there is tried again.
fn media_failure(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    let path = path.display();
    if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        let message = format!(
            "there is no room on the media for {path} ({error}); make some there, and it goes on where it stopped"
        );
        return Failure::transient(FailureCode::MediaFull, message);
    }
    let message =
        format!("{what} {path} failed: {error}; once the media are there again, it goes on where it stopped");
    Failure::transient(FailureCode::Media, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &Path, set: u8, before: Option<u8>) -> MediaFolder {
        let id = |byte| MediaId::from_bytes([byte; 16]);
        let media = Media {
            dir: dir.to_owned(),
            set: id(set),
            key: MediaKey::from_bytes([set; 32]),
            before: before.map(id),
            moment: None,
            written: None,
        };
        MediaFolder::new(VmId::from_bytes([1; 16]), &media)
    }

    fn head(number: u64, id: u8) -> Head {
        Head { number: LogNumber(number), id: LogId::from_bytes([id; 16]) }
    }

    async fn write(folder: &MediaFolder, head: Head, bytes: &'static [u8]) {
        let mut upload = folder.upload(head);
        upload.write(Bytes::from_static(bytes)).await.unwrap();
        upload.finish().await.unwrap();
    }

    #[tokio::test]
    async fn a_set_is_begun_in_an_empty_folder_and_in_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let missing = check_empty(&dir.path().join("nowhere")).await.unwrap_err();
        assert_eq!(missing.code, FailureCode::Media, "{missing}");
        std::fs::create_dir(dir.path().join("lost+found")).unwrap();
        folder(dir.path(), 1, None).open(false).await.unwrap();
        folder(dir.path(), 1, None).open(true).await.unwrap();
        let taken = folder(dir.path(), 2, None).open(false).await.unwrap_err();
        assert!(taken.message.contains("holds a set of media already"), "{taken}");
        assert!(!taken.transient && check_empty(dir.path()).await.is_err());

        let used = tempfile::tempdir().unwrap();
        std::fs::write(used.path().join("photo.jpg"), "of somebody").unwrap();
        let used = check_empty(used.path()).await.unwrap_err();
        assert!(used.message.contains("is not empty (photo.jpg)"), "{used}");
    }

    #[tokio::test]
    async fn a_mount_point_without_its_media_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let gone = folder(dir.path(), 1, None).open(true).await.unwrap_err();
        assert!(gone.transient && gone.message.contains("mount them there again"), "{gone}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn the_newest_log_is_the_one_whose_file_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let set = folder(dir.path(), 1, None);
        set.open(false).await.unwrap();
        let attempt =
            |head| model::LogAttempt { head, tracking: LogNumber(2), ends_cycle: true, progress: None };
        let shipped = |acked, tried| Shipped { acked, tracking: LogNumber(1), attempt: Some(attempt(tried)) };
        let first = head(1, 1);
        assert_eq!(set.head(&shipped(Head::EMPTY, first)).await.unwrap(), Head::EMPTY);
        let mut cut_off = set.upload(first);
        cut_off.write(Bytes::from(vec![7; 3 << 20])).await.unwrap();
        drop(cut_off);
        assert_eq!(set.head(&shipped(Head::EMPTY, first)).await.unwrap(), Head::EMPTY, "a part is no log");
        write(&set, first, b"one").await;
        assert_eq!(set.head(&shipped(Head::EMPTY, first)).await.unwrap(), first);
        write(&set, head(2, 3), b"two").await;
        assert_eq!(set.head(&shipped(first, head(2, 2))).await.unwrap(), first, "another attempt's");
        let lost = set.head(&shipped(head(1, 9), head(2, 2))).await.unwrap_err();
        assert!(lost.message.contains("log 1 is missing or another one"), "{lost}");
        assert_eq!(set.close(head(2, 3), LogId::from_bytes([5; 16])).await.unwrap(), 2 * (72 + 16 + 3));
    }

    #[tokio::test]
    async fn a_set_that_is_worth_nothing_goes_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let old = folder(dir.path(), 1, None);
        old.open(false).await.unwrap();
        write(&old, head(1, 1), b"one").await;
        std::fs::write(dir.path().join("log-of-the-ship.txt"), "wind from the west").unwrap();
        std::fs::write(dir.path().join("log-00000002.sealed.part"), "half").unwrap();
        let refused = folder(dir.path(), 2, Some(1)).open(false).await;
        refused.unwrap();
        let left = names(dir.path()).await.unwrap();
        assert_eq!(left, [CARD_FILE, "log-of-the-ship.txt"]);
        old.discard(MediaId::from_bytes([1; 16])).await.unwrap();
        assert_eq!(names(dir.path()).await.unwrap(), left, "the card is another set's now");
    }
}
