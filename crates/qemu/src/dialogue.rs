//! What a connection to a monitor and one to libvirt have in common: questions with numbers, whose answers come in
//! any order, and an end that is for ever.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

/// Messages waiting to be written.
const QUEUE: usize = 64;

/// Who waits for which answer, and whether the other side is still there.
pub(crate) struct Dialogue<A> {
    numbers: AtomicU32,
    waiting: Mutex<HashMap<u32, oneshot::Sender<A>>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    /// Why the connection is gone, once it is.
    gone: watch::Sender<Option<String>>,
}

/// The messages that a dialogue has to write.
pub(crate) type Queued = mpsc::Receiver<Vec<u8>>;

impl<A> Dialogue<A> {
    /// A dialogue, and what [`Dialogue::write_all`] has to write for it.
    pub fn new() -> (Self, Queued) {
        let (outgoing, queued) = mpsc::channel(QUEUE);
        let (numbers, waiting, gone) = (AtomicU32::new(1), Mutex::default(), watch::Sender::new(None));
        (Self { numbers, waiting, outgoing, gone }, queued)
    }

    /// A question of its own number: it is to be sent next.
    pub fn ask(&self) -> Question<'_, A> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting().insert(number, sender);
        // `close` says that it is gone first and clears then: whoever registers in between takes himself out.
        if !self.is_open() {
            self.waiting().remove(&number);
        }
        Question { dialogue: self, number, answer }
    }

    /// Hands bytes to the writer. Where this fails the connection is gone or the time over, and each question says so.
    pub async fn send(&self, bytes: Vec<u8>, deadline: Instant) {
        let _ = timeout_at(deadline, self.outgoing.send(bytes)).await;
    }

    /// Hands an answer to the one who asked, unless he has given up.
    pub fn answer(&self, number: u32, answer: A) {
        if let Some(asked) = self.waiting().remove(&number) {
            let _ = asked.send(answer); // he has just given up
        }
    }

    /// Ends it, for the reason given unless there was one before.
    pub fn close(&self, why: String) {
        self.gone.send_if_modified(|gone| {
            let first = gone.is_none();
            gone.get_or_insert(why);
            first
        });
        self.waiting().clear();
    }

    /// Whether the connection still stands, as far as is known.
    pub fn is_open(&self) -> bool {
        self.gone.borrow().is_none()
    }

    /// Waits until the connection is gone, and says why.
    pub async fn closed(&self) -> String {
        // The sender lives in `self`, which we hold.
        let _ = self.gone.subscribe().wait_for(Option::is_some).await;
        self.why_gone()
    }

    /// Why the connection is gone.
    pub fn why_gone(&self) -> String {
        self.gone.borrow().clone().unwrap_or_else(|| "it was closed".into())
    }

    /// Writes what is to be sent, until the connection ends.
    pub async fn write_all(&self, mut queued: Queued, mut write: impl AsyncWrite + Unpin) {
        while let Some(bytes) = queued.recv().await {
            if let Err(error) = write.write_all(&bytes).await {
                // The reader may still find a better reason; it is the same end.
                return self.close(format!("it cannot be written to ({error})"));
            }
        }
    }

    /// Who waits for an answer.
    pub fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<A>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer that is waited for; forgotten when nobody waits any more.
pub(crate) struct Question<'a, A> {
    dialogue: &'a Dialogue<A>,
    pub number: u32,
    pub answer: oneshot::Receiver<A>,
}

impl<A> Drop for Question<'_, A> {
    fn drop(&mut self) {
        self.dialogue.waiting().remove(&self.number);
    }
}

/// The tasks of a connection, ended with it.
pub(crate) struct Tasks(pub Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}
