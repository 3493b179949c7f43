//! What of some logs is still true, as records for another log: one that they are merged into, or one that is passed on.

use std::collections::BTreeMap;

use chain::ApplyPlan;
use log::{Batcher, EncodedRecord, RawRecord};
use model::LogNumber;

use crate::error::Result;
use crate::vm::Indexed;

/// Takes it out of them, zeros first.
pub(crate) struct Survivors<T> {
    /// A record of which everything is still true goes as it is, with its checksum, and without being decompressed.
    pub lifts: bool,
    /// How the others are compressed anew.
    pub level: i32,
    /// Gets each record, and says whether it wants more.
    pub take: T,
}

impl<T: FnMut(EncodedRecord) -> Result<bool>> Survivors<T> {
    /// All that a plan over these logs names; false if no more was wanted before its end.
    pub fn of(mut self, plan: &ApplyPlan, logs: &[&Indexed]) -> Result<bool> {
        Ok(self.zeros(plan)? && self.records(plan, logs)?)
    }

    fn zeros(&mut self, plan: &ApplyPlan) -> Result<bool> {
        let mut zeros = plan.zeros.clone();
        zeros.sort_unstable();
        for of_disk in zeros.chunk_by(|a, b| a.0 == b.0) {
            let mut batcher = Batcher::new(place(of_disk[0].0));
            for (_, extent) in of_disk {
                if !self.add(batcher.zero(extent.offset, extent.len))? {
                    return Ok(false);
                }
            }
            if !self.add(batcher.finish())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn records(&mut self, plan: &ApplyPlan, logs: &[&Indexed]) -> Result<bool> {
        let logs: BTreeMap<LogNumber, &Indexed> = logs.iter().map(|log| (log.log.number, *log)).collect();
        let (mut stored, mut raw) = (Vec::new(), Vec::new());
        let mut current: Option<(usize, Batcher)> = None;
        for work in plan.records() {
            let log = logs[&work.log];
            let entry = &log.index.records[work.record as usize];
            let survive: u64 = work.pieces.iter().map(|piece| u64::from(piece.len)).sum();
            if self.lifts && survive == u64::from(entry.raw_bytes) {
                if !(self.take)(log.log.lift(entry, &mut stored)?)? {
                    return Ok(false);
                }
                continue;
            }
            log.log.record(entry, &mut stored, &mut raw)?;
            if current.as_ref().is_none_or(|(disk, _)| *disk != work.disk)
                && let Some((_, batcher)) = current.replace((work.disk, Batcher::new(place(work.disk))))
                && !self.add(batcher.finish())?
            {
                return Ok(false);
            }
            let Some((_, batcher)) = &mut current else { continue };
            for piece in work.pieces {
                let bytes = &raw[piece.skip as usize..piece.skip as usize + piece.len as usize];
                let full = batcher.data(piece.disk_offset, bytes);
                if !self.add(full)? {
                    return Ok(false);
                }
            }
        }
        current.map_or(Ok(true), |(_, batcher)| self.add(batcher.finish()))
    }

    fn add(&mut self, records: Vec<RawRecord>) -> Result<bool> {
        for record in records {
            if !(self.take)(record.encode(self.level))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A disk's place in a log's header: the format bounds them.
fn place(disk: usize) -> u16 {
    u16::try_from(disk).expect("a log has no more disks than its format allows")
}
