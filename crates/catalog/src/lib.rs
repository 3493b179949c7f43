//! The catalog of a site: one SQLite file in which everything that must change together changes
//! together.
//!
//! * WAL and `synchronous=FULL`: a change is on the disk before its caller hears of it.
//! * One writer thread; changes that wait at the same time share one commit (and one fsync), each in
//!   a savepoint of its own, so that one that fails takes nothing with it.
//! * [`Catalog::in_memory`] is the same without a file and without a thread: a change is made on its caller's.
//! * Each crate brings its own tables as numbered migrations under its own name.
//!
//! What it does not do: know what is in the tables. The log files hold the data; the catalog can be
//! rebuilt from them.

pub mod column;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

pub use rusqlite::{self, OptionalExtension, Transaction, params};
use rusqlite::{Connection, OpenFlags};
use steps::durable_step;

/// What can go wrong with the catalog.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite said no.
    #[error("the catalog {path}: {source}")]
    Sqlite {
        /// The catalog's file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The catalog was written by a newer Afterimage.
    #[error(
        "the catalog {path} was written by a newer Afterimage (tables of '{owner}' have version {found}, this program knows {known}); install that version"
    )]
    Newer {
        /// The catalog's file.
        path: PathBuf,
        /// Whose tables.
        owner: &'static str,
        /// The version in the file.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// The writer thread is gone.
    #[error("the catalog {0} is closed")]
    Closed(PathBuf),
}

impl Error {
    /// Whether the disk that holds the catalog is full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Sqlite { source: rusqlite::Error::SqliteFailure(error, _), .. }
            if error.code == rusqlite::ErrorCode::DiskFull)
    }
}

type Change = Box<dyn FnOnce(&Transaction<'_>) -> Box<dyn FnOnce(Result<(), rusqlite::Error>) + Send> + Send>;

/// At most this many changes share one commit; bounds how long the first of them waits.
const GROUP_MAX: usize = 256;

/// How many statements a connection keeps prepared, of those that ask for it (`prepare_cached`): parsing one costs more
/// than most of them do, and all owners together have some 50 that come with every cycle.
const STATEMENTS_KEPT: usize = 64;

/// A handle on the catalog; clones share the writer.
#[derive(Clone)]
pub struct Catalog {
    path: Arc<PathBuf>,
    writer: Writer,
    reader: Arc<Mutex<Connection>>,
    /// The last commit failed: this process does not find it, the next one may.
    doubtful: Arc<AtomicBool>,
}

/// Where changes are made.
#[derive(Clone)]
enum Writer {
    /// On a thread of their own, those together that wait together.
    Thread(mpsc::Sender<Change>),
    /// Where they are asked for, one by one, on the connection that is read from too.
    Caller(Arc<Guarded>),
}

/// What becomes of a change of a catalog in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is made.
    Kept,
    /// It is not made, as when the process dies before its commit.
    Lost,
    /// It is made and its caller never hears of it, as when the process dies after its commit.
    KeptUnheard,
    /// Its commit fails, and it is not made for this process; but the next one finds it, unless another change was
    /// made before. So it is in SQLite's WAL when frames are written and their sync fails: the process goes on
    /// from the frame before them, and writes its next ones over them.
    Doubtful,
}

/// A catalog in memory whose changes may go wrong.
struct Guarded {
    /// Says what becomes of the next change.
    guard: Box<dyn Fn() -> Fate + Send + Sync>,
    doubtful: Mutex<Option<Change>>,
}

impl Catalog {
    /// Opens the catalog at `path`, making it if it is not there, and starts its writer.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref().to_path_buf();
        let opened = connect(&path, OpenFlags::default()).and_then(|writer| {
            let reader = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
            reader.pragma_update(None, "query_only", true)?;
            Ok((writer, reader))
        });
        let (mut connection, reader) =
            opened.map_err(|source| Error::Sqlite { path: path.clone(), source })?;
        let (writer, changes) = mpsc::channel();
        let (shown, doubtful) = (path.clone(), Arc::new(AtomicBool::new(false)));
        let doubt = doubtful.clone();
        std::thread::Builder::new()
            .name("catalog".into())
            .spawn(move || write_loop(&mut connection, &changes, &shown, &doubt))
            .expect("a thread can be started");
        let writer = Writer::Thread(writer);
        Ok(Self { path: Arc::new(path), writer, reader: Arc::new(Mutex::new(reader)), doubtful })
    }

    /// A catalog that has no file: it lives as long as one of its clones does. Changes are made on the thread
    /// that asks for them, so the same calls in the same order have the same outcome. A query within a
    /// [`Catalog::read`] must not make a change: there is one connection.
    pub fn in_memory() -> Result<Self, Error> {
        Self::in_memory_guarded(|| Fate::Kept)
    }

    /// The same for a world in which processes die: `guard` is asked at each change what becomes of it.
    pub fn in_memory_guarded(guard: impl Fn() -> Fate + Send + Sync + 'static) -> Result<Self, Error> {
        let path = PathBuf::from(":memory:");
        let opened = Connection::open_in_memory().and_then(|connection| {
            connection.pragma_update(None, "foreign_keys", true)?;
            connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
            Ok(connection)
        });
        let reader = opened.map_err(|source| Error::Sqlite { path: path.clone(), source })?;
        let writer = Writer::Caller(Arc::new(Guarded { guard: Box::new(guard), doubtful: Mutex::default() }));
        let reader = Arc::new(Mutex::new(reader));
        Ok(Self { path: Arc::new(path), writer, reader, doubtful: Arc::default() })
    }

    /// The process that had a catalog in memory is over: from now on it is what the next process finds.
    pub fn next_process(&self) {
        if let Writer::Caller(guarded) = &self.writer
            && let Some(change) = guarded.doubtful()
        {
            commit(&mut self.connection(), vec![change], &self.path, &self.doubtful);
        }
    }

    /// Brings `owner`'s tables to the newest of `migrations` (each one or more SQL statements).
    pub fn migrate(&self, owner: &'static str, migrations: &'static [&'static str]) -> Result<(), Error> {
        let path = self.path.to_path_buf();
        durable_step("catalog::migrating");
        let version = self.write(move |tx| {
            tx.execute_batch("CREATE TABLE IF NOT EXISTS migrations (owner TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT")?;
            let version: usize = tx
                .query_row("SELECT version FROM migrations WHERE owner = ?1", [owner], |row| row.get(0))
                .optional()?
                .unwrap_or(0);
            if version < migrations.len() {
                for migration in &migrations[version..] {
                    tx.execute_batch(migration)?;
                }
                tx.execute("INSERT OR REPLACE INTO migrations VALUES (?1, ?2)", params![owner, migrations.len()])?;
            }
            Ok(version)
        })?;
        durable_step("catalog::migrated");
        if version > migrations.len() {
            return Err(Error::Newer { path, owner, found: version, known: migrations.len() });
        }
        Ok(())
    }

    /// Makes a change and returns when it is on the disk; all of it is, or nothing. Blocks: call it
    /// from a thread that may, or use [`Catalog::change`].
    pub fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(change, move |result| drop(answer.send(result)))?;
        answered.recv().map_err(|_| self.closed())?.map_err(|source| self.error(source))
    }

    /// The same for an async caller.
    pub async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        self.send(change, move |result| drop(answer.send(result)))?;
        answered.await.map_err(|_| self.closed())?.map_err(|source| self.error(source))
    }

    /// Makes sure that what this process finds is what the next one will find. A commit that fails in its sync is
    /// rolled back here, but its frames are in the WAL; where the process ends before others are written over them,
    /// the next one takes them. Whoever touches files by what the catalog says after a failure settles it first.
    pub fn settle(&self) -> Result<(), Error> {
        if self.doubtful.load(Ordering::SeqCst) {
            self.write(|tx| tx.execute("UPDATE migrations SET version = version", []))?;
        }
        Ok(())
    }

    /// Reads what has been committed. Short: small tables, from memory.
    pub fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        query(&self.connection()).map_err(|source| self.error(source))
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
        answer: impl FnOnce(rusqlite::Result<T>) + Send + 'static,
    ) -> Result<(), Error> {
        let job: Change = Box::new(move |tx| {
            let result = in_savepoint(tx, change);
            // A change that was made is not done before the group's commit is.
            Box::new(move |committed| answer(committed.and(result)))
        });
        match &self.writer {
            Writer::Thread(writer) => writer.send(job).map_err(|_| self.closed()),
            Writer::Caller(guarded) => {
                let fate = (guarded.guard)();
                match fate {
                    Fate::Lost => {}
                    Fate::Doubtful => {
                        *guarded.lock() = Some(unheard(job));
                        self.doubtful.store(true, Ordering::SeqCst);
                    }
                    Fate::Kept | Fate::KeptUnheard => {
                        drop(guarded.doubtful());
                        let job = if fate == Fate::Kept { job } else { unheard(job) };
                        commit(&mut self.connection(), vec![job], &self.path, &self.doubtful);
                    }
                }
                if fate == Fate::Kept { Ok(()) } else { Err(self.closed()) }
            }
        }
    }

    fn error(&self, source: rusqlite::Error) -> Error {
        Error::Sqlite { path: self.path.to_path_buf(), source }
    }

    fn closed(&self) -> Error {
        Error::Closed(self.path.to_path_buf())
    }
}

impl Guarded {
    fn lock(&self) -> MutexGuard<'_, Option<Change>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doubtful(&self) -> Option<Change> {
        self.lock().take()
    }
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
    Ok(connection)
}

fn in_savepoint<T>(
    tx: &Transaction<'_>,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    tx.execute_batch("SAVEPOINT change")?;
    let result = change(tx);
    let end = if result.is_ok() { "RELEASE change" } else { "ROLLBACK TO change; RELEASE change" };
    tx.execute_batch(end)?;
    result
}

fn write_loop(
    connection: &mut Connection,
    changes: &mpsc::Receiver<Change>,
    path: &Path,
    doubtful: &AtomicBool,
) {
    while let Ok(first) = changes.recv() {
        let group = std::iter::once(first).chain(changes.try_iter().take(GROUP_MAX - 1)).collect();
        commit(connection, group, path, doubtful);
    }
}

/// Makes some changes in one transaction, and then answers each.
fn commit(connection: &mut Connection, group: Vec<Change>, path: &Path, doubtful: &AtomicBool) {
    let mut answers = Vec::with_capacity(group.len());
    let committed = connection.transaction().and_then(|tx| {
        answers.extend(group.into_iter().map(|change| change(&tx)));
        durable_step("catalog::committing");
        tx.commit()?;
        durable_step("catalog::committed");
        Ok(())
    });
    // Before anybody hears of it.
    doubtful.store(committed.is_err(), Ordering::SeqCst);
    if let Err(error) = &committed {
        tracing::error!(%error, catalog = %path.display(), "a commit failed; this process goes on without it");
    }
    for answer in answers {
        answer(committed.as_ref().copied().map_err(again));
    }
}

/// A change whose caller is not told how it went.
fn unheard(change: Change) -> Change {
    Box::new(move |tx| {
        drop(change(tx));
        Box::new(|_| ())
    })
}

/// The failure of a commit, for each of the changes that shared it.
fn again(error: &rusqlite::Error) -> rusqlite::Error {
    let code =
        error.sqlite_error().copied().unwrap_or(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR));
    rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: &[&str] = &["CREATE TABLE t (n INTEGER PRIMARY KEY) STRICT"];

    fn catalog() -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path().join("catalog.sqlite")).unwrap();
        catalog.migrate("test", TABLES).unwrap();
        (dir, catalog)
    }

    fn count(catalog: &Catalog) -> usize {
        catalog.read(|c| c.query_row("SELECT count(*) FROM t", [], |row| row.get(0))).unwrap()
    }

    #[test]
    fn a_change_that_fails_takes_nothing_with_it() {
        let (_dir, catalog) = catalog();
        catalog.write(|tx| tx.execute("INSERT INTO t VALUES (1)", [])).unwrap();
        let failed = catalog.write(|tx| {
            tx.execute("INSERT INTO t VALUES (2)", [])?;
            tx.execute("INSERT INTO t VALUES (1)", [])
        });
        assert!(failed.is_err());
        assert_eq!(count(&catalog), 1);
    }

    #[test]
    fn without_a_file_it_is_the_same_and_lives_as_long_as_a_clone() {
        let catalog = Catalog::in_memory().unwrap();
        catalog.migrate("test", TABLES).unwrap();
        let here = std::thread::current().id();
        let there = catalog.write(move |_| Ok(std::thread::current().id())).unwrap();
        assert_eq!(here, there, "a change is made on its caller's thread");
        let failed = catalog.write(|tx| {
            tx.execute("INSERT INTO t VALUES (1)", [])?;
            tx.execute("INSERT INTO t VALUES (1)", [])
        });
        assert!(failed.is_err());
        assert_eq!(count(&catalog), 0);
        let clone = catalog.clone();
        drop(catalog);
        clone.write(|tx| tx.execute("INSERT INTO t VALUES (1)", [])).unwrap();
        assert_eq!((count(&clone.clone()), count(&clone)), (1, 1));
        assert!(clone.write(|tx| tx.execute("INSERT INTO other VALUES (1)", [])).is_err());
        assert_eq!(count(&clone), 1);
        let other = Catalog::in_memory().unwrap();
        other.migrate("test", TABLES).unwrap();
        assert_eq!(count(&other), 0, "another one is another one");
    }

    #[test]
    fn a_change_whose_commit_failed_is_found_by_the_next_process_or_was_written_over() {
        for written_over in [false, true] {
            let fates = Mutex::new(vec![Fate::Kept, Fate::Kept, Fate::Doubtful, Fate::Kept]);
            let catalog = Catalog::in_memory_guarded(move || fates.lock().unwrap().pop().unwrap()).unwrap();
            catalog.migrate("test", TABLES).unwrap();
            assert!(catalog.write(|tx| tx.execute("INSERT INTO t VALUES (1)", [])).is_err());
            assert_eq!(count(&catalog), 0, "whoever heard of the failure does not find it");
            if written_over {
                catalog.settle().unwrap();
                catalog.settle().unwrap();
            }
            catalog.next_process();
            assert_eq!(count(&catalog), usize::from(!written_over));
            assert!(written_over || catalog.settle().is_ok());
        }
    }

    #[test]
    fn without_a_file_foreign_keys_hold_and_async_callers_are_answered_at_once() {
        let catalog = Catalog::in_memory().unwrap();
        catalog
            .migrate(
                "test",
                &["CREATE TABLE a (n INTEGER PRIMARY KEY) STRICT;
                CREATE TABLE t (n INTEGER REFERENCES a ON DELETE CASCADE) STRICT;"],
            )
            .unwrap();
        let insert = |table: &str| format!("INSERT INTO {table} VALUES (1)");
        let [a, t] = ["a", "t"].map(insert);
        let early = t.clone();
        assert!(catalog.write(move |tx| tx.execute(&early, [])).is_err(), "there is no such row to point to");
        let change = catalog.change(move |tx| tx.execute(&a, []).and_then(|_| tx.execute(&t, [])));
        let change = std::pin::pin!(change);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(matches!(change.poll(&mut context), std::task::Poll::Ready(Ok(1))));
        assert_eq!(count(&catalog), 1);
        catalog.write(|tx| tx.execute("DELETE FROM a", [])).unwrap();
        assert_eq!(count(&catalog), 0);
    }

    #[test]
    fn many_writers_at_once_are_all_kept() {
        let (dir, catalog) = catalog();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let catalog = catalog.clone();
                scope.spawn(move || {
                    for n in 0..50 {
                        catalog
                            .write(move |tx| tx.execute("INSERT INTO t VALUES (?1)", [thread * 50 + n]))
                            .unwrap();
                    }
                });
            }
        });
        drop(catalog);
        assert_eq!(count(&Catalog::open(dir.path().join("catalog.sqlite")).unwrap()), 400);
    }

    #[test]
    fn a_catalog_of_a_newer_program_is_refused() {
        let (_dir, catalog) = catalog();
        catalog.write(|tx| tx.execute("UPDATE migrations SET version = 9", [])).unwrap();
        let error = catalog.migrate("test", TABLES).unwrap_err().to_string();
        assert!(error.contains("newer Afterimage"), "{error}");
    }
}
