//! The server's side of the negotiation.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::exports::{Described, Exports, Use};
use crate::codec::{
    BlockSizes, DecodeError, Greeting, Info, ListedExport, MetaContext, MetaRequest, NAME_BYTES_MAX,
    OpenRequest, OptionCode, OptionHeader, OptionReplyHeader, PAYLOAD_BYTES_MAX, ReplyCode, encode_opened,
    handshake_flags, info_code,
};
use crate::dirty::BASE_ALLOCATION;

/// What block status replies call `base:allocation`.
pub(super) const ALLOCATION_ID: u32 = 1;
/// Options that a client gets answered; nobody needs a tenth of it.
const OPTIONS_MAX: usize = 1024;
/// Requests may have any place and length; whole blocks spare the disk below a read before the write.
const BLOCK_SIZES: BlockSizes = BlockSizes { minimum: 1, preferred: 4096, maximum: PAYLOAD_BYTES_MAX };

/// What was agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    pub opened: Use,
    pub structured: bool,
    /// Whether the client may ask for block status.
    pub allocation: bool,
}

/// Answers options until the client opens an export; `None` if it goes away in peace.
pub(super) async fn negotiate<S>(stream: &mut S, exports: &Exports) -> io::Result<Option<Agreed>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ours = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
    stream.write_all(&Greeting { flags: ours }.encode()).await?;
    stream.flush().await?;
    let theirs = stream.read_u32().await?;
    if theirs & !u32::from(ours) != 0 {
        return Err(broken(DecodeError::Invalid("the client greets with flags that were not offered")));
    }
    let mut dialogue = Dialogue { stream, exports, structured: false, allocation_of: None };
    for _ in 0..OPTIONS_MAX {
        let mut header = [0; OptionHeader::BYTES];
        dialogue.stream.read_exact(&mut header).await?;
        let OptionHeader { option, len } = OptionHeader::decode(&header).map_err(broken)?;
        let mut data = vec![0; len as usize];
        dialogue.stream.read_exact(&mut data).await?;
        if option == OptionCode::EXPORT_NAME {
            let padded = theirs & u32::from(handshake_flags::NO_ZEROES) == 0;
            return dialogue.open_by_name(&data, padded).await.map(Some);
        }
        if theirs & u32::from(handshake_flags::FIXED_NEWSTYLE) == 0 {
            return Err(broken(DecodeError::Invalid("the client does not know options but uses them")));
        }
        match dialogue.answer(option, &data).await? {
            Next::Option => {}
            Next::Opened(agreed) => return Ok(Some(agreed)),
            Next::Goodbye => return Ok(None),
        }
    }
    Err(broken(DecodeError::Invalid("the client's options do not end")))
}

enum Next {
    Option,
    Opened(Agreed),
    Goodbye,
}

struct Dialogue<'a, S> {
    stream: &'a mut S,
    exports: &'a Exports,
    structured: bool,
    /// The export of which the client has chosen `base:allocation`.
    allocation_of: Option<String>,
}

impl<S> Dialogue<'_, S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    async fn answer(&mut self, option: OptionCode, data: &[u8]) -> io::Result<Next> {
        match option {
            OptionCode::ABORT => {
                // The client may have gone already.
                let _ = self.reply(option, ReplyCode::ACK, &[]).await;
                return Ok(Next::Goodbye);
            }
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(option, ReplyCode::ERR_INVALID, "the option takes no data").await?;
            }
            OptionCode::LIST => self.list().await?,
            OptionCode::STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, ReplyCode::ACK, &[]).await?;
            }
            OptionCode::INFO | OptionCode::GO => match OpenRequest::decode(data) {
                Ok(request) => return self.describe(option, &request).await,
                Err(error) => self.refuse(option, ReplyCode::ERR_INVALID, &error.to_string()).await?,
            },
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => match MetaRequest::decode(data) {
                Ok(request) => self.contexts(option, &request).await?,
                Err(error) => self.refuse(option, ReplyCode::ERR_INVALID, &error.to_string()).await?,
            },
            _ => self.refuse(option, ReplyCode::ERR_UNSUP, "this server does not know the option").await?,
        }
        Ok(Next::Option)
    }

    async fn list(&mut self) -> io::Result<()> {
        for name in self.exports.names() {
            let listed = ListedExport { name, description: String::new() };
            self.put(OptionCode::LIST, ReplyCode::SERVER, &listed.encode()).await?;
        }
        self.reply(OptionCode::LIST, ReplyCode::ACK, &[]).await
    }

    /// Describes an export, and opens it if the option says so.
    async fn describe(&mut self, option: OptionCode, request: &OpenRequest) -> io::Result<Next> {
        let Some(export) = self.exports.describe(&request.export) else {
            self.refuse(option, ReplyCode::ERR_UNKNOWN, &no_such_export(&request.export)).await?;
            return Ok(Next::Option);
        };
        let size = Info::Export { size_bytes: export.size_bytes, flags: export.flags(self.structured) };
        self.put(option, ReplyCode::INFO, &size.encode()).await?;
        if request.infos.contains(&info_code::BLOCK_SIZE) {
            self.put(option, ReplyCode::INFO, &Info::BlockSize(BLOCK_SIZES).encode()).await?;
        }
        self.reply(option, ReplyCode::ACK, &[]).await?;
        if option == OptionCode::GO { self.open(&export).map(Next::Opened) } else { Ok(Next::Option) }
    }

    async fn open_by_name(&mut self, data: &[u8], padded: bool) -> io::Result<Agreed> {
        // There is no way to say no to this option but to hang up.
        let name = std::str::from_utf8(data).ok().filter(|name| name.len() <= NAME_BYTES_MAX);
        let export = name.and_then(|name| self.exports.describe(name)).ok_or_else(gone)?;
        let flags = export.flags(self.structured);
        self.stream.write_all(&encode_opened(export.size_bytes, flags, padded)).await?;
        self.stream.flush().await?;
        self.open(&export)
    }

    fn open(&self, export: &Described) -> io::Result<Agreed> {
        let opened = self.exports.open(export).ok_or_else(gone)?;
        // A choice is for the export that it was made for.
        let allocation = self.allocation_of.as_ref() == Some(&opened.export.name);
        Ok(Agreed { opened, structured: self.structured, allocation })
    }

    async fn contexts(&mut self, option: OptionCode, request: &MetaRequest) -> io::Result<()> {
        let choose = option == OptionCode::SET_META_CONTEXT;
        if choose {
            // Each choice replaces the one before, also if it fails.
            self.allocation_of = None;
        }
        if !self.structured {
            let words = "structured replies come first";
            return self.refuse(option, ReplyCode::ERR_INVALID, words).await;
        }
        if self.exports.describe(&request.export).is_none() {
            return self.refuse(option, ReplyCode::ERR_UNKNOWN, &no_such_export(&request.export)).await;
        }
        let asked = |query: &String| query == BASE_ALLOCATION || (!choose && query == "base:");
        if request.queries.iter().any(asked) || (!choose && request.queries.is_empty()) {
            // The number means something only once the context is chosen.
            let id = if choose { ALLOCATION_ID } else { 0 };
            let context = MetaContext { id, name: BASE_ALLOCATION.to_owned() };
            self.put(option, ReplyCode::META_CONTEXT, &context.encode()).await?;
            self.allocation_of = choose.then(|| request.export.clone());
        }
        self.reply(option, ReplyCode::ACK, &[]).await
    }

    async fn refuse(&mut self, option: OptionCode, reply: ReplyCode, words: &str) -> io::Result<()> {
        self.reply(option, reply, words.as_bytes()).await
    }

    /// The last reply to an option.
    async fn reply(&mut self, option: OptionCode, reply: ReplyCode, data: &[u8]) -> io::Result<()> {
        self.put(option, reply, data).await?;
        self.stream.flush().await
    }

    async fn put(&mut self, option: OptionCode, reply: ReplyCode, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&OptionReplyHeader::encode_with(option, reply, data)).await
    }
}

fn no_such_export(name: &str) -> String {
    // Long names are cut: the words must fit into what clients read.
    let shown: String = name.chars().take(200).collect();
    format!("there is no export {shown:?}")
}

fn gone() -> io::Error {
    broken(DecodeError::Invalid("the client opens an export that is not there"))
}

/// The connection is to end: the client does not keep to the protocol.
pub(super) fn broken(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
