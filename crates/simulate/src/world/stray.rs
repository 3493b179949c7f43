//! Logs that do not belong where they are sent: none of them may ever become a part of a chain.

use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::{Consistency, Head, LogClass, LogId, LogNumber, Phase, Progress, Purpose, VmId};

use super::{Checked, World, wrong};
use crate::event::{Side, Stray};
use crate::ports::PRIMARY;

impl World {
    pub(super) fn send_stray(&mut self, place: usize, stray: Stray) -> Checked {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return Ok(()) };
        let (Ok(head), Ok(facts)) = (store.head(vm), store.facts(vm)) else { return Ok(()) };
        let (header, mut bytes) = self.stray_log(place, vm, head, &facts.phase, stray);
        if stray == Stray::Bytes {
            let at = self.chance.place(bytes.len());
            bytes[at] ^= 1 << self.chance.below(8);
        }
        let peer = if stray == Stray::Peer { "stranger" } else { PRIMARY };
        let sent = store.append(peer, vm, header.number, header.id, 0, &bytes, true);
        self.coverage.hit(format!("stray {stray:?}"));
        self.note(|| format!("stray {stray:?}: {:?}", sent.as_ref().map_err(replica::Error::code)));
        match sent {
            Ok(state) if state.durable => wrong(format!("a log was taken whose {stray:?} is wrong")),
            _ => Ok(()),
        }
    }

    /// A log that would be the next one, but for what is wrong with it.
    fn stray_log(
        &mut self,
        place: usize,
        vm: VmId,
        head: Head,
        phase: &Phase,
        stray: Stray,
    ) -> (Header, Vec<u8>) {
        let fitting = match phase {
            Phase::InitialReplication { .. } => Purpose::Initial,
            Phase::Replicating | Phase::Failover { .. } | Phase::FailedOver => Purpose::Changes,
            Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. } => Purpose::Resync,
        };
        let wrong_purpose = if fitting == Purpose::Changes { Purpose::Initial } else { Purpose::Changes };
        let machine = self.vms[place].machine.clone();
        let machine = machine.lock();
        let disk = |disk| DiskInfo { name: machine.name(disk).clone(), size_bytes: machine.bytes(disk) };
        let header = Header {
            vm: if stray == Stray::Vm { VmId::from_bytes(self.chance.bytes()) } else { vm },
            id: LogId::from_bytes(self.chance.bytes()),
            number: if stray == Stray::Number { LogNumber(head.number.0 + 2) } else { head.number.next() },
            predecessor: if stray == Stray::Predecessor {
                LogId::from_bytes(self.chance.bytes())
            } else {
                head.id
            },
            moment: self.clock(Side::Primary).now(),
            purpose: if stray == Stray::Purpose { wrong_purpose } else { fitting },
            disks: (0..machine.disk_count()).map(disk).collect(),
        };
        let mut encoder = Encoder::new(Vec::new(), &header).expect("a plain header");
        let mut batcher = Batcher::new(0);
        let mut records =
            batcher.data(0, &vec![0xbd; usize::try_from(machine.bytes(0).min(4096)).unwrap_or(0)]);
        records.extend(batcher.finish());
        records.into_iter().for_each(|record| encoder.record(record.encode(1)).expect("a plain record"));
        let footer = Footer { class: LogClass::Point(Consistency::Crash), progress: Progress::default() };
        let (_, bytes) = encoder.finish(footer).expect("a plain log");
        (header, bytes)
    }
}
