//! It is good enough for what the product does with files: a database, direct writes, holes, sockets, memory
//! maps, many files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use lossy::Mount;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::unistd::{Whence, lseek};
use rusqlite::Connection;
use tempfile::TempDir;

fn mount(dir: &TempDir) -> Mount {
    Mount::new(&dir.path().join("mounted"), &dir.path().join("disk")).unwrap()
}

fn database(path: &Path, synchronous: &str) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.pragma_update(None, "journal_mode", "WAL").unwrap();
    connection.pragma_update(None, "synchronous", synchronous).unwrap();
    connection.execute_batch("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, text TEXT)").unwrap();
    connection
}

/// Commits some, loses the power, and counts what is there; panics if it is no prefix.
fn committed_and_found(seed: u64, synchronous: &str) -> (i64, i64) {
    let dir = tempfile::tempdir().unwrap();
    let mounted = mount(&dir);
    let path: PathBuf = mounted.path().join("catalog.sqlite");
    let connection = database(&path, synchronous);
    let reader = database(&path, synchronous);
    let commits = 20 + i64::try_from(seed).unwrap() % 7;
    for n in 1..=commits {
        connection.execute("INSERT INTO t VALUES (?1, ?2)", (n, "x".repeat(3000))).unwrap();
        let seen: i64 = reader.query_row("SELECT max(n) FROM t", [], |row| row.get(0)).unwrap();
        assert_eq!(seen, n, "two connections share their memory");
    }
    mounted.lose_power(seed).unwrap();
    drop((connection, reader));
    mounted.unmount().unwrap();
    let mounted = mount(&dir);
    let found = Connection::open(&path).and_then(|connection| {
        let check: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        assert_eq!(check, "ok");
        connection.query_row("SELECT count(*), coalesce(max(n), 0) FROM t", [], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
        })
    });
    drop(mounted);
    let (count, newest) = found.unwrap_or((0, 0));
    assert_eq!(count, newest, "not a prefix");
    (commits, count)
}

#[test]
fn sqlite_keeps_what_it_committed_with_full_sync_and_not_without() {
    for seed in 0..12 {
        let (committed, found) = committed_and_found(seed, "FULL");
        assert_eq!(committed, found, "seed {seed}");
    }
    let lost = (0..12).filter(|seed| {
        let (committed, found) = committed_and_found(*seed, "NORMAL");
        found < committed
    });
    assert!(lost.count() > 0, "without syncs something must be lost");
}

#[test]
fn direct_writes_holes_and_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = mount(&dir);
    let path = mounted.path().join("disk.raw");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    let direct = OpenOptions::new().write(true).custom_flags(OFlag::O_DIRECT.bits()).open(&path).unwrap();
    let buffer = vec![5_u8; 3 * 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    direct.write_all_at(&buffer[aligned..aligned + 4096], 1 << 20).unwrap();
    file.write_all_at(&[6; 1 << 20], 4 << 20).unwrap();
    assert!(file.metadata().unwrap().blocks() * 512 < 2 << 20, "holes take no room");
    let seek = |offset, whence| lseek(&file, offset, whence).unwrap();
    assert_eq!(seek(0, Whence::SeekData), 1 << 20);
    assert_eq!(seek(1 << 20, Whence::SeekHole), (1 << 20) + 4096);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 4 << 20, 1 << 20).unwrap();
    assert_eq!(lseek(&file, 2 << 20, Whence::SeekData), Err(nix::errno::Errno::ENXIO));
    let mut byte = [9];
    file.read_exact_at(&mut byte, 4 << 20).unwrap();
    assert_eq!((byte, file.metadata().unwrap().len()), ([0], 8 << 20));
    file.sync_all().unwrap();
    assert!(nix::sys::statvfs::statvfs(mounted.path()).unwrap().blocks_available() > 0);
}

#[test]
fn a_hole_that_was_not_synced_may_have_its_old_bytes() {
    let mut came_back = 0;
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let mounted = mount(&dir);
        let path = mounted.path().join("file");
        let file = File::create(&path).unwrap();
        file.write_all_at(&[7; 16384], 0).unwrap();
        file.sync_all().unwrap();
        File::open(mounted.path()).unwrap().sync_all().unwrap();
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 0, 16384).unwrap();
        mounted.lose_power(seed).unwrap();
        drop(file);
        mounted.unmount().unwrap();
        let mounted = mount(&dir);
        came_back += usize::from(fs::read(mounted.path().join("file")).unwrap().contains(&7));
    }
    assert!((1..12).contains(&came_back), "{came_back}");
}

#[test]
fn sockets_open_files_without_a_name_and_many_files() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = mount(&dir);
    let socket = mounted.path().join("control.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut near = UnixStream::connect(&socket).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    far.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");

    let path = mounted.path().join("nameless");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(b"one", 0).unwrap();
    fs::remove_file(&path).unwrap();
    File::open(mounted.path()).unwrap().sync_all().unwrap();
    file.write_all_at(b"two", 3).unwrap();
    file.sync_all().unwrap();
    let mut all = [0; 6];
    file.read_exact_at(&mut all, 0).unwrap();
    assert_eq!((&all, file.metadata().unwrap().len()), (b"onetwo", 6));

    let folder = mounted.path().join("many/deep");
    fs::create_dir_all(&folder).unwrap();
    for number in 0..2000 {
        fs::write(folder.join(format!("file-{number}")), number.to_string()).unwrap();
    }
    fs::rename(mounted.path().join("many"), mounted.path().join("more")).unwrap();
    let folder = mounted.path().join("more/deep");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2000);
    for number in 0..2000 {
        assert_eq!(fs::read_to_string(folder.join(format!("file-{number}"))).unwrap(), number.to_string());
    }
    fs::remove_dir_all(mounted.path().join("more")).unwrap();
    assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), 1);
}
