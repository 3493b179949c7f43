//! The codec: what is encoded is decoded, and no bytes make it panic.

use nbd::codec::{
    ChunkHeader, ChunkKind, Command, ErrorChunk, Greeting, HoleChunk, Info, ListedExport, MetaContext,
    MetaRequest, OpenRequest, OptionCode, OptionHeader, OptionReplyHeader, ReplyCode, ReplyHeader, Request,
    StatusChunk,
};
use nbd::{BlockSizes, Errno, ExportFlags, StatusExtent};
use proptest::prelude::*;

fn array<const N: usize>(bytes: &[u8]) -> Option<&[u8; N]> {
    bytes.first_chunk()
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = array(&bytes).map(Greeting::decode);
        let _ = array(&bytes).map(OptionHeader::decode);
        let _ = array(&bytes).map(OptionReplyHeader::decode);
        let _ = array(&bytes).map(Request::decode);
        let _ = array(&bytes).map(|magic| ReplyHeader::rest_bytes(*magic));
        let _ = ReplyHeader::decode(&bytes);
        let _ = OpenRequest::decode(&bytes);
        let _ = MetaRequest::decode(&bytes);
        let _ = MetaContext::decode(&bytes);
        let _ = ListedExport::decode(&bytes);
        let _ = Info::decode(&bytes);
        let _ = HoleChunk::decode(&bytes);
        let _ = StatusChunk::decode(&bytes);
        for kind in [ChunkKind::Error, ChunkKind::ErrorOffset, ChunkKind::OtherError(0x9000)] {
            let _ = ErrorChunk::decode(kind, &bytes);
        }
    }

    #[test]
    fn headers_come_back(flags: u16, command in 0..8u16, cookie: u64, offset: u64, len in 0..=32u32 << 20, done: bool) {
        prop_assert_eq!(Greeting::decode(&Greeting { flags }.encode()), Ok(Greeting { flags }));
        let request = Request { flags, command: Command(command), cookie, offset, len };
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));

        let bytes = ReplyHeader::encode_simple(cookie, done.then_some(Errno::EIO));
        prop_assert_eq!(ReplyHeader::rest_bytes(bytes[..4].try_into().unwrap()), Ok(12));
        prop_assert_eq!(ReplyHeader::decode(&bytes[4..]), Ok(ReplyHeader::Simple { cookie, error: done.then_some(Errno::EIO) }));

        let chunk = ChunkHeader { done, kind: ChunkKind::Data, cookie, len: len.max(9) };
        let bytes = chunk.encode();
        prop_assert_eq!(ReplyHeader::rest_bytes(bytes[..4].try_into().unwrap()), Ok(16));
        prop_assert_eq!(ReplyHeader::decode(&bytes[4..]), Ok(ReplyHeader::Chunk(chunk)));
    }

    #[test]
    fn options_come_back(
        export in "[^\0]{0,100}",
        texts in prop::collection::vec("[^\0]{0,40}", 0..10),
        infos in prop::collection::vec(any::<u16>(), 0..10),
        code in 0..12u32,
    ) {
        let open = OpenRequest { export: export.clone(), infos };
        prop_assert_eq!(OpenRequest::decode(&open.encode()), Ok(open.clone()));
        let meta = MetaRequest { export: export.clone(), queries: texts };
        prop_assert_eq!(MetaRequest::decode(&meta.encode()), Ok(meta));
        let context = MetaContext { id: code, name: export.clone() };
        prop_assert_eq!(MetaContext::decode(&context.encode()), Ok(context));
        let listed = ListedExport { name: export, description: "of a disk".to_owned() };
        prop_assert_eq!(ListedExport::decode(&listed.encode()), Ok(listed));

        let data = open.encode();
        let bytes = OptionHeader::encode_with(OptionCode(code), &data);
        let header = OptionHeader { option: OptionCode(code), len: data.len() as u32 };
        prop_assert_eq!(OptionHeader::decode(array(&bytes).unwrap()), Ok(header));
        let bytes = OptionReplyHeader::encode_with(OptionCode(code), ReplyCode::ERR_UNKNOWN, &data);
        let header = OptionReplyHeader { option: OptionCode(code), reply: ReplyCode::ERR_UNKNOWN, len: data.len() as u32 };
        prop_assert_eq!(OptionReplyHeader::decode(array(&bytes).unwrap()), Ok(header));
    }

    #[test]
    fn payloads_come_back(
        lens in prop::collection::vec((1..=u32::MAX, any::<u32>()), 1..50),
        message in ".{0,40}",
        offset: Option<u64>,
        number in 1..200u32,
        bits in 0..12u32,
    ) {
        let extents = lens.into_iter().map(|(len, flags)| StatusExtent { len: len.into(), flags }).collect();
        let status = StatusChunk { context: number, extents };
        prop_assert_eq!(StatusChunk::decode(&status.encode()), Ok(status));
        let hole = HoleChunk { offset: offset.unwrap_or(1), len: number };
        prop_assert_eq!(HoleChunk::decode(&hole.encode()), Ok(hole));
        let error = ErrorChunk { errno: Errno(number), message, offset };
        prop_assert_eq!(ErrorChunk::decode(error.kind(), &error.encode()), Ok(error));
        let export = Info::Export { size_bytes: offset.unwrap_or(2), flags: ExportFlags(number as u16) };
        prop_assert_eq!(Info::decode(&export.encode()), Ok(export));
        let sizes = Info::BlockSize(BlockSizes { minimum: 1 << bits, preferred: 4096, maximum: 1 << 25 });
        prop_assert_eq!(Info::decode(&sizes.encode()), Ok(sizes));
    }
}

#[test]
fn what_would_be_too_long_is_refused_before_it_is_read() {
    let write = Request { flags: 0, command: Command::WRITE, cookie: 1, offset: 0, len: (32 << 20) + 1 };
    assert!(Request::decode(&write.encode()).is_err());
    let mut option = OptionHeader::encode_with(OptionCode::GO, &[]);
    option[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(OptionHeader::decode(array(&option).unwrap()).is_err());
    let many = MetaRequest { export: String::new(), queries: vec![String::new(); 65] };
    assert!(MetaRequest::decode(&many.encode()).is_err());
    let long = OpenRequest { export: "x".repeat(4097), infos: vec![] };
    assert!(OpenRequest::decode(&long.encode()).is_err());
}
