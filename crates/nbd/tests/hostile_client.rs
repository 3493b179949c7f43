//! The server against clients that lie, break off or babble.

mod support;

use std::time::Duration;

use nbd::codec::{
    Command, Greeting, MetaRequest, OpenRequest, OptionCode, OptionHeader, ReplyCode, ReplyHeader, Request,
    command_flags,
};
use nbd::{BASE_ALLOCATION, Errno, FileDisk, Limits};
use proptest::prelude::*;
use support::{Ours, layer_file, pattern, raw, sparse_file};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

const SIZE: u64 = 1 << 20;

/// Our server with a read-only disk `disk` and a writable one `layer`.
fn start(limits: Limits) -> Ours {
    let ours = Ours::start_with(limits);
    let path = ours.folder.path().join("disk.raw");
    sparse_file(&path, SIZE, &[(0, 300_000)]);
    ours.show("disk", FileDisk::open(&path).unwrap());
    let below = std::sync::Arc::new(FileDisk::open(&path).unwrap());
    let layer = layer_file(&ours.folder.path().join("layer"));
    ours.show("layer", nbd::CowDisk::new(below, layer).unwrap());
    ours
}

/// A connection, and the server's side of it: to be awaited, so that a panic there shows.
fn connect(ours: &Ours) -> (DuplexStream, JoinHandle<()>) {
    let (theirs, ourselves) = tokio::io::duplex(1 << 20);
    let server = ours.server.clone();
    (theirs, tokio::spawn(async move { server.serve_stream(ourselves).await }))
}

fn request(command: Command, offset: u64, len: u32) -> Request {
    Request { flags: 0, command, cookie: 0x1234_5678_9abc_def0, offset, len }
}

/// Sends requests to an export without structured replies; each is to be answered with one of these errors.
async fn are_refused(ours: &Ours, export: &str, requests: &[(Request, Errno)]) {
    let (mut stream, serving) = connect(ours);
    raw::open(&mut stream, export, false).await;
    for (request, expected) in requests {
        stream.write_all(&request.encode()).await.unwrap();
        if request.command == Command::WRITE {
            stream.write_all(&vec![1; request.len as usize]).await.unwrap();
        }
        assert_eq!(simple_reply(&mut stream).await, Some(*expected), "{request:?}");
    }
    // Nothing was left over, nothing was missed: the connection still works.
    stream.write_all(&self::request(Command::READ, 100, 1000).encode()).await.unwrap();
    assert_eq!(simple_reply(&mut stream).await, None);
    let mut bytes = vec![0; 1000];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, pattern(100, 1000));
    stream.write_all(&self::request(Command::DISCONNECT, 0, 0).encode()).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    serving.await.unwrap();
}

async fn simple_reply(stream: &mut DuplexStream) -> Option<Errno> {
    let mut header = [0; ReplyHeader::SIMPLE_BYTES];
    stream.read_exact(&mut header).await.unwrap();
    match ReplyHeader::decode(&header[4..]).unwrap() {
        ReplyHeader::Simple { cookie: 0x1234_5678_9abc_def0, error } => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn requests_that_do_not_fit_are_refused_one_by_one() {
    let ours = start(Limits::default());
    let with_flags = |flags, request| Request { flags, ..request };
    let read = |offset, len| request(Command::READ, offset, len);
    let write = |offset, len| request(Command::WRITE, offset, len);
    are_refused(
        &ours,
        "disk",
        &[
            (read(SIZE - 1, 2), Errno::EINVAL),
            (read(u64::MAX, 1), Errno::EINVAL),
            (read(0, u32::MAX), Errno::EINVAL),
            (write(0, 4096), Errno::EPERM),
            (write(u64::MAX, 3 << 20), Errno::EPERM),
            (request(Command::TRIM, 0, 1), Errno::EPERM),
            (request(Command::WRITE_ZEROES, 0, 1), Errno::EPERM),
            (request(Command::BLOCK_STATUS, 0, 4096), Errno::EINVAL),
            (request(Command(77), 0, 4096), Errno::EINVAL),
            (with_flags(command_flags::DF, read(0, 1)), Errno::EINVAL),
            (with_flags(1 << 15, read(0, 1)), Errno::EINVAL),
        ],
    )
    .await;
    are_refused(
        &ours,
        "layer",
        &[
            (write(SIZE - 1, 2), Errno::ENOSPC),
            (write(u64::MAX, 1 << 20), Errno::ENOSPC),
            (request(Command::TRIM, SIZE, 1), Errno::ENOSPC),
            (request(Command::WRITE_ZEROES, 1, u32::MAX), Errno::ENOSPC),
            (with_flags(command_flags::REQ_ONE, write(0, 9)), Errno::EINVAL),
            (with_flags(1 << 4, request(Command::WRITE_ZEROES, 0, 1)), Errno::EINVAL),
        ],
    )
    .await;
    ours.stop().await;
}

#[tokio::test]
async fn options_are_answered_in_any_order_and_refused_one_by_one() {
    let ours = start(Limits::default());
    let (mut stream, serving) = connect(&ours);
    raw::greet(&mut stream).await;
    let open = |export: &str| OpenRequest { export: export.to_owned(), infos: vec![3, 1, 99] }.encode();
    let contexts = |export: &str, query: &str| {
        MetaRequest { export: export.to_owned(), queries: vec![query.to_owned()] }.encode()
    };
    let base = contexts("disk", BASE_ALLOCATION);
    for (option, data, expected) in [
        (OptionCode::STARTTLS, vec![], ReplyCode::ERR_UNSUP),
        (OptionCode(4711), vec![1; 60_000], ReplyCode::ERR_UNSUP),
        (OptionCode::LIST, vec![1], ReplyCode::ERR_INVALID),
        (OptionCode::SET_META_CONTEXT, base.clone(), ReplyCode::ERR_INVALID),
        (OptionCode::STRUCTURED_REPLY, vec![0], ReplyCode::ERR_INVALID),
        (OptionCode::STRUCTURED_REPLY, vec![], ReplyCode::ACK),
        (OptionCode::LIST, vec![], ReplyCode::ACK),
        (OptionCode::INFO, open("nobody"), ReplyCode::ERR_UNKNOWN),
        (OptionCode::INFO, open("disk"), ReplyCode::ACK),
        (OptionCode::INFO, vec![0xff; 7], ReplyCode::ERR_INVALID),
        (OptionCode::GO, vec![], ReplyCode::ERR_INVALID),
        (OptionCode::LIST_META_CONTEXT, contexts("disk", "base:"), ReplyCode::ACK),
        (OptionCode::LIST_META_CONTEXT, contexts("nobody", "base:"), ReplyCode::ERR_UNKNOWN),
        (OptionCode::SET_META_CONTEXT, contexts("disk", "qemu:dirty-bitmap:x"), ReplyCode::ACK),
        (OptionCode::SET_META_CONTEXT, vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], ReplyCode::ERR_INVALID),
        (OptionCode::SET_META_CONTEXT, base, ReplyCode::ACK),
        // What was chosen was chosen for another export.
        (OptionCode::GO, open("layer"), ReplyCode::ACK),
    ] {
        assert_eq!(raw::ask(&mut stream, option, &data).await, expected, "{option:?}");
    }
    stream.write_all(&request(Command::BLOCK_STATUS, 0, 4096).encode()).await.unwrap();
    let mut header = [0; 20];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(header[6..8], [0x80, 1], "an error chunk");
    drop(stream);
    serving.await.unwrap();
}

#[tokio::test]
async fn the_oldest_way_to_open_an_export_works() {
    let ours = start(Limits::default());
    for (flags, padding) in [(0u32, 124), (1, 124), (3, 0)] {
        let (mut stream, serving) = connect(&ours);
        stream.read_exact(&mut [0; Greeting::BYTES]).await.unwrap();
        stream.write_u32(flags).await.unwrap();
        let option = OptionHeader::encode_with(OptionCode::EXPORT_NAME, b"disk");
        stream.write_all(&option).await.unwrap();
        assert_eq!(stream.read_u64().await.unwrap(), SIZE);
        stream.read_u16().await.unwrap();
        stream.read_exact(&mut vec![0; padding]).await.unwrap();
        stream.write_all(&request(Command::READ, 0, 10).encode()).await.unwrap();
        assert_eq!(simple_reply(&mut stream).await, None);
        let mut bytes = [0; 10];
        stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes[..], pattern(0, 10));
        drop(stream);
        serving.await.unwrap();
    }
}

/// The server is to hang up after these bytes.
async fn ends_after(ours: &Ours, opened: bool, bytes: &[u8]) {
    let (mut stream, serving) = connect(ours);
    if opened {
        raw::open(&mut stream, "layer", true).await;
    } else {
        stream.read_exact(&mut [0; Greeting::BYTES]).await.unwrap();
    }
    stream.write_all(bytes).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut Vec::new())).await;
    ended.expect("the server is to hang up").unwrap();
    serving.await.unwrap();
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_cut_off() {
    let ours = start(Limits { handshake: Duration::from_secs(1), ..Limits::default() });
    // Flags that were not offered; options without having said so; an option that is too long.
    ends_after(&ours, false, &[0, 0, 0, 7]).await;
    ends_after(&ours, false, &[&[0; 4][..], &OptionHeader::encode_with(OptionCode::LIST, &[])].concat())
        .await;
    let mut long = OptionHeader::encode_with(OptionCode::GO, &[]);
    long[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    ends_after(&ours, false, &[&[0, 0, 0, 3][..], &long].concat()).await;
    ends_after(&ours, false, &[&[0, 0, 0, 3][..], &[0; 16]].concat()).await;
    let nobody = OptionHeader::encode_with(OptionCode::EXPORT_NAME, b"nobody");
    ends_after(&ours, false, &[&[0, 0, 0, 3][..], &nobody].concat()).await;
    // Nothing, or half of something, until the time is up.
    ends_after(&ours, false, &[]).await;
    ends_after(&ours, false, &[0, 0, 0, 3, b'I', b'H']).await;
    // A write that nobody would want to take in; no request at all.
    ends_after(&ours, true, &request(Command::WRITE, 0, u32::MAX).encode()).await;
    ends_after(&ours, true, &[0; Request::BYTES]).await;
    ours.stop().await;
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_is_cut_off_and_one_that_is_still_is_not() {
    let ours = start(Limits { stall: Duration::from_millis(500), ..Limits::default() });
    let still = ours.connect("layer").await;
    ends_after(&ours, true, &request(Command::READ, 0, 10).encode()[..20]).await;
    let begun = [&request(Command::WRITE, 0, 1 << 20).encode()[..], &vec![1; 600_000]].concat();
    ends_after(&ours, true, &begun).await;
    assert_eq!(still.read(700_000, 100).await.unwrap(), [0; 100][..], "the rest was not made up");
    ours.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_listen_to_the_negotiation_holds_nobody_up() {
    let ours = start(Limits::default());
    let disk = std::sync::Arc::new(FileDisk::open(ours.folder.path().join("disk.raw")).unwrap());
    ours.server.add("third", disk.clone()).unwrap();
    let (mut theirs, ourselves) = tokio::io::duplex(20);
    let server = ours.server.clone();
    let serving = tokio::spawn(async move { server.serve_stream(ourselves).await });
    raw::greet(&mut theirs).await;
    let request = OpenRequest { export: "third".to_owned(), infos: Vec::new() };
    theirs.write_all(&OptionHeader::encode_with(OptionCode::GO, &request.encode())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let removed = tokio::time::timeout(Duration::from_secs(5), ours.server.remove("third")).await;
    assert_eq!(removed, Ok(true));
    assert_eq!(std::sync::Arc::strong_count(&disk), 1);
    // Another disk of that name is not what the client was told of.
    ours.server.add("third", disk).unwrap();
    theirs.read_to_end(&mut Vec::new()).await.unwrap();
    serving.await.unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_behind() {
    let ours = start(Limits { connections: 3, ..Limits::default() });
    for round in 0..40u64 {
        let (mut stream, serving) = connect(&ours);
        raw::open(&mut stream, "layer", round % 2 == 0).await;
        for place in 0..40 {
            let bytes = request(Command::READ, place * 4096, 65_536).encode();
            stream.write_all(&bytes).await.unwrap();
        }
        drop(stream);
        serving.await.unwrap();
    }
    assert!(ours.server.remove("layer").await);
    ours.stop().await;
}

/// What a client might say after the greeting: options and requests, some of them right.
fn babble() -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![1..11u32, any::<u32>()];
    let names = prop_oneof![Just("disk".to_owned()), Just("layer".to_owned()), ".{0,20}"];
    let option = (code, names, prop::collection::vec(any::<u8>(), 0..40), 0..4u8).prop_map(
        |(code, export, junk, kind)| {
            let data = match kind {
                0 => junk,
                1 => OpenRequest { export, infos: vec![3] }.encode(),
                2 => MetaRequest { export, queries: vec![BASE_ALLOCATION.to_owned()] }.encode(),
                _ => Vec::new(),
            };
            OptionHeader::encode_with(OptionCode(code), &data)
        },
    );
    let place = prop_oneof![0..2 * SIZE, any::<u64>()];
    let len = prop_oneof![0..200_000u32, any::<u32>()];
    let request =
        (0..16u16, 0..9u16, any::<u64>(), place, len).prop_map(|(flags, command, cookie, offset, len)| {
            let request = Request { flags, command: Command(command), cookie, offset, len };
            let payload = if request.command == Command::WRITE { len.min(300_000) as usize } else { 0 };
            [&request.encode()[..], &vec![9; payload]].concat()
        });
    let junk = prop::collection::vec(any::<u8>(), 0..100);
    let words = prop::collection::vec(prop_oneof![2 => option, 8 => request, 1 => junk], 0..30);
    // A flipped bit, or none.
    (words, any::<prop::sample::Index>(), any::<bool>()).prop_map(|(words, place, flip)| {
        let mut bytes = words.concat();
        if flip && !bytes.is_empty() {
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << (place % 8);
        }
        bytes
    })
}

#[test]
fn no_babble_breaks_the_server() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ours = runtime.block_on(async { start(Limits::default()) });
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let said = (babble(), any::<bool>(), any::<bool>());
    runner
        .run(&said, |(bytes, opened, structured)| {
            runtime.block_on(async {
                let (mut stream, serving) = connect(&ours);
                if opened {
                    raw::open(&mut stream, "layer", structured).await;
                } else {
                    raw::greet(&mut stream).await;
                }
                let (mut input, mut output) = tokio::io::split(stream);
                let drain = tokio::spawn(async move { input.read_to_end(&mut Vec::new()).await });
                // The server may have hung up in the middle.
                let _ = output.write_all(&bytes).await;
                let _ = output.shutdown().await;
                drop(output);
                let ended = tokio::time::timeout(Duration::from_secs(20), serving).await;
                ended.expect("a client that is gone holds nothing").expect("no panic");
                drain.await.unwrap().unwrap();
            });
            Ok(())
        })
        .unwrap();
    runtime.block_on(async {
        let client = ours.connect("disk").await;
        assert_eq!(client.read(0, 300_000).await.unwrap(), pattern(0, 300_000));
        ours.stop().await;
    });
}
