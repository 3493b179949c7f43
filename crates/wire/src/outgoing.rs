//! Request bodies: bytes that are there already, sent without a copy, as fast as a limit allows.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::limiter::RateLimiter;

/// Without a limit, this much is handed to the connection at a time: the shape in which progress is seen.
const SLICE_BYTES: usize = 256 * 1024;

/// Bytes in pieces, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pieces {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Pieces {
    pub const fn len(&self) -> usize {
        self.len
    }

    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.len += bytes.len();
            self.pieces.push_back(bytes);
        }
    }

    /// The bytes of `range` (within the length); they are shared, not copied.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let mut slice = Self::default();
        let mut at = 0;
        for piece in &self.pieces {
            let end = at + piece.len();
            let (from, to) = (range.start.max(at), range.end.min(end));
            if from < to {
                slice.push(piece.slice(from - at..to - at));
            }
            at = end;
        }
        slice
    }

    /// Takes at most `max` bytes off the front.
    fn take(&mut self, max: usize) -> Option<Bytes> {
        let first = self.pieces.front_mut()?;
        let taken = if first.len() <= max { self.pieces.pop_front()? } else { first.split_to(max) };
        self.len -= taken.len();
        Some(taken)
    }

    fn front_len(&self) -> usize {
        self.pieces.front().map_or(0, |piece| piece.remaining())
    }
}

impl From<Vec<u8>> for Pieces {
    fn from(bytes: Vec<u8>) -> Self {
        let mut pieces = Self::default();
        pieces.push(bytes.into());
        pieces
    }
}

/// When something was last seen to move.
#[derive(Debug, Clone)]
pub(crate) struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Wait = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A request's body.
pub(crate) struct Outgoing {
    pieces: Pieces,
    limiter: Option<RateLimiter>,
    /// Running while the limit does not yet allow the next slice.
    wait: Option<Wait>,
    progress: Progress,
}

impl Outgoing {
    pub fn new(pieces: Pieces, limiter: Option<RateLimiter>, progress: Progress) -> Self {
        Self { pieces, limiter, wait: None, progress }
    }

    fn slice_bytes(&self) -> usize {
        let most = self.limiter.as_ref().map_or(SLICE_BYTES, RateLimiter::slice_bytes);
        self.pieces.front_len().min(most)
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let slice = self.slice_bytes();
        if self.wait.is_none() && slice > 0 {
            let limiter = self.limiter.clone();
            self.wait = limiter.map(|limiter| Box::pin(async move { limiter.take(slice).await }) as Wait);
        }
        if let Some(wait) = &mut self.wait {
            ready!(wait.as_mut().poll(cx));
            self.wait = None;
        }
        self.progress.touch();
        Poll::Ready(self.pieces.take(slice.max(1)).map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.len() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt;

    use super::*;

    fn pieces(parts: &[&'static [u8]]) -> Pieces {
        let mut pieces = Pieces::default();
        parts.iter().for_each(|part| pieces.push(Bytes::from_static(part)));
        pieces
    }

    async fn all(pieces: Pieces) -> Vec<u8> {
        let body = Outgoing::new(pieces, None, Progress::new());
        body.collect().await.unwrap().to_bytes().to_vec()
    }

    #[tokio::test]
    async fn a_slice_has_the_bytes_of_its_range() {
        let whole = pieces(&[b"abc", b"", b"d", b"efgh"]);
        for from in 0..=8 {
            for to in from..=8 {
                let slice = whole.slice(from..to);
                assert_eq!(slice.len(), to - from);
                assert_eq!(all(slice).await, b"abcdefgh"[from..to]);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_piece_is_sent_at_the_limit() {
        let limiter = RateLimiter::new(1_000_000);
        let progress = Progress::new();
        let started = Instant::now();
        let mut body = Outgoing::new(vec![0; 4 << 20].into(), Some(limiter), progress.clone());
        assert_eq!(body.size_hint().exact(), Some(4 << 20));
        let mut sent = 0;
        while let Some(frame) = body.frame().await {
            sent += frame.unwrap().into_data().unwrap().len();
            let allowed = started.elapsed().as_secs_f64() * 1e6 + 100_000.0;
            assert!(sent as f64 <= allowed, "{sent} bytes after {:?}", started.elapsed());
            assert!(progress.last().elapsed() < Duration::from_millis(1));
        }
        assert_eq!(sent, 4 << 20);
        assert!(body.is_end_stream());
        let took = started.elapsed().as_secs_f64();
        assert!((4.0..4.4).contains(&took), "{took}");
    }
}
