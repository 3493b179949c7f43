//! The client's side of the negotiation.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::codec::{
    BlockSizes, DecodeError, ExportFlags, Greeting, Info, ListedExport, MetaContext, MetaRequest,
    NAME_BYTES_MAX, OpenRequest, OptionCode, OptionHeader, OptionReplyHeader, ReplyCode, handshake_flags,
    info_code,
};
use crate::error::{Cause, ErrorKind};

/// The most exports that a list is read to.
const LISTED_MAX: usize = 65_536;

/// What was agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub size_bytes: u64,
    pub flags: ExportFlags,
    pub block_sizes: Option<BlockSizes>,
    pub structured: bool,
    /// Those that the server has, in the order asked for.
    pub contexts: Vec<MetaContext>,
}

/// Opens an export: structured replies, then the contexts, then the export.
pub(crate) async fn open<S>(stream: &mut S, export: &str, contexts: &[&str]) -> Result<Agreed, Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    for name in contexts.iter().chain([&export]) {
        if name.len() > NAME_BYTES_MAX {
            let (len, max) = (name.len() as u64, NAME_BYTES_MAX as u64);
            return Err(ErrorKind::TooLong { what: "a name", len, max }.into());
        }
    }
    greet(stream).await?;
    let structured = ask(stream, OptionCode::STRUCTURED_REPLY, &[], |_, _| Ok(())).await?.is_ok();
    // Asked for here alone: a client that asks when it opens the export promises to align every request,
    // while one that does not may read any bytes. The longest payload holds either way.
    let before = describe(stream, OptionCode::INFO, export, &[info_code::BLOCK_SIZE]).await?;
    let contexts = if structured && !contexts.is_empty() {
        choose_contexts(stream, export, contexts).await?
    } else {
        Vec::new()
    };
    let described = describe(stream, OptionCode::GO, export, &[]).await?;
    let told = described.map_err(|refusal| refusal.cause("opening an export by name"))?;
    let (size_bytes, flags) =
        told.size.ok_or(DecodeError::Invalid("the export was opened without a word about its size"))?;
    if size_bytes > i64::MAX as u64 {
        return Err(DecodeError::Invalid("the export's size is past what a disk can have").into());
    }
    let block_sizes = told.block_sizes.or(before.ok().and_then(|before| before.block_sizes));
    Ok(Agreed { size_bytes, flags, block_sizes, structured, contexts })
}

/// What a server tells of an export.
#[derive(Default)]
struct Told {
    size: Option<(u64, ExportFlags)>,
    block_sizes: Option<BlockSizes>,
}

/// Asks about an export, or opens it, as the option says.
async fn describe<S>(
    stream: &mut S,
    option: OptionCode,
    export: &str,
    infos: &[u16],
) -> Result<Result<Told, Refusal>, Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut told = Told::default();
    let request = OpenRequest { export: export.to_owned(), infos: infos.to_vec() };
    let answer = ask(stream, option, &request.encode(), |reply, data| {
        if reply == ReplyCode::INFO {
            match Info::decode(data)? {
                Info::Export { size_bytes, flags } => told.size = Some((size_bytes, flags)),
                Info::BlockSize(sizes) => told.block_sizes = Some(sizes),
                Info::Other(_) => {}
            }
        }
        Ok(())
    })
    .await?;
    Ok(answer.map(|()| told))
}

/// Asks for the names of the server's exports.
pub(crate) async fn list<S>(stream: &mut S) -> Result<Vec<ListedExport>, Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream).await?;
    let mut exports = Vec::new();
    let listed = ask(stream, OptionCode::LIST, &[], |reply, data| {
        if reply == ReplyCode::SERVER {
            if exports.len() == LISTED_MAX {
                return Err(DecodeError::Invalid("the server's list of exports does not end"));
            }
            exports.push(ListedExport::decode(data)?);
        }
        Ok(())
    })
    .await?;
    listed.map_err(|refusal| refusal.cause("a list of its exports"))?;
    stream.write_all(&OptionHeader::encode_with(OptionCode::ABORT, &[])).await?;
    Ok(exports)
}

async fn greet<S>(stream: &mut S) -> Result<(), Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut bytes = [0; Greeting::BYTES];
    stream.read_exact(&mut bytes).await?;
    let theirs = Greeting::decode(&bytes)?.flags;
    if theirs & handshake_flags::FIXED_NEWSTYLE == 0 {
        return Err(ErrorKind::NotOffered("the fixed newstyle negotiation".to_owned()).into());
    }
    let ours = handshake_flags::FIXED_NEWSTYLE | theirs & handshake_flags::NO_ZEROES;
    stream.write_all(&u32::from(ours).to_be_bytes()).await?;
    Ok(())
}

async fn choose_contexts<S>(stream: &mut S, export: &str, names: &[&str]) -> Result<Vec<MetaContext>, Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let queries = names.iter().map(|&name| name.to_owned()).collect();
    let request = MetaRequest { export: export.to_owned(), queries };
    let mut given: Vec<MetaContext> = Vec::new();
    let answer = ask(stream, OptionCode::SET_META_CONTEXT, &request.encode(), |reply, data| {
        if reply == ReplyCode::META_CONTEXT {
            let context = MetaContext::decode(data)?;
            if given.iter().any(|other| other.id == context.id || other.name == context.name) {
                return Err(DecodeError::Invalid("the server gives a metadata context twice"));
            }
            if !names.contains(&context.name.as_str()) {
                return Err(DecodeError::Invalid(
                    "the server gives a metadata context that was not asked for",
                ));
            }
            given.push(context);
        }
        Ok(())
    })
    .await?;
    match answer {
        Ok(()) => {
            given.sort_by_key(|context| names.iter().position(|name| *name == context.name));
            Ok(given)
        }
        Err(refusal) if refusal.reply == ReplyCode::ERR_UNSUP => Ok(Vec::new()),
        Err(refusal) => Err(refusal.cause("metadata contexts")),
    }
}

struct Refusal {
    reply: ReplyCode,
    message: String,
}

impl Refusal {
    fn cause(self, what: &str) -> Cause {
        match self.reply {
            ReplyCode::ERR_UNKNOWN => ErrorKind::UnknownExport,
            ReplyCode::ERR_UNSUP => ErrorKind::NotOffered(what.to_owned()),
            ReplyCode(reply) => ErrorKind::Refused { reply, message: self.message },
        }
        .into()
    }
}

/// Sends an option, and hands each reply before the last to `take`. The outer error ends the connection;
/// the inner one is the server's refusal of this option.
async fn ask<S>(
    stream: &mut S,
    option: OptionCode,
    data: &[u8],
    mut take: impl FnMut(ReplyCode, &[u8]) -> Result<(), DecodeError>,
) -> Result<Result<(), Refusal>, Cause>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&OptionHeader::encode_with(option, data)).await?;
    loop {
        let mut header = [0; OptionReplyHeader::BYTES];
        stream.read_exact(&mut header).await?;
        let header = OptionReplyHeader::decode(&header)?;
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data).await?;
        if header.option != option {
            return Err(DecodeError::Invalid("the server answers an option that was not asked").into());
        }
        if header.reply == ReplyCode::ACK {
            return Ok(Ok(()));
        }
        if header.reply.is_error() {
            let message = String::from_utf8_lossy(&data).into_owned();
            return Ok(Err(Refusal { reply: header.reply, message }));
        }
        take(header.reply, &data)?;
    }
}
