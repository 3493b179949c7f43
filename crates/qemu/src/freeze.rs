//! Keeps a guest frozen while something short is done, and thaws it whatever happens.

use std::pin::pin;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::agent::{AgentAddress, AgentError, GuestAgent};

/// How often a guest that could not be thawed is tried again, and how long between.
const THAW_ATTEMPTS: u32 = 60;
const THAW_PAUSE: Duration = Duration::from_secs(1);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct FreezeLimits {
    /// The guest's way to rest: it writes out what it holds.
    pub freeze: Duration,
    /// The rest itself; Windows ends it after 10 s.
    pub hold: Duration,
}

impl Default for FreezeLimits {
    fn default() -> Self {
        Self { freeze: Duration::from_secs(60), hold: Duration::from_secs(10) }
    }
}

/// How long the guest was frozen around what was done; or why what was done is not application-consistent.
pub type Freeze = Result<Duration, AgentError>;

impl GuestAgent {
    /// Does `work` while the guest is frozen. If the guest cannot be frozen, or not for long enough, `work`
    /// is done all the same, and the second value says why that counts for less.
    ///
    /// The guest is thawed in any case: when `work` ends, when it takes longer than `limits.hold`, and when
    /// the future that this returns is dropped.
    pub async fn freeze_for<F: Future>(mut self, limits: FreezeLimits, work: F) -> (F::Output, Freeze) {
        let mut work = pin!(work);
        let mut thaw = Thaw { agent: Some(self.address().clone()) };
        let frozen = self.freeze(limits.freeze).await;
        let since = Instant::now();
        let refusal = match frozen {
            Ok(0) => Some(AgentError::NothingFrozen),
            Ok(_) => None,
            Err(error) => Some(error),
        };
        if let Some(error) = refusal {
            // A freeze that timed out or broke off may still happen: the thaw comes after it.
            let _ = thaw.now(&mut self).await;
            return (work.await, Err(error));
        }
        let done = tokio::select! {
            biased;
            output = &mut work => Some(output),
            () = sleep(limits.hold) => None,
        };
        let thawed = thaw.now(&mut self).await;
        let held = since.elapsed();
        match (done, thawed) {
            (None, _) => (work.await, Err(AgentError::HeldTooLong(limits.hold))),
            (Some(output), Ok(0)) => (output, Err(AgentError::ThawedEarly)),
            (Some(output), Ok(_)) => (output, Ok(held)),
            (Some(output), Err(error)) => (output, Err(error)),
        }
    }
}

/// The duty to thaw. Dropped unfulfilled, it goes on by itself.
struct Thaw {
    /// Whose; none once it is fulfilled.
    agent: Option<AgentAddress>,
}

impl Thaw {
    async fn now(&mut self, agent: &mut GuestAgent) -> Result<u64, AgentError> {
        let outcome = agent.thaw().await;
        if outcome.is_ok() {
            self.agent = None;
        }
        outcome
    }
}

impl Drop for Thaw {
    fn drop(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(thaw_at_last(agent))),
            Err(_) => tracing::error!(%agent, "the guest may be frozen: thaw it by hand"),
        }
    }
}

async fn thaw_at_last(agent: AgentAddress) {
    for _ in 0..THAW_ATTEMPTS {
        let thawed = async { GuestAgent::at(&agent).await?.thaw().await };
        match thawed.await {
            Ok(_) => return tracing::info!(%agent, "the guest was thawed"),
            // A guest whose QEMU has ended is frozen no more.
            Err(AgentError::Libvirt(error)) if error.is_not_running() => return,
            Err(error) => tracing::warn!(%agent, %error, "the guest may be frozen; trying again"),
        }
        sleep(THAW_PAUSE).await;
    }
    tracing::error!(%agent, "the guest may be frozen and its agent does not answer: thaw it by hand");
}
