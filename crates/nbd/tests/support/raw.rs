//! A client by hand, for what a good one would not do.

use nbd::BASE_ALLOCATION;
use nbd::codec::{
    Greeting, MetaRequest, OpenRequest, OptionCode, OptionHeader, OptionReplyHeader, ReplyCode,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Greets, and opens an export; with structured replies and `base:allocation`, or without either.
pub async fn open<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, export: &str, structured: bool) {
    greet(stream).await;
    let export = export.to_owned();
    if structured {
        assert_eq!(ask(stream, OptionCode::STRUCTURED_REPLY, &[]).await, ReplyCode::ACK);
        let request = MetaRequest { export: export.clone(), queries: vec![BASE_ALLOCATION.to_owned()] };
        assert_eq!(ask(stream, OptionCode::SET_META_CONTEXT, &request.encode()).await, ReplyCode::ACK);
    }
    let request = OpenRequest { export, infos: Vec::new() };
    assert_eq!(ask(stream, OptionCode::GO, &request.encode()).await, ReplyCode::ACK);
}

pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let mut greeting = [0; Greeting::BYTES];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(Greeting::decode(&greeting).unwrap().flags, 3);
    stream.write_all(&3u32.to_be_bytes()).await.unwrap();
}

/// The last reply to an option.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    option: OptionCode,
    data: &[u8],
) -> ReplyCode {
    stream.write_all(&OptionHeader::encode_with(option, data)).await.unwrap();
    loop {
        let mut header = [0; OptionReplyHeader::BYTES];
        stream.read_exact(&mut header).await.unwrap();
        let header = OptionReplyHeader::decode(&header).unwrap();
        assert_eq!(header.option, option);
        stream.read_exact(&mut vec![0; header.len as usize]).await.unwrap();
        if header.reply == ReplyCode::ACK || header.reply.is_error() {
            return header.reply;
        }
    }
}
