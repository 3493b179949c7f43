//! Whether a log continues a chain.

use std::time::Duration;

use log::Header;
use model::{Head, LogId, LogNumber, Timestamp, VmId};

/// The end of a chain, as its replica knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// The VM.
    pub vm: VmId,
    /// The newest durable log.
    pub head: Head,
    /// Its moment; none for an empty chain.
    pub moment: Option<Timestamp>,
}

/// A log that continues the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continues {
    /// How far its moment lies before the one of the log before it. Numbers give the order, so this is
    /// allowed; but a clock was set back, and that is worth an event.
    pub moment_went_back: Option<Duration>,
}

/// A log that does not continue the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It is another VM's.
    #[error("the log is of VM {found}, this chain of VM {expected}; send it to its own chain")]
    WrongVm {
        /// The chain's VM.
        expected: VmId,
        /// The log's.
        found: VmId,
    },
    /// It is not the next one.
    #[error(
        "log {found} of VM {vm} does not follow: number {expected} is next; ask for the chain's newest log and go on from there"
    )]
    WrongNumber {
        /// The VM.
        vm: VmId,
        /// The number that is next.
        expected: LogNumber,
        /// The log's.
        found: LogNumber,
    },
    /// It follows another log than the newest one.
    #[error(
        "log {number} of VM {vm} follows {found}, but this chain ends with {expected}; the VM must be resynchronized"
    )]
    WrongPredecessor {
        /// The VM.
        vm: VmId,
        /// The log's number.
        number: LogNumber,
        /// The id of the chain's newest log.
        expected: LogId,
        /// The one that the log names.
        found: LogId,
    },
}

impl ChainError {
    /// The stable code, for scripts and for the wire.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::WrongVm { .. } => "wrong-vm",
            Self::WrongNumber { .. } => "wrong-number",
            Self::WrongPredecessor { .. } => "wrong-predecessor",
        }
    }
}

/// Whether the log with this header is the next of the chain.
pub fn check_next(tip: &Tip, header: &Header) -> Result<Continues, ChainError> {
    let Header { vm, number, predecessor, moment, .. } = *header;
    if vm != tip.vm {
        return Err(ChainError::WrongVm { expected: tip.vm, found: vm });
    }
    // The greatest number has no next one: no log can follow it, least of all number 0.
    match tip.head.number.0.checked_add(1) {
        Some(next) if next == number.0 => {}
        next => {
            let expected = LogNumber(next.unwrap_or(u64::MAX));
            return Err(ChainError::WrongNumber { vm, expected, found: number });
        }
    }
    if predecessor != tip.head.id {
        return Err(ChainError::WrongPredecessor { vm, number, expected: tip.head.id, found: predecessor });
    }
    let back = tip.moment.map_or(Duration::ZERO, |before| before.since(moment));
    Ok(Continues { moment_went_back: (!back.is_zero()).then_some(back) })
}

#[cfg(test)]
mod tests {
    use model::Purpose;

    use super::*;

    fn header(number: u64, predecessor: LogId) -> Header {
        Header {
            vm: VmId::from_bytes([1; 16]),
            id: LogId::from_bytes([9; 16]),
            number: LogNumber(number),
            predecessor,
            moment: Timestamp(5_000_000),
            purpose: Purpose::Changes,
            disks: Vec::new(),
        }
    }

    fn tip(head: Head, moment: Option<Timestamp>) -> Tip {
        Tip { vm: VmId::from_bytes([1; 16]), head, moment }
    }

    fn code(tip: &Tip, header: &Header) -> Option<&'static str> {
        check_next(tip, header).err().map(|error| error.code())
    }

    #[test]
    fn only_the_next_log_of_this_chain_is_taken() {
        let id = LogId::from_bytes([7; 16]);
        let at_7 = tip(Head { number: LogNumber(7), id }, Some(Timestamp(4_000_000)));
        assert_eq!(check_next(&at_7, &header(8, id)), Ok(Continues { moment_went_back: None }));
        assert_eq!(code(&at_7, &header(7, id)), Some("wrong-number"));
        assert_eq!(code(&at_7, &header(9, id)), Some("wrong-number"));
        assert_eq!(code(&at_7, &header(8, LogId::NONE)), Some("wrong-predecessor"));
        let other = Header { vm: VmId::from_bytes([2; 16]), ..header(8, id) };
        assert_eq!(code(&at_7, &other), Some("wrong-vm"));
        assert_eq!(code(&tip(Head::EMPTY, None), &header(1, LogId::NONE)), None);
        let last = tip(Head { number: LogNumber(u64::MAX), id }, None);
        assert_eq!(code(&last, &header(u64::MAX, id)), Some("wrong-number"));
    }

    #[test]
    fn a_clock_that_was_set_back_is_noted() {
        let late = tip(Head::EMPTY, Some(Timestamp(8_000_000)));
        let continues = check_next(&late, &header(1, LogId::NONE)).unwrap();
        assert_eq!(continues.moment_went_back, Some(Duration::from_secs(3)));
    }
}
