//! The client against the servers of others.

mod support;

use std::os::unix::fs::FileExt;

use nbd::{
    BASE_ALLOCATION, Client, DirtyExtent, DirtyScan, Errno, ErrorKind, Pool, StatusExtent, dirty_extents,
};
use support::{Server, folder, pattern, run, text};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A sparse raw file of 64 MiB with data at these places (offset, length).
fn sparse(path: &std::path::Path, data: &[(u64, usize)]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(64 * MIB).unwrap();
    for &(offset, len) in data {
        file.write_all_at(&pattern(offset, len), offset).unwrap();
    }
}

fn data(offset: u64, len: u64) -> DirtyExtent {
    DirtyExtent { offset, len, zero: false }
}

fn zero(offset: u64, len: u64) -> DirtyExtent {
    DirtyExtent { offset, len, zero: true }
}

#[tokio::test]
async fn holes_of_a_raw_file_are_told_from_data() {
    let folder = folder();
    let path = folder.path().join("disk.raw");
    sparse(&path, &[(MIB, 65536), (5 * MIB, 4096), (64 * MIB - 8192, 8192)]);
    let image = text(&path).to_owned();
    let server = Server::qemu_nbd(folder, &["-r", "-f", "raw", &image]);
    let client = Client::connect(server.socket(), "", &[BASE_ALLOCATION]).await.unwrap();
    assert_eq!(client.size_bytes(), 64 * MIB);
    assert!(client.is_read_only() && client.is_multi_conn());
    assert_eq!(client.contexts(), [BASE_ALLOCATION]);

    let expected = [data(MIB, 65536), data(5 * MIB, 4096), data(64 * MIB - 8192, 8192)];
    assert_eq!(dirty_extents(&client, None, 0..u64::MAX).await.unwrap(), expected);
    // A window of the disk, cutting an extent on either side.
    let window = MIB + 4096..5 * MIB + 1024;
    assert_eq!(
        dirty_extents(&client, None, window).await.unwrap(),
        [data(MIB + 4096, 61440), data(5 * MIB, 1024)]
    );
    let lists = client.block_status(0, 64 * MIB).await.unwrap();
    assert_eq!(lists.len(), 1);
    assert_eq!(lists[0].iter().map(|extent| extent.len).sum::<u64>(), 64 * MIB);
    assert!(lists[0][0].has(StatusExtent::HOLE | StatusExtent::ZERO));

    // Reads across holes, at odd places, and of the whole disk (longer than one request).
    let odd = client.read(MIB - 100, 70_000).await.unwrap();
    assert_eq!(odd[..100], [0; 100]);
    assert_eq!(odd[100..65636], pattern(MIB, 65536));
    let mut whole = vec![1; 64 * MIB as usize];
    client.read_into(0, &mut whole).await.unwrap();
    assert!(whole == std::fs::read(&image).unwrap());

    assert!(matches!(client.read(64 * MIB - 1, 2).await.unwrap_err().kind, ErrorKind::OutOfBounds { .. }));
    assert!(matches!(client.read(u64::MAX, 2).await.unwrap_err().kind, ErrorKind::OutOfBounds { .. }));
    assert!(matches!(client.read(0, 33 * MIB).await.unwrap_err().kind, ErrorKind::TooLong { .. }));
    assert_eq!(client.write(0, &[1]).await.unwrap_err().kind, ErrorKind::ReadOnly);
}

#[tokio::test]
async fn a_dirty_bitmap_says_what_changed_and_allocation_what_is_zero() {
    let folder = folder();
    let path = folder.path().join("disk.qcow2");
    let image = text(&path).to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"]);
    run("qemu-io", &["-c", "write -P 1 0 16M", &image]);
    run("qemu-img", &["bitmap", "--add", "-g", "4096", "-f", "qcow2", &image, "r1"]);
    let changes = ["write -P 7 1M 8k", "write -P 8 1060864 4k", "write -z -u 4M 64k", "write -P 9 40M 4k"];
    let commands: Vec<&str> = changes.iter().flat_map(|&change| ["-c", change]).collect();
    run("qemu-io", &[&commands[..], &[&image]].concat());
    run("qemu-img", &["bitmap", "--disable", "-f", "qcow2", &image, "r1"]);
    let server = Server::qemu_nbd(folder, &["-r", "-f", "qcow2", "-B", "r1", &image]);

    let bitmap = "qemu:dirty-bitmap:r1";
    let pool =
        Pool::connect(server.socket(), "", &[BASE_ALLOCATION, "no:such-context", bitmap], 3).await.unwrap();
    assert_eq!(pool.contexts(), [BASE_ALLOCATION, bitmap]);
    let extents = dirty_extents(&pool, Some(bitmap), 0..pool.size_bytes()).await.unwrap();
    assert_eq!(
        extents,
        [data(MIB, 8 * KIB), data(1_060_864, 4 * KIB), zero(4 * MIB, 64 * KIB), data(40 * MIB, 4 * KIB)]
    );
    for extent in extents.iter().filter(|extent| !extent.zero) {
        let bytes = pool.read(extent.offset, extent.len).await.unwrap();
        assert!(bytes.iter().all(|byte| (7..=9).contains(byte)));
    }
    // Without the bitmap: all that is allocated, less what was zeroed.
    let all = dirty_extents(&pool, None, 0..u64::MAX).await.unwrap();
    assert_eq!(all.iter().map(|extent| extent.len).sum::<u64>(), 16 * MIB - 64 * KIB + 64 * KIB);
    let missing = dirty_extents(&pool, Some("qemu:dirty-bitmap:r2"), 0..1).await.unwrap_err();
    assert!(missing.to_string().contains("qemu:dirty-bitmap:r2"), "{missing}");
}

#[tokio::test]
async fn a_writable_export_takes_writes_zeros_trims_and_flushes() {
    let folder = folder();
    let path = folder.path().join("disk.raw");
    sparse(&path, &[]);
    let image = text(&path).to_owned();
    let server = Server::storage_daemon(
        folder,
        &[
            "--blockdev",
            &format!("file,node-name=disk,filename={image},discard=unmap"),
            "--export",
            "nbd,id=a,node-name=disk,name=guest,writable=on",
        ],
    );
    let client = Client::connect(server.socket(), "guest", &[]).await.unwrap();
    let bytes = pattern(0, 40 * MIB as usize);
    client.write(1000, &bytes).await.unwrap();
    client.write_zeroes(MIB, MIB).await.unwrap();
    client.trim(2 * MIB, MIB).await.unwrap();
    client.flush().await.unwrap();
    let file = std::fs::read(&image).unwrap();
    assert!(file[1000..MIB as usize] == bytes[..MIB as usize - 1000]);
    assert!(file[MIB as usize..2 * MIB as usize].iter().all(|&byte| byte == 0));
    assert!(file[3 * MIB as usize..][..1000] == bytes[3 * MIB as usize - 1000..][..1000]);
    assert!(client.block_status(0, 1).await.is_err(), "no context was asked for");

    assert_eq!(Client::list(server.socket()).await.unwrap()[0].name, "guest");
    let unknown = Client::connect(server.socket(), "nobody", &[BASE_ALLOCATION]).await.unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::UnknownExport);
    let nowhere = Client::connect(server.socket().with_extension("not"), "x", &[]).await.unwrap_err();
    assert!(matches!(nowhere.kind, ErrorKind::Connect(_)));
}

#[tokio::test]
async fn many_requests_are_in_flight_at_once() {
    // One at a time, 100 reads of 0.3 s each would take half a minute; the server works on 16 at a time.
    let server = Server::nbdkit(&["--threads=64", "--filter=delay", "pattern", "1M", "rdelay=300ms"]);
    let client = Client::connect(server.socket(), "", &[]).await.unwrap();
    let reads = (0..100u64).map(|place| {
        let client = client.clone();
        async move { (place, client.read(place * 4096, 4096).await.unwrap()) }
    });
    for (place, bytes) in futures::future::join_all(reads).await {
        for (index, word) in bytes.chunks(8).enumerate() {
            assert_eq!(word, (place * 4096 + index as u64 * 8).to_be_bytes());
        }
    }
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn a_failed_read_is_told_from_a_dead_server() {
    let server =
        Server::nbdkit(&["--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"]);
    let client = Client::connect(server.socket(), "", &[BASE_ALLOCATION]).await.unwrap();
    for _ in 0..3 {
        let error = client.read(4096, 4096).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Answered { errno: Errno::EIO, .. }), "{error}");
        assert!(error.may_be_lost_moment() && !error.is_connection_lost());
        assert_eq!(error.offset, Some(4096));
    }
    client.write(0, &[1; 4096]).await.unwrap();
}

#[tokio::test]
async fn a_server_that_dies_fails_everybody_who_waits() {
    let server = Server::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=600"]);
    let client = Client::connect(server.socket(), "", &[]).await.unwrap();
    let reads: Vec<_> = (0..20u64)
        .map(|place| {
            tokio::spawn({
                let client = client.clone();
                async move { client.read(place * 512, 512).await }
            })
        })
        .collect();
    while client.in_flight() < 20 {
        tokio::task::yield_now().await;
    }
    server.kill();
    for read in reads {
        let error = read.await.unwrap().unwrap_err();
        assert!(error.is_connection_lost(), "{error}");
        assert!(!error.may_be_lost_moment());
    }
    assert!(client.is_closed());
    assert!(client.read(0, 1).await.unwrap_err().is_connection_lost());
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn a_server_without_structured_replies_is_read_as_well() {
    let server = Server::nbdkit(&["--no-sr", "pattern", "64M"]);
    let client = Client::connect(server.socket(), "", &[BASE_ALLOCATION]).await.unwrap();
    assert!(client.contexts().is_empty());
    let bytes = client.read(8, 32 * MIB).await.unwrap();
    assert_eq!(bytes[..8], 8u64.to_be_bytes());
    // Nothing is known of zeros: everything is data.
    assert_eq!(dirty_extents(&client, None, 0..MIB).await.unwrap(), [data(0, MIB)]);
}

#[tokio::test]
async fn requests_keep_to_the_longest_that_the_server_takes() {
    let server = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=1",
        "blocksize-preferred=4096",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    ]);
    let client = Client::connect(server.socket(), "", &[]).await.unwrap();
    assert_eq!(client.block_sizes().unwrap().maximum, 65536);
    let bytes = pattern(0, 500_000);
    client.write(1, &bytes).await.unwrap();
    assert!(client.read(1, 500_000).await.unwrap() == bytes);
}

#[tokio::test]
async fn a_scan_of_a_crumbled_disk_comes_in_bounded_batches() {
    // nbdkit's memory plugin tells of pages of 32 KiB; every other one is data.
    let server = Server::nbdkit(&["memory", "8G"]);
    let client = Client::connect(server.socket(), "", &[BASE_ALLOCATION]).await.unwrap();
    let mut expected = Vec::new();
    for place in 0..64 {
        let offset = place * 128 * MIB + place * 65536;
        client.write(offset, &[7; 32768]).await.unwrap();
        expected.push(data(offset, 32768));
    }
    let mut scan = DirtyScan::new(client, None, 0..u64::MAX).unwrap();
    let (mut found, mut batches) = (Vec::new(), 0);
    while let Some(batch) = scan.next().await.unwrap() {
        batches += 1;
        found.extend(batch);
    }
    assert_eq!(found, expected);
    assert!(batches >= 8, "at most 1 GiB of disk is looked at in one batch");
}
