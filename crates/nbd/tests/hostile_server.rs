//! The client against servers that lie.

use nbd::codec::{
    ChunkHeader, ChunkKind, ExportFlags, Greeting, Info, MetaContext, OptionCode, OptionHeader,
    OptionReplyHeader, ReplyCode, ReplyHeader, Request, StatusChunk,
};
use nbd::{BASE_ALLOCATION, Client, ErrorKind, StatusExtent};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Negotiates with structured replies and one context, as number 5, for an export of 1 MiB.
async fn agree(stream: &mut DuplexStream) {
    stream.write_all(&Greeting { flags: 3 }.encode()).await.unwrap();
    stream.read_u32().await.unwrap();
    loop {
        let mut header = [0; OptionHeader::BYTES];
        stream.read_exact(&mut header).await.unwrap();
        let OptionHeader { option, len } = OptionHeader::decode(&header).unwrap();
        stream.read_exact(&mut vec![0; len as usize]).await.unwrap();
        if option == OptionCode::SET_META_CONTEXT {
            let context = MetaContext { id: 5, name: BASE_ALLOCATION.to_owned() };
            let reply = OptionReplyHeader::encode_with(option, ReplyCode::META_CONTEXT, &context.encode());
            stream.write_all(&reply).await.unwrap();
        }
        if option == OptionCode::GO {
            let info = Info::Export { size_bytes: 1 << 20, flags: ExportFlags(3) };
            let reply = OptionReplyHeader::encode_with(option, ReplyCode::INFO, &info.encode());
            stream.write_all(&reply).await.unwrap();
        }
        stream.write_all(&OptionReplyHeader::encode_with(option, ReplyCode::ACK, &[])).await.unwrap();
        if option == OptionCode::GO {
            return;
        }
    }
}

/// A client whose server answers the first request with what `reply` makes of its cookie, and is then still.
async fn client_answered_with(reply: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> Client {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move {
        agree(&mut theirs).await;
        let mut request = [0; Request::BYTES];
        theirs.read_exact(&mut request).await.unwrap();
        let bytes = reply(Request::decode(&request).unwrap().cookie);
        let _ = theirs.write_all(&bytes).await;
        // The client is to end it.
        let _ = theirs.read_to_end(&mut Vec::new()).await;
    });
    Client::from_stream(ours, "disk", &[BASE_ALLOCATION]).await.unwrap()
}

fn chunk(cookie: u64, done: bool, kind: ChunkKind, payload: &[u8]) -> Vec<u8> {
    let header = ChunkHeader { done, kind, cookie, len: payload.len() as u32 };
    [&header.encode()[..], payload].concat()
}

fn data(cookie: u64, done: bool, offset: u64, len: usize) -> Vec<u8> {
    chunk(cookie, done, ChunkKind::Data, &[&offset.to_be_bytes()[..], &vec![7; len]].concat())
}

/// Reads 4096 bytes at 8192; the server is to be found out.
async fn read_is_refused(reply: impl FnOnce(u64) -> Vec<u8> + Send + 'static) {
    let client = client_answered_with(reply).await;
    let error = client.read(8192, 4096).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Protocol(_)), "{error}");
    assert!(client.is_closed());
}

#[tokio::test]
async fn a_reply_that_fits_is_taken() {
    let client = client_answered_with(|cookie| {
        [data(cookie, false, 10240, 2048), data(cookie, true, 8192, 2048)].concat()
    });
    assert_eq!(client.await.read(8192, 4096).await.unwrap(), [7; 4096][..]);
}

#[tokio::test]
async fn replies_that_do_not_fit_the_read_end_the_connection() {
    read_is_refused(|cookie| data(cookie + 1, true, 8192, 4096)).await;
    read_is_refused(|cookie| data(cookie, true, 8191, 4096)).await;
    read_is_refused(|cookie| data(cookie, true, 8192, 4097)).await;
    read_is_refused(|cookie| data(cookie, true, u64::MAX, 4096)).await;
    read_is_refused(|cookie| data(cookie, true, 8192, 4095)).await;
    read_is_refused(|cookie| [data(cookie, false, 8192, 4096), data(cookie, true, 9000, 1)].concat()).await;
    read_is_refused(|cookie| ReplyHeader::encode_simple(cookie, None).to_vec()).await;
    read_is_refused(|cookie| chunk(cookie, true, ChunkKind::None, &[])).await;
    read_is_refused(|cookie| chunk(cookie, false, ChunkKind::None, &[])).await;
    read_is_refused(|_| vec![0; 64]).await;
    // Lengths that nobody would want to allocate.
    read_is_refused(|cookie| {
        ChunkHeader { done: true, kind: ChunkKind::Data, cookie, len: u32::MAX }.encode().to_vec()
    })
    .await;
    read_is_refused(|cookie| {
        ChunkHeader { done: true, kind: ChunkKind::Error, cookie, len: 1 << 20 }.encode().to_vec()
    })
    .await;
    let extents = StatusChunk { context: 5, extents: vec![StatusExtent { len: 1, flags: 0 }] };
    read_is_refused(move |cookie| chunk(cookie, true, ChunkKind::Status, &extents.encode())).await;
}

#[tokio::test]
async fn extents_that_make_no_progress_end_the_connection() {
    for (context, len) in [(5, 0), (6, 4096)] {
        let extents = StatusChunk { context, extents: vec![StatusExtent { len, flags: 0 }] };
        let client =
            client_answered_with(move |cookie| chunk(cookie, true, ChunkKind::Status, &extents.encode()))
                .await;
        let error = client.block_status(0, 1 << 20).await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Protocol(_)), "{error}");
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_disturbs_nobody() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move {
        agree(&mut theirs).await;
        let mut cookies = Vec::new();
        for _ in 0..2 {
            let mut request = [0; Request::BYTES];
            theirs.read_exact(&mut request).await.unwrap();
            cookies.push(Request::decode(&request).unwrap().cookie);
        }
        for cookie in cookies {
            theirs.write_all(&data(cookie, true, 0, 16)).await.unwrap();
        }
        let _ = theirs.read_to_end(&mut Vec::new()).await;
    });
    let client = Client::from_stream(ours, "disk", &[]).await.unwrap();
    let mut gone = Box::pin(client.read(0, 16));
    assert!(futures::poll!(&mut gone).is_pending());
    drop(gone);
    assert_eq!(client.in_flight(), 1, "its request is still on its way");
    assert_eq!(client.read(0, 16).await.unwrap(), [7; 16][..]);
    assert_eq!(client.in_flight(), 0);
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    /// Any bytes for a greeting, any for the options' replies, then the end.
    #[test]
    fn any_handshake_ends_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), greets in any::<bool>()) {
        block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            if greets {
                theirs.write_all(&Greeting { flags: 3 }.encode()).await.unwrap();
            }
            theirs.write_all(&bytes).await.unwrap();
            theirs.shutdown().await.unwrap();
            assert!(Client::from_stream(ours, "disk", &[BASE_ALLOCATION]).await.is_err());
        });
    }

    /// Chunks with any header fields but the cookie, and any payload.
    #[test]
    fn any_chunk_is_taken_or_refused(
        kind in prop::sample::select(vec![0u16, 1, 2, 5, 7, 0x8001, 0x8002, 0x8009]),
        flags in 0..4u16,
        len in prop_oneof![0..40u32, any::<u32>()],
        payload in prop::collection::vec(any::<u8>(), 0..60),
        status in any::<bool>(),
    ) {
        block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            let server = async move {
                agree(&mut theirs).await;
                let mut request = [0; Request::BYTES];
                theirs.read_exact(&mut request).await.unwrap();
                let cookie = Request::decode(&request).unwrap().cookie;
                let mut reply = 0x668e_33ef_u32.to_be_bytes().to_vec();
                reply.extend(flags.to_be_bytes());
                reply.extend(kind.to_be_bytes());
                reply.extend(cookie.to_be_bytes());
                reply.extend(len.to_be_bytes());
                reply.extend(payload);
                theirs.write_all(&reply).await.unwrap();
                theirs.shutdown().await.unwrap();
                let _ = theirs.read_to_end(&mut Vec::new()).await;
            };
            let client = async move {
                let client = Client::from_stream(ours, "disk", &[BASE_ALLOCATION]).await.unwrap();
                if status {
                    drop(client.block_status(0, 24).await);
                } else {
                    drop(client.read(0, 24).await);
                }
            };
            tokio::join!(server, client);
        });
    }
}
