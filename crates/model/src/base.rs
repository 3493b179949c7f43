//! When the base of a replica may be taken forward.
//!
//! Retention says how far it may go; this says whether now. A hold keeps the base where it is. So does a
//! barrier, so that the point that the base equals is still there when the hold is asked for; but an apply
//! that was cut off or has failed is run again even behind one, for until it has ended there is nothing to hold.

use crate::{ApplyState, LogNumber, Timestamp};

/// What is true of a base and of those who want it to stay.
#[derive(Debug, Clone, Copy)]
pub struct BaseState<'a> {
    /// What the last apply came to.
    pub apply: &'a ApplyState,
    /// Somebody reads the flat files.
    pub held: bool,
    /// A barrier is up: somebody waits to read them.
    pub barred: bool,
    /// A failed apply is not tried again before this.
    pub retry_at: Timestamp,
}

impl BaseState<'_> {
    /// Whether retention has to leave the base where it is.
    #[must_use]
    pub fn stays(&self) -> bool {
        self.held || (self.barred && *self.apply == ApplyState::Idle)
    }

    /// How far to apply now, if at all: `planned` is what retention lets (with [`Self::stays`] as its
    /// `held`), `unfinished` how far the apply was to go that did not come to its end.
    #[must_use]
    pub fn apply_through(
        &self,
        planned: Option<LogNumber>,
        unfinished: Option<LogNumber>,
        now: Timestamp,
    ) -> Option<LogNumber> {
        match self.apply {
            _ if self.held => None,
            ApplyState::Failed { .. } if self.retry_at > now => None,
            // What was begun is ended first, and nothing may read the base before that.
            ApplyState::Failed { .. } | ApplyState::Interrupted { .. } => unfinished.max(planned),
            _ => planned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000);
    const PLANNED: Option<LogNumber> = Some(LogNumber(7));
    const UNFINISHED: Option<LogNumber> = Some(LogNumber(9));

    fn base(apply: &ApplyState) -> BaseState<'_> {
        BaseState { apply, held: false, barred: false, retry_at: Timestamp(0) }
    }

    #[test]
    fn a_hold_stops_everything_and_a_barrier_what_has_not_begun() {
        let (idle, cut_off) = (ApplyState::Idle, ApplyState::Interrupted { since: NOW });
        let held = |apply| BaseState { held: true, ..base(apply) };
        let barred = |apply| BaseState { barred: true, ..base(apply) };
        assert!(held(&idle).stays() && barred(&idle).stays() && !base(&idle).stays());
        assert_eq!(held(&cut_off).apply_through(PLANNED, UNFINISHED, NOW), None);
        assert!(!barred(&cut_off).stays(), "without the rest of that apply there is nothing to hold");
        assert_eq!(barred(&cut_off).apply_through(None, UNFINISHED, NOW), UNFINISHED);
    }

    #[test]
    fn a_failed_apply_waits_for_its_time_and_then_goes_at_least_as_far_as_before() {
        let failed = ApplyState::Failed { since: NOW, error: "disk".into() };
        let later = BaseState { retry_at: Timestamp(1_001), ..base(&failed) };
        assert_eq!(later.apply_through(PLANNED, UNFINISHED, NOW), None);
        assert_eq!(base(&failed).apply_through(PLANNED, UNFINISHED, NOW), UNFINISHED);
        assert_eq!(base(&failed).apply_through(PLANNED, Some(LogNumber(3)), NOW), PLANNED);
        assert_eq!(base(&ApplyState::Idle).apply_through(PLANNED, UNFINISHED, NOW), PLANNED);
    }
}
