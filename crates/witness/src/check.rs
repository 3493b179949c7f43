//! Which state do the disks show?

use std::collections::HashMap;
use std::io;

use crate::script::{Action, Script};
use crate::{BLOCK_BYTES, Region};

/// The disks show no state that the writer took them through.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// A block is not what the newest write to it had left there.
    #[error(
        "disk {disk} at byte {offset}: the disks show write {state} elsewhere, so this block must hold {expected}, but it holds {found}"
    )]
    Block {
        /// The newest write found on any disk.
        state: u64,
        /// The disk.
        disk: usize,
        /// The block's place in bytes.
        offset: u64,
        /// What had to be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The disks show a write that had not been begun.
    #[error("the disks show write {found}, but only {begun} had been begun")]
    Future {
        /// The write found.
        found: u64,
        /// The last write begun.
        begun: u64,
    },
    /// A disk could not be read.
    #[error("a disk could not be read: {0}")]
    Read(#[from] io::Error),
}

/// Tells which state of a [`Script`] disks show.
pub struct Checker<'a> {
    script: &'a Script,
}

/// Read at once; bounds the memory of a check.
const READ_BYTES: u64 = 1 << 20;

impl<'a> Checker<'a> {
    /// A checker for disks that `script` wrote and nobody else.
    #[must_use]
    pub fn new(script: &'a Script) -> Self {
        Self { script }
    }

    /// The number of the newest write that the disks show, all of them together; an error if they
    /// show no prefix of the script. `begun` is the newest write that was begun, `read` fills the
    /// buffer from a disk.
    pub fn state(
        &self,
        begun: u64,
        mut read: impl FnMut(usize, u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<u64, Violation> {
        let newest = self.newest_stamp(&mut read)?;
        if newest > begun {
            return Err(Violation::Future { found: newest, begun });
        }
        let mut owners = self.owners(newest);
        // Writes of zeros leave no stamp: the state may be some of them further than the newest stamp.
        let mut state = newest;
        loop {
            match self.compare(state, &owners, &mut read) {
                Ok(()) => return Ok(state),
                Err(violation) => {
                    let next = self.script.write(state + 1);
                    if next.action == Action::Data || next.number > begun {
                        return Err(violation);
                    }
                    state += 1;
                    own(&mut owners, &next);
                }
            }
        }
    }

    fn newest_stamp(
        &self,
        read: &mut impl FnMut(usize, u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<u64, Violation> {
        let mut newest = 0;
        self.each_block(read, |_, _, block| {
            newest = newest.max(self.script.stamp(block).unwrap_or(0));
            Ok(())
        })?;
        Ok(newest)
    }

    /// For each block ever written up to `state`: by which write last.
    fn owners(&self, state: u64) -> HashMap<(usize, u64), u64> {
        let mut owners = HashMap::new();
        for number in 1..=state {
            own(&mut owners, &self.script.write(number));
        }
        owners
    }

    fn compare(
        &self,
        state: u64,
        owners: &HashMap<(usize, u64), u64>,
        read: &mut impl FnMut(usize, u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), Violation> {
        let mut expected = vec![0; BLOCK_BYTES as usize];
        self.each_block(read, |disk, offset, block| {
            let owner = owners.get(&(disk, offset)).map(|&number| self.script.write(number));
            match owner {
                Some(write) if write.action == Action::Data => {
                    self.script.fill_block(&write, offset, &mut expected)
                }
                _ => expected.fill(0),
            }
            if block == expected {
                return Ok(());
            }
            let expected = owner.map_or("zeros".into(), |w| format!("write {} ({:?})", w.number, w.action));
            let found = match self.script.stamp(block) {
                Some(number) => format!("write {number}"),
                None if block.iter().all(|&byte| byte == 0) => "zeros".into(),
                None => "bytes that no write had".into(),
            };
            Err(Violation::Block { state, disk, offset, expected, found })
        })
    }

    fn each_block(
        &self,
        read: &mut impl FnMut(usize, u64, &mut [u8]) -> io::Result<()>,
        mut look: impl FnMut(usize, u64, &[u8]) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        let mut buffer = vec![0; READ_BYTES as usize];
        for &Region { disk, offset, len } in self.script.regions() {
            let mut at = offset;
            while at < offset + len {
                let bytes = READ_BYTES.min(offset + len - at) as usize;
                read(disk, at, &mut buffer[..bytes])?;
                for (place, block) in
                    (at..).step_by(BLOCK_BYTES as usize).zip(buffer[..bytes].chunks(BLOCK_BYTES as usize))
                {
                    look(disk, place, block)?;
                }
                at += bytes as u64;
            }
        }
        Ok(())
    }
}

fn own(owners: &mut HashMap<(usize, u64), u64>, write: &crate::Write) {
    for offset in (write.offset..write.offset + write.len).step_by(BLOCK_BYTES as usize) {
        owners.insert((write.disk, offset), write.number);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn script(seed: u64) -> Script {
        let region = |disk, offset| Region { disk, offset, len: 32 * BLOCK_BYTES };
        Script::new(seed, vec![region(0, 0), region(1, 8 * BLOCK_BYTES), region(2, 0)], 5)
    }

    type Disks = Vec<Vec<u8>>;

    fn after(script: &Script, writes: u64) -> Disks {
        let mut disks = vec![vec![0; 64 * BLOCK_BYTES as usize]; 3];
        for number in 1..=writes {
            let write = script.write(number);
            let at = write.offset as usize;
            disks[write.disk][at..at + write.len as usize].copy_from_slice(&script.data(&write));
        }
        disks
    }

    fn state(script: &Script, disks: &Disks, begun: u64) -> Result<u64, Violation> {
        Checker::new(script).state(begun, |disk, offset, buffer| {
            buffer.copy_from_slice(&disks[disk][offset as usize..][..buffer.len()]);
            Ok(())
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_state_is_recognised(seed: u64, writes in 0_u64..200) {
            let script = script(seed);
            let shown = state(&script, &after(&script, writes), writes).unwrap();
            // Trailing writes of zeros over zeros change nothing: then an earlier number is as true.
            prop_assert_eq!(after(&script, shown), after(&script, writes));
        }

        #[test]
        fn disks_of_two_moments_are_caught(seed: u64, writes in 20_u64..100, ahead in 3_u64..20) {
            let script = script(seed);
            let mut disks = after(&script, writes);
            let later = after(&script, writes + ahead);
            prop_assume!(disks[0] != later[0] && (disks[1] != later[1] || disks[2] != later[2]));
            disks[0].clone_from(&later[0]);
            // Mixed disks could by chance be a state of their own; then they are equal to it.
            if let Ok(shown) = state(&script, &disks, writes + ahead) {
                prop_assert_eq!(after(&script, shown), disks);
            }
        }
    }

    #[test]
    fn a_lost_a_torn_and_a_future_write_are_caught() {
        let script = script(1);
        let full = after(&script, 50);
        let last = (1..=50).rev().map(|n| script.write(n)).find(|w| w.action == Action::Data).unwrap();
        let mut torn = full.clone();
        torn[last.disk][last.offset as usize + 2000] ^= 1;
        assert!(matches!(state(&script, &torn, 50), Err(Violation::Block { .. })));
        let before = script.write(49 - u64::from(last.number == 49));
        let mut lost = full.clone();
        lost[before.disk][before.offset as usize..][..4096].fill(0x55);
        assert!(state(&script, &lost, 50).is_err());
        assert!(matches!(state(&script, &full, 10), Err(Violation::Future { .. })));
        assert!(state(&script, &full, 50).is_ok());
    }
}
