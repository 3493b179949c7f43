//! A replica as a relationship's VM: its moments are points, its bitmaps are marks.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::bitmaps::{after_durable, after_failure, judge, repair};
use model::{
    Consistency, DiskName, LogNumber, ResyncReason, Timestamp, Tracking, TravellingPin, VmId, VmName,
};
use nbd::DirtyExtent;
use primary::ports::{AgentAddress, Ahead, Capture, CaptureRequest, DiskReader, Guest, Which};
use primary::{Failure, FailureCode, KnownDisk, RecordSink};
use replica::{DiskSize, Forward, Forwardable, Store};
use serde_json::Value;

/// How often it is looked whether reading keeps too much of the disk.
const LOOK: Duration = Duration::from_secs(5);
/// The zstd level of the records that are made anew.
const LEVEL: i32 = 1;

/// A replica of this site.
pub(crate) struct ReplicaGuest {
    store: Store,
    vm: VmId,
    name: VmName,
}

impl ReplicaGuest {
    pub fn new(store: Store, vm: VmId, name: VmName) -> Self {
        Self { store, vm, name }
    }

    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// What there is to pass on.
    pub async fn there(&self) -> Result<Forwardable, Failure> {
        self.ask(|store, vm| store.forwardable(vm)).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store, VmId) -> replica::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let vm = self.vm;
        self.store.run(move |store| call(store, vm)).await.map_err(|error| failure(self.name(), &error))
    }

    /// The same for what only a VM that runs can be asked.
    fn never<T>(&self, what: &str) -> Result<T, Failure> {
        let message = format!("{} is a replica here, and cannot be {what}", self.name);
        Err(Failure::lasting(FailureCode::Replica, message))
    }

    async fn known_disks(&self) -> Result<Vec<KnownDisk>, Failure> {
        let there = self.there().await?;
        if there.newest.is_none() {
            let message = format!("{} has no recovery point here yet", self.name);
            return Err(Failure::transient(FailureCode::Replica, message));
        }
        Ok(there.disks.into_iter().map(known).collect())
    }
}

fn known(disk: DiskSize) -> KnownDisk {
    KnownDisk {
        node: disk.name.to_string(),
        name: disk.name,
        size_bytes: disk.size_bytes,
        image: None,
        joining: None,
    }
}

/// What the store refuses is tried again: moves end, failovers are cancelled, damage is made good.
fn failure(name: &str, error: &replica::Error) -> Failure {
    Failure::transient(
        FailureCode::Replica,
        format!("the replica of {name} cannot be passed on now: {error}"),
    )
}

impl Guest for ReplicaGuest {
    type Disk = KnownDisk;
    type Capture = Point;
    type Ahead = Nothing;

    /// A connection has nothing to lose; but a replica that was released or removed is to be noticed.
    fn is_alive(&self) -> bool {
        self.store.is_forwardable(self.vm)
    }

    async fn disks(&self) -> Result<Vec<KnownDisk>, Failure> {
        self.known_disks().await
    }

    async fn resolve(&self, nodes: &[String]) -> Result<Vec<KnownDisk>, Failure> {
        let disks = self.known_disks().await?;
        if disks.iter().map(|disk| &disk.node).eq(nodes) {
            return Ok(disks);
        }
        let found: Vec<&str> = disks.iter().map(|disk| disk.node.as_str()).collect();
        let message = format!(
            "the disks of {} have changed ({} before, {} now); 'afterimage unextend {}' and extend it anew",
            self.name,
            nodes.join(", "),
            found.join(", "),
            self.name
        );
        Err(Failure::lasting(FailureCode::Replica, message))
    }

    async fn definition(&self) -> Result<Value, Failure> {
        self.ask(|store, vm| store.definition(vm)).await
    }

    async fn is_quiet(&self) -> Result<bool, Failure> {
        self.never("asked whether it runs")
    }

    async fn power_down(&self) -> Result<(), Failure> {
        self.never("shut down")
    }

    async fn quit(&self) -> Result<(), Failure> {
        self.never("ended")
    }

    async fn inspect(&self, disks: &[KnownDisk], since: LogNumber) -> Result<Tracking, Failure> {
        let marks = self.ask(|store, vm| store.marks(vm)).await?;
        let found = disks.first().map_or(Ok(()), |disk| judge(&disk.name, &marks, since));
        Ok(match found {
            Ok(()) => Tracking::Intact,
            Err(_) => Tracking::Broken(ResyncReason::ChainBroken(format!(
                "the replica at this site has lost what was passed on last, as log {since}"
            ))),
        })
    }

    async fn has_news(&self, since: LogNumber) -> Result<bool, Failure> {
        self.ask(move |store, vm| store.is_newer_than_mark(vm, since)).await
    }

    async fn has_backlog(&self, since: LogNumber) -> bool {
        self.ask(move |store, vm| Ok(store.has_backlog(vm, since))).await.unwrap_or(false)
    }

    async fn pins(&self) -> Vec<TravellingPin> {
        self.ask(|store, vm| store.travelling_pins(vm)).await.unwrap_or_default()
    }

    async fn pending_bytes(&self, _disks: &[KnownDisk], since: LogNumber) -> Result<u64, Failure> {
        self.ask(move |store, vm| store.bytes_after_mark(vm, since)).await
    }

    async fn begin_ahead(&self, _disks: &[KnownDisk], _base: LogNumber) -> Result<Nothing, Failure> {
        self.never("read ahead of a moment: its points are fixed already")
    }

    async fn end_ahead(&self, _ahead: Nothing) -> Result<(), Failure> {
        Ok(())
    }

    async fn begin_capture(&self, request: CaptureRequest<'_, KnownDisk>) -> Result<Point, Failure> {
        let CaptureRequest { base, next, in_pass, .. } = request;
        let forward = self.ask(move |store, vm| store.forward(vm, base, next, in_pass)).await?;
        Ok(Point { forward: Arc::new(forward), name: self.name.clone() })
    }

    async fn begin_capture_frozen(
        &self,
        request: CaptureRequest<'_, KnownDisk>,
        _agent: &AgentAddress,
    ) -> Result<(Point, Result<(), String>), Failure> {
        Ok((self.begin_capture(request).await?, Err("a replica has no guest agent".into())))
    }

    async fn end_reading(&self, capture: Point) -> Result<(), Failure> {
        drop(capture);
        Ok(())
    }

    async fn commit(
        &self,
        _disks: &[KnownDisk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> Result<(), Failure> {
        self.ask(move |store, vm| store.change_marks(vm, |found| after_durable(found, base, next))).await
    }

    async fn give_back(&self, _disks: &[KnownDisk], base: Option<LogNumber>) -> Result<(), Failure> {
        self.ask(move |store, vm| store.change_marks(vm, |found| after_failure(found, base))).await
    }

    async fn cleanup(&self, _disks: &[KnownDisk], since: Option<LogNumber>) -> Result<(), Failure> {
        let Some(since) = since else { return Ok(()) };
        self.ask(move |store, vm| store.change_marks(vm, |found| repair(found, Some(since)))).await
    }

    async fn stop_tracking(&self, _disks: &[KnownDisk]) -> Result<(), Failure> {
        self.ask(|store, vm| store.change_marks(vm, |found| repair(found, None))).await
    }
}

/// Nothing is read ahead of a point.
pub(crate) struct Nothing;

impl Ahead for Nothing {
    type Reader = PointReader;

    async fn readers(&self) -> Result<Vec<PointReader>, Failure> {
        Ok(Vec::new())
    }
}

/// A point that is passed on.
pub(crate) struct Point {
    forward: Arc<Forward>,
    name: VmName,
}

impl Capture for Point {
    type Reader = PointReader;

    fn moment(&self) -> Timestamp {
        self.forward.point().taken_at
    }

    fn consistency(&self) -> Consistency {
        self.forward.point().consistency
    }

    async fn records(&self, to: &RecordSink) -> Result<bool, Failure> {
        let to = to.clone();
        self.read(move |forward| {
            let disks: Vec<DiskName> = forward.disks().into_iter().map(|disk| disk.name).collect();
            forward.records(&disks, LEVEL, |record| to.take(record))
        })
        .await
    }

    async fn readers(&self) -> Result<Vec<PointReader>, Failure> {
        let mut readers = Vec::new();
        for disk in self.forward.disks() {
            let name = disk.name.clone();
            let changed = self.read(move |forward| forward.changed(&name)).await?;
            let point = Self { forward: self.forward.clone(), name: self.name.clone() };
            readers.push(PointReader { point: Arc::new(point), disk, changed: changed.into() });
        }
        Ok(readers)
    }

    async fn watch(&self) -> Failure {
        loop {
            tokio::time::sleep(LOOK).await;
            match self.read(Forward::is_in_the_way).await {
                Ok(false) => {}
                Ok(true) => {
                    let message = format!(
                        "passing {} on is so slow that what arrives meanwhile would fill this site's disk; it begins anew",
                        self.name
                    );
                    return Failure::transient(FailureCode::ScratchFull, message);
                }
                Err(failure) => return failure,
            }
        }
    }
}

impl Point {
    async fn read<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Forward) -> replica::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let forward = self.forward.clone();
        let read = tokio::task::spawn_blocking(move || call(&forward)).await;
        let read = read.map_err(|error| Failure::transient(FailureCode::Replica, error.to_string()))?;
        read.map_err(|error| failure(self.name.as_str(), &error))
    }
}

/// A disk of a point that is passed on.
#[derive(Clone)]
pub(crate) struct PointReader {
    point: Arc<Point>,
    disk: DiskSize,
    /// Where it may differ from what the third site has, in order and joined.
    changed: Arc<[Range<u64>]>,
}

impl DiskReader for PointReader {
    fn name(&self) -> &DiskName {
        &self.disk.name
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        let (disk, asked) = (self.disk.name.clone(), range.clone());
        let data = self.point.read(move |forward| forward.data_extents(&disk, asked)).await?;
        Ok(match which {
            Which::Data => data.into_iter().map(|range| extent(range, false)).collect(),
            Which::Changed => marked(&clip(&self.changed, &range), &data),
            Which::Again => Vec::new(),
        })
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        let disk = self.disk.name.clone();
        self.point
            .read(move |forward| {
                let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
                forward.read_at(&disk, offset, &mut bytes)?;
                Ok(Bytes::from(bytes))
            })
            .await
    }
}

fn extent(range: Range<u64>, zero: bool) -> DirtyExtent {
    DirtyExtent { offset: range.start, len: range.end - range.start, zero }
}

/// What of sorted ranges lies in one.
fn clip(ranges: &[Range<u64>], within: &Range<u64>) -> Vec<Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= within.start);
    ranges[first..]
        .iter()
        .take_while(|range| range.start < within.end)
        .map(|range| range.start.max(within.start)..range.end.min(within.end))
        .collect()
}

/// Changed ranges, with what of them holds no data marked as zeros. Both are sorted and disjoint.
fn marked(changed: &[Range<u64>], data: &[Range<u64>]) -> Vec<DirtyExtent> {
    let mut extents = Vec::new();
    for range in changed {
        let mut at = range.start;
        for data in clip(data, range) {
            if at < data.start {
                extents.push(extent(at..data.start, true));
            }
            at = data.end;
            extents.push(extent(data, false));
        }
        if at < range.end {
            extents.push(extent(at..range.end, true));
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_data_or_zeros() {
        let changed = [0..10, 20..30, 50..60];
        let data = [5..25, 28..29, 55..100];
        let shown: Vec<_> = marked(&clip(&changed, &(2..58)), &data)
            .into_iter()
            .map(|extent| (extent.offset, extent.end(), extent.zero))
            .collect();
        let expected = [
            (2, 5, true),
            (5, 10, false),
            (20, 25, false),
            (25, 28, true),
            (28, 29, false),
            (29, 30, true),
            (50, 55, true),
            (55, 58, false),
        ];
        assert_eq!(shown, expected);
    }
}
