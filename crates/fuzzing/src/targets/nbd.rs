//! NBD: QEMU's server as we read it, our server as anybody may talk to it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use nbd::codec::{
    ChunkKind, ErrorChunk, Greeting, HoleChunk, Info, ListedExport, MetaContext, MetaRequest, OpenRequest,
    OptionHeader, OptionReplyHeader, ReplyHeader, Request, StatusChunk,
};
use nbd::{BASE_ALLOCATION, Client, Disk, Limits, Server, StatusExtent};

use crate::stream::{Cut, Script, block_on};

/// Everything on the wire but payloads is whole words: in words, each answer ends where a piece does.
fn cut_of(mode: u8) -> Cut {
    Cut::Bytes([4, 1, 64, usize::MAX][usize::from(mode & 3)])
}

/// The bytes are all that a server says.
pub(crate) fn client(data: &[u8]) {
    let Some((&mode, bytes)) = data.split_first() else { return };
    block_on(async {
        let script = Script::new(bytes, cut_of(mode));
        let contexts = [BASE_ALLOCATION, "qemu:dirty-bitmap:b"];
        let Ok(client) = Client::from_stream(script, "disk", &contexts).await else { return };
        let size = client.size_bytes();
        if mode & 4 != 0 {
            let covered = client.block_status(0, size.min(1 << 20)).await;
            for list in covered.iter().flatten() {
                let sum: u64 = list.iter().map(|extent| extent.len).sum();
                assert_eq!(sum, size.min(1 << 20), "a block status covers what was asked");
            }
        }
        if mode & 8 != 0 {
            let dirty = client.contexts().last().cloned();
            let _ = nbd::dirty_extents(&client, dirty.as_deref(), 0..size.min(1 << 20)).await;
        }
        if mode & 16 != 0 {
            let _ = client.flush().await;
            let _ = client.write(0, &bytes[..bytes.len().min(512)]).await;
        }
        let (first, second) = tokio::join!(client.read(0, size.min(4096)), client.read(1, 100.min(size)));
        for (read, len) in [(first, size.min(4096)), (second, size.min(100))] {
            assert!(read.is_err() || read.is_ok_and(|read| read.len() as u64 == len));
        }
    });
}

/// A disk in memory.
struct Memory(Vec<u8>);

impl Disk for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        Ok(vec![StatusExtent::data(range.end - range.start)])
    }
}

/// A disk that takes writes and forgets them.
struct Sink(u64);

impl Disk for Sink {
    fn size_bytes(&self) -> u64 {
        self.0
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset + buffer.len() as u64 <= self.0, "a read past the end of the disk");
        buffer.fill(0);
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= self.0, "a write past the end of the disk");
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, _allocate: bool) -> io::Result<()> {
        assert!(offset + len <= self.0, "zeros past the end of the disk");
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, false)
    }
}

/// The bytes are all that a client says.
pub(crate) fn server(data: &[u8]) {
    let Some((&mode, bytes)) = data.split_first() else { return };
    block_on(async {
        exports().serve_stream(Script::new(bytes, cut_of(mode))).await;
    });
}

/// One server for the whole run; its socket is never listened on.
pub(crate) fn exports() -> Server {
    static SERVER: LazyLock<Server> = LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        let _inside = runtime.enter();
        let dir = tempfile::tempdir().expect("a folder for the socket");
        let server = Server::bind_with(dir.path().join("s"), Limits::default()).expect("a socket");
        server.add("disk", Arc::new(Memory(vec![7; 64 << 10]))).expect("an export");
        server.add("", Arc::new(Sink(1 << 40))).expect("an export");
        // The listener belongs to this runtime.
        std::mem::forget(runtime);
        server
    });
    SERVER.clone()
}

/// The bytes are one part of the protocol; what decodes is encoded and decoded again.
pub(crate) fn codec(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else { return };
    match which % 13 {
        0 => fixed(bytes, Greeting::decode, |value| value.encode().to_vec()),
        1 => drop(first_chunk(bytes).map(OptionHeader::decode)),
        2 => drop(first_chunk(bytes).map(OptionReplyHeader::decode)),
        3 => again(bytes, OpenRequest::decode, OpenRequest::encode),
        4 => again(bytes, Info::decode, Info::encode),
        5 => again(bytes, MetaRequest::decode, MetaRequest::encode),
        6 => again(bytes, MetaContext::decode, MetaContext::encode),
        7 => again(bytes, ListedExport::decode, ListedExport::encode),
        8 => fixed(bytes, Request::decode, |value| value.encode().to_vec()),
        9 => reply(bytes),
        10 => again(bytes, HoleChunk::decode, HoleChunk::encode),
        11 => again(bytes, StatusChunk::decode, StatusChunk::encode),
        _ => {
            for kind in [ChunkKind::Error, ChunkKind::ErrorOffset, ChunkKind::OtherError(0x9000)] {
                let _ = ErrorChunk::decode(kind, bytes);
            }
        }
    }
}

fn first_chunk<const N: usize>(bytes: &[u8]) -> Option<&[u8; N]> {
    bytes.first_chunk()
}

fn fixed<const N: usize, T: PartialEq + std::fmt::Debug, E>(
    bytes: &[u8],
    decode: impl Fn(&[u8; N]) -> Result<T, E>,
    encode: impl Fn(&T) -> Vec<u8>,
) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(value) = decode(bytes) {
        assert_eq!(encode(&value), bytes, "{value:?}");
    }
}

fn again<T: PartialEq + std::fmt::Debug, E: std::fmt::Debug>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, E>,
    encode: impl Fn(&T) -> Vec<u8>,
) {
    if let Ok(value) = decode(bytes) {
        assert_eq!(decode(&encode(&value)).expect("what was encoded decodes"), value);
    }
}

fn reply(bytes: &[u8]) {
    let Some((magic, rest)) = bytes.split_first_chunk() else { return };
    if let Ok(len) = ReplyHeader::rest_bytes(*magic)
        && let Some(rest) = rest.get(..len)
    {
        let _ = ReplyHeader::decode(rest);
    }
}
