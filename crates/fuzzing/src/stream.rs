//! A connection whose other side has said everything already.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

/// Gives its bytes, a piece at a time, then its end; takes whatever is written. Between two pieces others get
/// their turn: a question that follows from one answer is asked before the next answer is read.
#[derive(Debug)]
pub(crate) struct Script {
    bytes: Vec<u8>,
    at: usize,
    cut: Cut,
    paused: bool,
}

/// What is a piece.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cut {
    /// So many bytes.
    Bytes(usize),
    /// A line.
    Lines,
}

impl Script {
    pub fn new(bytes: &[u8], cut: Cut) -> Self {
        Self { bytes: bytes.to_vec(), at: 0, cut, paused: false }
    }

    fn piece(&self, most: usize) -> &[u8] {
        let rest = &self.bytes[self.at..];
        let len = match self.cut {
            Cut::Bytes(bytes) => bytes.max(1),
            Cut::Lines => rest.iter().position(|&byte| byte == b'\n').map_or(rest.len(), |end| end + 1),
        };
        &rest[..len.min(most).min(rest.len())]
    }
}

impl AsyncRead for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.paused = !self.paused;
        if self.paused {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = self.piece(buf.remaining());
        let len = piece.len();
        buf.put_slice(piece);
        self.at += len;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script {
    fn poll_write(self: Pin<&mut Self>, _cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs on this thread's own runtime, which is made once, and whose clock jumps to whatever is waited for.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    }
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let value = future.await;
            // What was spawned and has heard of its end gets to drop what it holds.
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
            value
        })
    })
}
