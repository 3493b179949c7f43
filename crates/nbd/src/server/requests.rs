//! Requests as they come in: checked, and each made a task.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::PIECE_BYTES;
use super::buffers::Buffers;
use super::negotiate::{ALLOCATION_ID, broken};
use super::replies::{Reply, stalled};
use super::session::{Answer, Session};
use crate::codec::{Command, Errno, PAYLOAD_BYTES_MAX, Request, StatusChunk, StatusExtent, command_flags};
use crate::disk::{Disk, all_extents, cut, extents_of};

/// Holds some headers and a small payload; larger payloads bypass it.
const READ_BUFFER_BYTES: usize = 16 << 10;
/// Reads of at least this leave out zeros, in runs of at least this.
const HOLE_BYTES_MIN: u64 = 32 << 10;
/// The most extents in one answer: what a client then asks for further on costs little more.
const EXTENTS_MAX: usize = 16 << 10;

/// The side of a connection that takes requests in.
pub(super) struct Requests {
    pub session: Arc<Session>,
    pub replies: mpsc::Sender<Reply>,
}

/// Why a request is not even tried.
type Refusal = (Errno, &'static str);

impl Requests {
    /// Until the client says good-bye or goes away between requests.
    pub async fn take_all(self, input: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, input);
        while let Some(request) = self.next(&mut input).await? {
            let place = self.session.place().await;
            let (session, replies) = (self.session.clone(), self.replies.clone());
            let answer = Answer { session, replies, cookie: request.cookie, _place: place };
            let tasks = &self.session.tasks;
            match self.check(&request) {
                Err((errno, words)) => {
                    if request.command == Command::WRITE {
                        self.discard(&mut input, request.len).await?;
                    }
                    tasks.spawn(async move { answer.refused(errno, words).await });
                }
                Ok(()) => match request.command {
                    Command::READ => drop(tasks.spawn(read(answer, request))),
                    Command::WRITE => self.write(&mut input, answer, &request).await?,
                    Command::BLOCK_STATUS => drop(tasks.spawn(status(answer, request))),
                    _ => drop(tasks.spawn(change(answer, request))),
                },
            }
        }
        Ok(())
    }

    async fn next(&self, input: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Request>> {
        if input.fill_buf().await?.is_empty() {
            return Ok(None);
        }
        let mut header = [0; Request::BYTES];
        self.fill(input, &mut header).await?;
        let request = Request::decode(&header).map_err(broken)?;
        Ok((request.command != Command::DISCONNECT).then_some(request))
    }

    /// Reads what the client has begun to send.
    async fn fill(&self, input: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<()> {
        let filled = tokio::time::timeout(self.session.shared.limits.stall, input.read_exact(buffer)).await;
        filled.map_err(|_| stalled("the client stopped in the middle of a request"))?.map(drop)
    }

    async fn discard(&self, input: &mut (impl AsyncRead + Unpin), len: u32) -> io::Result<()> {
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        for piece in cut(0..len.into(), READ_BUFFER_BYTES as u64) {
            self.fill(input, &mut buffer[..(piece.end - piece.start) as usize]).await?;
        }
        Ok(())
    }

    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let Request { flags, command, offset, len, .. } = *request;
        let export = &self.session.opened.export;
        let own_flags = match command {
            Command::READ if self.session.structured => command_flags::DF,
            Command::READ | Command::WRITE | Command::FLUSH | Command::TRIM => 0,
            Command::WRITE_ZEROES => command_flags::NO_HOLE,
            Command::BLOCK_STATUS => command_flags::REQ_ONE,
            _ => return Err((Errno::EINVAL, "this server does not know the command")),
        };
        // FUA may stand at any command.
        if flags & !(own_flags | command_flags::FUA) != 0 {
            return Err((Errno::EINVAL, "the command has flags that were not offered"));
        }
        let changes = matches!(command, Command::WRITE | Command::TRIM | Command::WRITE_ZEROES);
        if changes && export.read_only {
            return Err((Errno::EPERM, "the export is read-only"));
        }
        if command == Command::FLUSH {
            return Ok(());
        }
        if offset.checked_add(len.into()).is_none_or(|end| end > export.size_bytes) {
            let errno = if changes { Errno::ENOSPC } else { Errno::EINVAL };
            return Err((errno, "the range reaches past the end of the export"));
        }
        match command {
            Command::READ if len > PAYLOAD_BYTES_MAX => {
                Err((Errno::EINVAL, "the read is longer than the longest allowed"))
            }
            Command::BLOCK_STATUS if !self.session.allocation => {
                Err((Errno::EINVAL, "no metadata context was chosen"))
            }
            Command::BLOCK_STATUS if len == 0 => Err((Errno::EINVAL, "the range is empty")),
            _ => Ok(()),
        }
    }

    /// Takes in a write's payload, piece by piece; each goes to the disk while the next arrives.
    async fn write(
        &self,
        input: &mut (impl AsyncRead + Unpin),
        answer: Answer,
        request: &Request,
    ) -> io::Result<()> {
        let mut pieces = JoinSet::new();
        for piece in cut(range_of(request), PIECE_BYTES) {
            let len = (piece.end - piece.start) as usize;
            let memory = self.session.memory(len).await;
            let mut bytes = self.session.shared.buffers.get(len);
            self.fill(input, &mut bytes).await?;
            let session = self.session.clone();
            pieces.spawn(async move {
                session
                    .call(move |disk| {
                        let _memory = memory;
                        disk.write_at(piece.start, &bytes)
                    })
                    .await
            });
        }
        let through = request.flags & command_flags::FUA != 0;
        self.session.tasks.spawn(async move {
            let mut outcome = Ok(());
            while let Some(piece) = pieces.join_next().await {
                let piece = piece.unwrap_or_else(|error| Err(io::Error::other(error)));
                outcome = outcome.and(piece);
            }
            if through && outcome.is_ok() {
                outcome = answer.session.call(|disk| disk.flush()).await;
            }
            answer.done(outcome).await;
        });
        Ok(())
    }
}

const fn range_of(request: &Request) -> Range<u64> {
    request.offset..request.offset + request.len as u64
}

/// What changes the disk and has no payload.
async fn change(answer: Answer, request: Request) {
    let Request { flags, command, offset, len, .. } = request;
    let outcome = answer.session.call(move |disk| {
        match command {
            Command::TRIM => disk.trim(offset, len.into())?,
            Command::WRITE_ZEROES => disk.zero(offset, len.into(), flags & command_flags::NO_HOLE != 0)?,
            _ => return disk.flush(),
        }
        if flags & command_flags::FUA != 0 { disk.flush() } else { Ok(()) }
    });
    let outcome = outcome.await;
    answer.done(outcome).await;
}

async fn status(answer: Answer, request: Request) {
    let extents_max = if request.flags & command_flags::REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
    let memory = answer.session.memory(PIECE_BYTES as usize).await;
    let found = answer.session.call(move |disk| extents_of(disk, range_of(&request), extents_max)).await;
    match found {
        Ok(extents) => {
            let status = StatusChunk { context: ALLOCATION_ID, extents };
            answer.send(Reply::status(request.cookie, &status).holding(memory)).await;
        }
        Err(error) => answer.failed(&error).await,
    }
}

async fn read(answer: Answer, request: Request) {
    let (session, cookie, range) = (answer.session.clone(), request.cookie, range_of(&request));
    if !session.structured || (request.flags & command_flags::DF != 0 && !range.is_empty()) {
        return read_whole(answer, range).await;
    }
    if range.is_empty() {
        answer.send(Reply::none(cookie)).await;
        return;
    }
    for piece in cut(range.clone(), PIECE_BYTES) {
        let last = piece.end == range.end;
        let mut memory = Some(session.memory((piece.end - piece.start) as usize).await);
        if answer.replies.is_closed() {
            return;
        }
        let buffers = session.shared.buffers.clone();
        let runs = match session.call(move |disk| read_sparse(disk, &buffers, piece)).await {
            Ok(runs) => runs,
            Err(error) => return answer.failed(&error).await,
        };
        let mut runs = runs.into_iter().peekable();
        while let Some(run) = runs.next() {
            let ends_piece = runs.peek().is_none();
            let done = last && ends_piece;
            let mut reply = match run {
                Run::Data(offset, bytes) => Reply::data(cookie, offset, bytes, done),
                Run::Zeros(offset, len) => Reply::hole(cookie, offset, len, done),
            };
            if ends_piece && let Some(memory) = memory.take() {
                reply = reply.holding(memory);
            }
            if !answer.send(reply).await {
                return;
            }
        }
    }
}

/// A read whose answer goes in one piece.
async fn read_whole(answer: Answer, range: Range<u64>) {
    let (offset, len) = (range.start, (range.end - range.start) as usize);
    let memory = answer.session.memory(len).await;
    let bytes = answer.session.call(move |disk| {
        let mut bytes = vec![0; len];
        disk.read_at(offset, &mut bytes).map(|()| Bytes::from(bytes))
    });
    let reply = match bytes.await {
        Ok(bytes) if answer.session.structured => Reply::data(answer.cookie, offset, bytes, true),
        Ok(bytes) => Reply::simple(answer.cookie, None, bytes),
        Err(error) => return answer.failed(&error).await,
    };
    answer.send(reply.holding(memory)).await;
}

/// A part of what was read, from a place on.
enum Run {
    Data(u64, Bytes),
    Zeros(u64, u32),
}

/// Reads what is not known to be zeros.
fn read_sparse(disk: &dyn Disk, buffers: &Arc<Buffers>, range: Range<u64>) -> io::Result<Vec<Run>> {
    let mut stretches: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = range.start;
    for extent in extents_for_reading(disk, range) {
        let zeros = extent.has(StatusExtent::ZERO) && extent.len >= HOLE_BYTES_MIN;
        match stretches.last_mut() {
            Some((last, last_zeros)) if *last_zeros == zeros => last.end += extent.len,
            _ => stretches.push((at..at + extent.len, zeros)),
        }
        at += extent.len;
    }
    let data = |stretch: &(Range<u64>, bool)| if stretch.1 { 0 } else { stretch.0.end - stretch.0.start };
    let mut buffer = buffers.get(stretches.iter().map(data).sum::<u64>() as usize);
    let mut filled = 0;
    for (stretch, zeros) in &stretches {
        if !zeros {
            let part = &mut buffer[filled..][..(stretch.end - stretch.start) as usize];
            disk.read_at(stretch.start, part)?;
            filled += part.len();
        }
    }
    let mut buffer = Bytes::from_owner(buffer);
    let run = |(stretch, zeros): (Range<u64>, bool)| {
        let len = stretch.end - stretch.start;
        if zeros {
            Run::Zeros(stretch.start, len as u32)
        } else {
            Run::Data(stretch.start, buffer.split_to(len as usize))
        }
    };
    Ok(stretches.into_iter().map(run).collect())
}

fn extents_for_reading(disk: &dyn Disk, range: Range<u64>) -> Vec<StatusExtent> {
    let len = range.end - range.start;
    if len >= HOLE_BYTES_MIN {
        // What cannot be told is read: if the disk is ill, the read says so.
        if let Ok(extents) = all_extents(disk, range) {
            return extents;
        }
    }
    vec![StatusExtent::data(len)]
}
