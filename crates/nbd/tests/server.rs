//! The server with our own client: what holds between the two, and at the server's limits.

mod support;

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nbd::codec::ExportFlags;
use nbd::{
    BASE_ALLOCATION, Client, DirtyExtent, Disk, Errno, ErrorKind, FileDisk, Limits, Server, StatusExtent,
    dirty_extents,
};
use support::{Ours, pattern, sparse_file};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A disk of 256 MiB whose reads of the first MiB wait until they are let go, and which counts them.
#[derive(Default)]
struct Slow {
    let_go: Mutex<bool>,
    changed: Condvar,
    calls: AtomicUsize,
    calls_max: AtomicUsize,
    read_bytes: AtomicUsize,
}

impl Slow {
    fn let_go(&self) {
        *self.let_go.lock().unwrap() = true;
        self.changed.notify_all();
    }

    async fn reaches(&self, calls: usize) {
        while self.calls.load(Ordering::SeqCst) < calls {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Disk for Slow {
    fn size_bytes(&self) -> u64 {
        256 * MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let calls = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.calls_max.fetch_max(calls, Ordering::SeqCst);
        if offset < MIB {
            let let_go = self.let_go.lock().unwrap();
            drop(self.changed.wait_while(let_go, |let_go| !*let_go).unwrap());
        }
        self.calls.fetch_sub(1, Ordering::SeqCst);
        self.read_bytes.fetch_add(buffer.len(), Ordering::SeqCst);
        buffer.fill(7);
        Ok(())
    }
}

#[tokio::test]
async fn reads_extents_and_the_list_agree_with_the_file() {
    let ours = Ours::start();
    let path = ours.folder.path().join("disk.raw");
    sparse_file(&path, 80 * MIB + 100, &[(MIB, 5 << 20), (50 * MIB, 40 << 10)]);
    ours.show("disk", FileDisk::open(&path).unwrap());
    let client = ours.connect("disk").await;
    assert!(client.is_read_only() && client.is_multi_conn() && client.flags().has(ExportFlags::SEND_DF));
    assert_eq!(client.block_sizes().unwrap().minimum, 1);
    assert_eq!(client.contexts(), [BASE_ALLOCATION]);
    let mut whole = vec![1; client.size_bytes() as usize];
    client.read_into(0, &mut whole).await.unwrap();
    assert!(whole == std::fs::read(&path).unwrap());
    let odd = client.read(MIB - 77, 3 * MIB + 1).await.unwrap();
    assert!(odd == whole[(MIB - 77) as usize..][..(3 * MIB + 1) as usize]);
    let data = |offset, len| DirtyExtent { offset, len, zero: false };
    assert_eq!(
        dirty_extents(&client, None, 0..u64::MAX).await.unwrap(),
        [data(MIB, 5 * MIB), data(50 * MIB, 40 * KIB)]
    );
    client.read(client.size_bytes(), 0).await.unwrap();

    let empty = ours.folder.path().join("empty.raw");
    sparse_file(&empty, 0, &[]);
    ours.show("", FileDisk::open(&empty).unwrap());
    assert_eq!(ours.connect("").await.size_bytes(), 0);
    let names: Vec<_> = Client::list(ours.server.path()).await.unwrap();
    assert_eq!(names.iter().map(|export| export.name.as_str()).collect::<Vec<_>>(), ["", "disk"]);
    let unknown = Client::connect(ours.server.path(), "nobody", &[]).await.unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::UnknownExport);
    let taken = ours.server.add("disk", Arc::new(Slow::default())).unwrap_err();
    assert_eq!(taken.kind, ErrorKind::NameTaken);
    assert!(!ours.server.remove("nobody").await);
    ours.stop().await;
}

#[tokio::test]
async fn the_socket_is_for_one_user_and_goes_with_the_server() {
    let folder = support::folder();
    let path = folder.path().join("nbd.sock");
    // A server that was killed leaves its socket behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = Server::bind(&path).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let second = Server::bind(&path).unwrap_err();
    assert!(matches!(second.kind, ErrorKind::Listen(_)), "{second}");
    server.serve(async {}).await.unwrap();
    assert!(!path.exists());
    assert_eq!(server.serve(async {}).await.unwrap_err().kind, ErrorKind::Served);
    // The first one does not remove the next one's socket.
    let third = Server::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    drop(third);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    Server::bind(&path).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    Server::bind(folder.path().join("no such folder").join("s")).unwrap_err();
    Server::bind(folder.path().join("x".repeat(200))).unwrap_err();
}

#[tokio::test]
async fn an_export_is_gone_only_when_nothing_touches_its_disk() {
    let ours = Ours::start();
    let slow = Arc::new(Slow::default());
    ours.server.add("slow", slow.clone()).unwrap();
    ours.show("other", Slow::default());
    let (client, other) = (ours.connect("slow").await, ours.connect("other").await);
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    slow.reaches(1).await;
    let removal = tokio::spawn({
        let server = ours.server.clone();
        async move { server.remove("slow").await }
    });
    // The client knows at once; the disk is let go of only when its call is done.
    assert!(read.await.unwrap().unwrap_err().is_connection_lost());
    assert!(client.read(2 * MIB, 1).await.unwrap_err().is_connection_lost());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!removal.is_finished());
    slow.let_go();
    assert!(removal.await.unwrap());
    assert_eq!(Arc::strong_count(&slow), 1);
    other.read(2 * MIB, 4096).await.unwrap();
    ours.stop().await;
    assert!(other.read(2 * MIB, 4096).await.unwrap_err().is_connection_lost());
}

#[tokio::test]
async fn a_quick_reply_overtakes_a_slow_one_and_requests_are_bounded() {
    let ours = Ours::start_with(Limits { requests: 8, disk_calls: 5, ..Limits::default() });
    let slow = Arc::new(Slow::default());
    ours.server.add("slow", slow.clone()).unwrap();
    let client = ours.connect("slow").await;
    let late = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4096).await }
    });
    slow.reaches(1).await;
    assert_eq!(client.read(100 * MIB, 4096).await.unwrap(), [7; 4096][..]);
    assert!(!late.is_finished());
    let more: Vec<_> = (0..50)
        .map(|place| {
            tokio::spawn({
                let client = client.clone();
                async move { client.read(place * 4096, 4096).await }
            })
        })
        .collect();
    slow.reaches(5).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(slow.calls_max.load(Ordering::SeqCst), 5);
    slow.let_go();
    for read in more.into_iter().chain([late]) {
        read.await.unwrap().unwrap();
    }
    ours.stop().await;
}

#[tokio::test]
async fn further_connections_are_turned_away_until_one_is_free() {
    let ours = Ours::start_with(Limits { connections: 2, ..Limits::default() });
    ours.show("disk", Slow::default());
    let (first, second) = (ours.connect("disk").await, ours.connect("disk").await);
    let third = Client::connect(ours.server.path(), "disk", &[]).await.unwrap_err();
    assert!(third.is_connection_lost(), "{third}");
    drop(first);
    let until = Instant::now() + Duration::from_secs(5);
    while Client::connect(ours.server.path(), "disk", &[]).await.is_err() {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    second.read(2 * MIB, 4096).await.unwrap();
}

/// A disk where everything goes wrong in its own way.
struct Ill;

impl Disk for Ill {
    fn size_bytes(&self) -> u64 {
        64 * MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match offset / MIB {
            0 => panic!("a test's panic: the server is to survive it"),
            1 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ if offset >= 4 * MIB + 512 * KIB => Err(io::Error::other("sector not found")),
            _ => {
                buffer.fill(1);
                Ok(())
            }
        }
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        if range.start >= 32 * MIB { Ok(Vec::new()) } else { Err(io::Error::other("no map")) }
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
}

#[tokio::test]
async fn an_ill_disk_fails_requests_and_not_the_connection() {
    let ours = Ours::start();
    ours.show("ill", Ill);
    let client = ours.connect("ill").await;
    let errno = |error: nbd::Error| match error.kind {
        ErrorKind::Answered { errno, message } => (errno, message),
        other => panic!("{other}"),
    };
    assert_eq!(errno(client.read(0, 4096).await.unwrap_err()).0, Errno::EIO);
    assert_eq!(errno(client.read(MIB, 4096).await.unwrap_err()).0, Errno::EIO);
    // A long read that fails in the middle.
    let (number, words) = errno(client.read(4 * MIB, 4 * MIB).await.unwrap_err());
    assert_eq!((number, words.as_str()), (Errno::EIO, "sector not found"));
    assert_eq!(errno(client.write(0, &[1; 9000]).await.unwrap_err()).0, Errno::ENOSPC);
    assert_eq!(errno(client.write(0, &vec![1; 3 << 20]).await.unwrap_err()).0, Errno::ENOSPC);
    assert_eq!(errno(client.write_zeroes(0, MIB).await.unwrap_err()).0, Errno::EPERM);
    assert_eq!(errno(client.trim(0, MIB).await.unwrap_err()).0, Errno::EPERM);
    assert_eq!(errno(client.block_status(0, MIB).await.unwrap_err()).0, Errno::EIO);
    // A disk that says nothing has data.
    assert_eq!(client.block_status(40 * MIB, MIB).await.unwrap(), [[StatusExtent::data(MIB)]]);
    assert_eq!(client.read(3 * MIB, MIB).await.unwrap(), vec![1; 1 << 20]);
    client.flush().await.unwrap();
    ours.stop().await;
}

/// Every other block of 4 KiB is a hole.
struct Crumbled;

impl Disk for Crumbled {
    fn size_bytes(&self) -> u64 {
        2048 * MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(buffer) {
            *byte = if at / 4096 % 2 == 0 { 1 } else { 0 };
        }
        Ok(())
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        let mut at = range.start;
        let mut found = Vec::new();
        while at < range.end {
            let len = (4096 - at % 4096).min(range.end - at);
            let zeros = at / 4096 % 2 == 1;
            found.push(if zeros { StatusExtent::zeros(len) } else { StatusExtent::data(len) });
            at += len;
        }
        Ok(found)
    }
}

#[tokio::test]
async fn a_crumbled_disk_is_told_in_bounded_answers() {
    let ours = Ours::start();
    ours.show("crumbs", Crumbled);
    let client = ours.connect("crumbs").await;
    let (covered, lists) = client.block_status_some(0, 1024 * MIB).await.unwrap();
    assert_eq!((covered, lists[0].len()), (64 * MIB, 16 << 10));
    let found = dirty_extents(&client, None, 1000..200 * MIB).await.unwrap();
    assert_eq!(found.len() as u64, 200 * MIB / 8192);
    assert_eq!(found[0], DirtyExtent { offset: 1000, len: 3096, zero: false });
    let bytes = client.read(0, MIB).await.unwrap();
    assert!(bytes.chunks(4096).enumerate().all(|(index, block)| block == [1 - index as u8 % 2; 4096]));
}

#[tokio::test]
async fn a_client_that_asks_and_does_not_listen_stands_still_and_is_ended() {
    use nbd::codec::{Command, Request};
    use tokio::io::AsyncWriteExt;
    let ours = Ours::start_with(Limits { stall: Duration::from_millis(600), ..Limits::default() });
    let slow = Arc::new(Slow::default());
    ours.server.add("disk", slow.clone()).unwrap();
    let (mut theirs, ourselves) = tokio::io::duplex(64 << 10);
    let serving = tokio::spawn({
        let server = ours.server.clone();
        async move { server.serve_stream(ourselves).await }
    });
    support::raw::open(&mut theirs, "disk", true).await;
    for cookie in 0..100 {
        let (flags, offset) = (0, 2 * MIB);
        let request = Request { flags, command: Command::READ, cookie, offset, len: 32 << 20 };
        theirs.write_all(&request.encode()).await.unwrap();
    }
    serving.await.unwrap();
    // What was read fits into the memory of one connection, and what it had on its way out.
    let read_bytes = slow.read_bytes.load(Ordering::SeqCst);
    assert!(read_bytes <= 5 << 20, "{read_bytes}");
    assert!(read_bytes >= 1 << 20, "{read_bytes}");
}

#[tokio::test]
async fn many_clients_read_and_write_at_once() {
    let ours = Ours::start();
    let path = ours.folder.path().join("disk.raw");
    sparse_file(&path, 64 * MIB, &[]);
    ours.show("disk", FileDisk::open_writable(&path).unwrap());
    let mut clients = Vec::new();
    for number in 0..8u64 {
        let client = ours.connect("disk").await;
        clients.push(tokio::spawn(async move {
            let start = number * 8 * MIB;
            for step in 0..8 {
                let (offset, len) = (start + step * MIB + step * 700, 700_000);
                client.write(offset, &pattern(offset, len)).await.unwrap();
                assert!(client.read(offset, len as u64).await.unwrap() == pattern(offset, len));
            }
            client.flush().await.unwrap();
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    let file = std::fs::read(&path).unwrap();
    assert!(file[..700_000] == pattern(0, 700_000));
    ours.stop().await;
}
