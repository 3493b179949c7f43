//! The client against nbdkit with its filters: servers that can less, want more, are slow, fail now and then or
//! for good. It reads the right bytes or says what is wrong and where, and never hangs.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use nbd::{BASE_ALLOCATION, Client, Errno, Error, ErrorKind, Pool, Result, dirty_extents, read_plan};
use support::{Server, folder, pattern, run, sparse_file, text};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// No operation may take longer, however bad the server.
const LIMIT: Duration = Duration::from_secs(30);

async fn in_time<T>(operation: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, operation).await.expect("the client hangs")
}

async fn pool(server: &Server) -> Pool {
    in_time(Pool::connect(server.socket(), "", &[BASE_ALLOCATION], 3)).await.expect("a pool")
}

/// The server's disk, read as a cycle reads it: the extents that hold data, in several requests at once.
async fn read_all(pool: &Pool) -> Result<Vec<u8>> {
    let extents = dirty_extents(pool, None, 0..pool.size_bytes()).await?;
    let mut disk = vec![0; pool.size_bytes() as usize];
    let reads = read_plan(&extents, 64 * KIB, MIB).into_iter().map(|request| async move {
        let bytes = pool.read(request.offset, request.len).await?;
        Ok::<_, Error>((request, bytes))
    });
    for (request, bytes) in futures::future::try_join_all(reads).await? {
        for (skip, len) in request.wanted {
            let from = &bytes[skip as usize..][..len as usize];
            disk[(request.offset + skip) as usize..][..len as usize].copy_from_slice(from);
        }
    }
    Ok(disk)
}

/// A sparse file of a size that is no multiple of a block, crumbs and long runs in it.
fn image(folder: &Path) -> (String, Vec<u8>) {
    let path = folder.join("disk.raw");
    let crumbs = (0..40).map(|crumb| (20 * MIB + crumb * 3 * 4096, 4096));
    let data: Vec<_> =
        [(512, 100), (2 * MIB, 3 << 20), (40 * MIB - 700, 700)].into_iter().chain(crumbs).collect();
    sparse_file(&path, 40 * MIB, &data);
    (text(&path).to_owned(), std::fs::read(&path).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_server_can_or_cannot_the_bytes_are_right() {
    let folder = folder();
    let (file, truth) = image(folder.path());
    let servers: &[&[&str]] = &[
        &["file"],
        &["--no-sr", "file"],
        &["--mask-handshake=1", "file"],
        &["--threads=1", "file"],
        &["--filter=noextents", "file"],
        &["--filter=noparallel", "serialize=all-requests", "file"],
        &["--filter=multi-conn", "multi-conn-mode=disable", "file"],
        &["--filter=blocksize", "minblock=4096", "maxdata=65536", "file"],
        &["--filter=cacheextents", "file"],
        &["--filter=readahead", "file"],
        &["--filter=cache", "file"],
        &["--filter=cow", "file"],
        &["--filter=nocache", "--filter=nozero", "--filter=fua", "file"],
        &["--filter=stats", "statsfile=/dev/null", "file"],
        &["--filter=delay", "rdelay=5ms", "delay-extents=5ms", "file"],
        &["--filter=rate", "rate=2G", "file"],
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=512",
            "blocksize-preferred=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
            "file",
        ],
    ];
    for arguments in servers {
        // What belongs to filters comes after the plugin's name.
        let (options, parameters): (Vec<&str>, Vec<&str>) =
            arguments.iter().copied().partition(|argument| argument.starts_with("--") || *argument == "file");
        let server = Server::nbdkit(&[options, vec![&file], parameters].concat());
        let pool = pool(&server).await;
        let read = in_time(read_all(&pool)).await.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
        assert!(read == truth, "{arguments:?}");
        // At odd places, too.
        for (at, len) in [(0, 1), (511, 3), (2 * MIB - 1, 70_001), (40 * MIB - 1, 1)] {
            let exact = truth[at as usize..][..len as usize].to_vec();
            match in_time(pool.read(at, len)).await {
                Ok(bytes) => assert!(bytes == exact, "{arguments:?} at {at}"),
                Err(error) => {
                    assert!(arguments.contains(&"blocksize-minimum=512"), "{arguments:?}: {error}");
                    assert!(
                        matches!(error.kind, ErrorKind::Answered { errno: Errno::EINVAL, .. }),
                        "{error}"
                    );
                    assert_eq!(error.offset, Some(at));
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_nbdkit_makes_up_are_read_as_libnbd_reads_them() {
    let folder = folder();
    let copy = folder.path().join("copy.raw");
    for arguments in [
        &["sparse-random", "48M", "seed=7", "percent=15", "runlength=20000"][..],
        &["sparse-random", "16M", "seed=8", "percent=60", "runlength=3000", "random-content=true"],
        &["data", "data=1 2 @0x100000 ( \"Afterimage\" )*3000 @2097151 255", "size=3M"],
        &["--filter=truncate", "pattern", "1000001", "round-up=4096"],
        &["--filter=offset", "pattern", "5M", "offset=4099", "range=3M"],
        &["--filter=swab", "sparse-random", "8M", "seed=9", "swab-bits=16"],
        &["full", "2M"],
        &["--filter=truncate", "zero", "truncate=1G"],
        &["null", "1M"],
    ] {
        let server = Server::nbdkit(arguments);
        let _ = std::fs::remove_file(&copy);
        if arguments.contains(&"zero") {
            let extents = in_time(dirty_extents(&pool(&server).await, None, 0..u64::MAX)).await.unwrap();
            assert!(extents.is_empty(), "{extents:?}");
            continue;
        }
        run("nbdcopy", &[&format!("nbd+unix:///?socket={}", text(&server.socket())), text(&copy)]);
        let read = in_time(read_all(&pool(&server).await)).await.unwrap();
        assert!(read == std::fs::read(&copy).unwrap(), "{arguments:?}");
    }
}

/// One failed operation in `rate`: the error must be `errno` at a place within the range.
fn is_typed(error: &Error, operation: &str, errno: Errno, at: u64, len: u64) {
    assert!(matches!(error.kind, ErrorKind::Answered { errno: found, .. } if found == errno), "{error}");
    assert_eq!(error.operation, operation);
    let place = error.offset.expect("a place");
    assert!((at..at + len.max(1)).contains(&place), "{error} for {len} bytes at {at}");
    assert!(!error.is_connection_lost(), "{error}");
    assert!(error.to_string().contains(&format!("at byte {place}")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_now_and_then_is_read_to_the_end() {
    let folder = folder();
    let (file, truth) = image(folder.path());
    for (name, errno) in [("EIO", Errno::EIO), ("ENOMEM", Errno::ENOMEM), ("EPERM", Errno::EPERM)] {
        let error = format!("error={name}");
        let server = Server::nbdkit(&["--filter=error", "file", &file, &error, "error-rate=20%"]);
        let pool = pool(&server).await;
        let (mut failed, mut read) = (0, 0);
        for (at, len) in (0..40 * MIB).step_by(128 << 10).map(|at| (at, 128 * KIB)) {
            let bytes = loop {
                match in_time(pool.read(at, len)).await {
                    Ok(bytes) => break bytes,
                    Err(error) => is_typed(&error, "read", errno, at, len),
                }
                failed += 1;
            };
            assert!(bytes == truth[at as usize..][..len as usize], "at {at}");
            read += 1;
        }
        assert!(failed > 20 && read == 320, "{failed} failed");
        let mut refused = 0;
        for at in (0..40 * MIB).step_by(1 << 20) {
            if let Err(error) = in_time(pool.block_status(at, MIB)).await {
                is_typed(&error, "block status", errno, at, MIB);
                refused += 1;
            }
        }
        assert!(refused > 0, "block status fails, too");
        assert_eq!(pool.client().in_flight(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_fail_now_and_then_are_all_there_in_the_end() {
    let server = Server::nbdkit(&[
        "--filter=error",
        "memory",
        "8M",
        "error=ENOSPC",
        "error-rate=25%",
        "error-pread-rate=0%",
    ]);
    let client = in_time(Client::connect(server.socket(), "", &[])).await.unwrap();
    let mut model = vec![0; 8 << 20];
    let mut failed = [0; 4];
    for turn in 0..600u64 {
        let (at, len) = (turn * 7919 * 512 % (7 * MIB), 1 + turn * 977 % 60_000);
        let bytes = pattern(turn, len as usize);
        let kind = turn as usize % 4;
        loop {
            let (operation, done) = match kind {
                0 | 1 => ("write", in_time(client.write(at, &bytes)).await),
                2 => ("write zeroes", in_time(client.write_zeroes(at, len)).await),
                _ => ("trim", in_time(client.trim(at, len)).await),
            };
            let Err(error) = done else { break };
            is_typed(&error, operation, Errno::ENOSPC, at, len);
            failed[kind] += 1;
        }
        let place = &mut model[at as usize..][..len as usize];
        if kind < 2 { place.copy_from_slice(&bytes) } else { place.fill(0) }
    }
    assert!(failed.iter().all(|&count| count > 10), "{failed:?}");
    assert!(in_time(client.read(0, 8 * MIB)).await.unwrap() == model);
}

/// `checkwrite` takes whatever is there already, in any operation, and fails everything else.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_what_was_meant() {
    let folder = folder();
    let (file, truth) = image(folder.path());
    let server = Server::nbdkit(&["--filter=checkwrite", "file", &file]);
    let client = in_time(Client::connect(server.socket(), "", &[BASE_ALLOCATION])).await.unwrap();
    for (at, len) in [(0, 40 * MIB), (511, 7), (2 * MIB - 1, 65_537), (40 * MIB - 1, 1)] {
        in_time(client.write(at, &truth[at as usize..][..len as usize])).await.unwrap();
    }
    in_time(client.write_zeroes(6 * MIB, 14 * MIB)).await.unwrap();
    in_time(client.trim(6 * MIB, 14 * MIB)).await.unwrap();
    in_time(client.flush()).await.unwrap();
    let mut wrong = truth[..65536].to_vec();
    wrong[40_000] ^= 1;
    let error = in_time(client.write(0, &wrong)).await.unwrap_err();
    is_typed(&error, "write", Errno::EIO, 0, 65536);
    is_typed(
        &in_time(client.write_zeroes(2 * MIB, 512)).await.unwrap_err(),
        "write zeroes",
        Errno::EIO,
        2 * MIB,
        512,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protected_range_fails_with_its_place_and_the_rest_is_written() {
    let server = Server::nbdkit(&["--filter=protect", "memory", "1M", "protect=0x40000-0x4ffff"]);
    let client = in_time(Client::connect(server.socket(), "", &[])).await.unwrap();
    let data = vec![7; 64 << 10];
    for at in (0..MIB).step_by(64 << 10) {
        match in_time(client.write(at, &data)).await {
            Ok(()) => assert_ne!(at, 0x40000),
            Err(error) => is_typed(&error, "write", Errno::EPERM, 0x40000, 0x10000),
        }
    }
    assert!(in_time(client.read(0x40000, 0x10000)).await.unwrap().iter().all(|&byte| byte == 0));
    assert!(in_time(client.read(0x50000, 0x10000)).await.unwrap() == data);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_will_not_have_us_say_so_at_once() {
    let folder = folder();
    let keys = folder.path().join("keys.psk");
    std::fs::write(&keys, "alice:00112233445566778899aabbccddeeff\n").unwrap();
    let (keys, begun) = (format!("--tls-psk={}", text(&keys)), Instant::now());

    // One client only: a pool wants three connections.
    let one = Server::nbdkit(&["--filter=limit", "memory", "1M", "limit=1"]);
    // nbdkit shows nothing to those that are too many.
    let error = in_time(Pool::connect(one.socket(), "", &[], 3)).await.unwrap_err();
    assert!(error.is_connection_lost() || error.kind == ErrorKind::UnknownExport, "{error}");
    // Who connects alone is served, soon after the others have gone.
    let mut client = in_time(Client::connect(one.socket(), "", &[])).await;
    while client.is_err() && begun.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        client = in_time(Client::connect(one.socket(), "", &[])).await;
    }
    in_time(client.unwrap().read(0, 1)).await.unwrap();

    let old = Server::nbdkit(&["--oldstyle", "memory", "1M"]);
    let error = in_time(Client::connect(old.socket(), "", &[])).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Protocol(_) | ErrorKind::NotOffered(_)), "{error}");
    let secret = Server::nbdkit(&["--tls=require", &keys, "memory", "1M"]);
    let error = in_time(Client::connect(secret.socket(), "", &[])).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Refused { .. }), "{error}");
    assert!(error.to_string().to_lowercase().contains("tls"), "{error}");
    let strict = ["exportname=disk", "exportname-strict=true", "exportname-list=explicit"];
    let named = Server::nbdkit(&[&["--filter=exportname", "memory", "1M"][..], &strict].concat());
    let error = in_time(Client::connect(named.socket(), "other", &[])).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::UnknownExport | ErrorKind::Refused { .. }), "{error}");
    in_time(Client::connect(named.socket(), "disk", &[])).await.unwrap();
    let names: Vec<_> =
        in_time(Client::list(named.socket())).await.unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["disk"]);
    let empty = Server::nbdkit(&["memory", "0"]);
    let client = in_time(Client::connect(empty.socket(), "", &[BASE_ALLOCATION])).await.unwrap();
    assert_eq!(client.size_bytes(), 0);
    assert!(in_time(dirty_extents(&client, None, 0..u64::MAX)).await.unwrap().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(20), "at once, not after a time limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_cannot_is_not_asked_of_it() {
    let server = Server::nbdkit(&["--filter=nozero", "memory", "1M", "zeromode=none"]);
    let client = in_time(Client::connect(server.socket(), "", &[])).await.unwrap();
    let error = in_time(client.write_zeroes(0, 4096)).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NotOffered(_)), "{error}");
    in_time(client.write(0, &[1; 4096])).await.unwrap();
    let server = Server::nbdkit(&["-r", "memory", "1M"]);
    let client = in_time(Client::connect(server.socket(), "", &[])).await.unwrap();
    assert_eq!(in_time(client.trim(0, 4096)).await.unwrap_err().kind, ErrorKind::ReadOnly);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_in_the_middle_fails_every_read_that_is_left() {
    let folder = folder();
    let (file, truth) = image(folder.path());
    let server = Server::nbdkit(&["--filter=delay", "file", &file, "rdelay=20ms"]);
    let pool = pool(&server).await;
    let reads = (0..2000u64).map(|turn| {
        let (pool, at) = (pool.clone(), turn * 12_345 % (39 * MIB));
        tokio::spawn(async move { (at, pool.read(at, 8192).await) })
    });
    let reads: Vec<_> = reads.collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.kill();
    let (mut right, mut lost) = (0, 0);
    for read in reads {
        match in_time(read).await.unwrap() {
            (at, Ok(bytes)) => {
                assert!(bytes == truth[at as usize..][..8192]);
                right += 1;
            }
            (at, Err(error)) => {
                assert!(error.is_connection_lost() && error.offset == Some(at), "{error}");
                lost += 1;
            }
        }
    }
    assert!(right > 0 && lost > 0, "{right} right, {lost} lost");
}
