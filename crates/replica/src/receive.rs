//! Receiving a log: to a partial file, verified as it arrives, and at its end durable or not there at all.
//!
//! ```text
//! append … append(last) ─▶ verified ─▶ file synced ─▶ renamed to logs/ ─▶ folders synced ─▶ one transaction ─▶ durable
//!    └── wrong number, predecessor, purpose, bytes; no space; a failed sync: partial file removed, refused
//! ```
//!
//! One log of a VM arrives at a time. Another attempt (another id) takes the place of an older one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use chain::{Tip, check_next};
use files::File;
use log::{Header, Verified, Verifier};
use model::{Head, LogId, LogNumber, Phase, Purpose, ReplicaTally, VmId, phase_after, tally_ms};
use steps::durable_step;

use crate::error::{Error, Refused, Result, is_no_space};
use crate::folder::{Folder, parse_partial};
use crate::fs::Files;
use crate::relationship::{check_peer, fenced, pin_awaited, refuses_logs, set_phase};
use crate::rows::{self, LogRow};
use crate::store::Store;
use crate::vm::{ChainLog, State, Vm, read_exact};

/// How far an upload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadState {
    /// The bytes that are here: where to go on.
    pub offset: u64,
    /// The log is whole and durable.
    pub durable: bool,
}

/// The system is asked to write what has arrived to the disk every this many bytes, so that little is left
/// to do in the sync at the end; the free space is looked at as often.
const WRITEBACK_BYTES: u64 = 8 << 20;

/// A log that is arriving.
pub(crate) struct Incoming {
    head: Head,
    path: PathBuf,
    file: Arc<dyn File>,
    verifier: Verifier,
    /// Its header was found to continue the chain.
    checked: bool,
    offset: u64,
    written_back: u64,
}

impl Store {
    /// How far the upload of a log is, so that a primary goes on where a broken link stopped it.
    pub fn upload_state(&self, peer: &str, vm: VmId, number: LogNumber, id: LogId) -> Result<UploadState> {
        let vm = self.vm_to_receive(vm)?;
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Head { number, id };
        if let Some(durable) = expect(&vm, peer, wanted)? {
            return Ok(durable);
        }
        check_not_paused(&vm)?;
        self.resume_partial(&vm, &mut receiving, wanted)?;
        let offset = receiving.as_ref().filter(|incoming| incoming.head == wanted).map_or(0, |i| i.offset);
        Ok(UploadState { offset, durable: false })
    }

    /// Takes the next bytes of a log. Bytes at another offset than the next one are not taken; the answer
    /// says where to go on. With `last` the log is verified, made durable and becomes a part of the chain.
    #[allow(clippy::too_many_arguments, reason = "what a request of the wire has")]
    pub fn append(
        &self,
        peer: &str,
        vm: VmId,
        number: LogNumber,
        id: LogId,
        offset: u64,
        bytes: &[u8],
        last: bool,
    ) -> Result<UploadState> {
        let vm = self.vm_to_receive(vm)?;
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Head { number, id };
        if let Some(durable) = expect(&vm, peer, wanted)? {
            return Ok(durable);
        }
        check_not_paused(&vm)?;
        self.resume_partial(&vm, &mut receiving, wanted)?;
        if receiving.as_ref().is_none_or(|incoming| incoming.head != wanted) {
            if offset != 0 {
                return Ok(UploadState { offset: 0, durable: false });
            }
            self.discard(&mut receiving);
            *receiving = Some(self.begin(&vm, wanted)?);
        }
        let outcome = match receiving.as_mut() {
            Some(incoming) if incoming.offset != offset => {
                return Ok(UploadState { offset: incoming.offset, durable: false });
            }
            Some(incoming) => self.take(&vm, incoming, bytes),
            None => return Ok(UploadState { offset: 0, durable: false }),
        };
        if let Err(error) = outcome {
            self.discard(&mut receiving);
            return Err(error);
        }
        match receiving.take_if(|_| last) {
            Some(incoming) => self.finish(&vm, incoming),
            None => Ok(UploadState { offset: offset + bytes.len() as u64, durable: false }),
        }
    }

    /// The VM that a log is for. Whoever goes on sending to what was failed over for good is told so.
    fn vm_to_receive(&self, vm: VmId) -> Result<Arc<Vm>> {
        self.vm(vm).map_err(|error| match rows::fence(self.catalog(), vm) {
            Ok(Some(fence)) => fenced(&fence, fence.generation.saturating_sub(1)).into(),
            _ => error,
        })
    }

    /// Forgets a log that is arriving, of which no more is to be taken: its room is free again.
    pub fn give_up_upload(&self, peer: &str, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = {
            let state = vm.live()?;
            check_peer(&state, peer)?;
            state.folder()
        };
        *receiving = None;
        remove_partials(&folder, None)
    }

    fn begin(&self, vm: &Vm, head: Head) -> Result<Incoming> {
        let folder = vm.live()?.folder();
        self.check_space(&folder, 0)?;
        remove_partials(&folder, None)?;
        let path = folder.partial(head.number, head.id);
        let incoming = Incoming::open(&folder.files, head, path)?;
        durable_step("replica::receive::begun");
        Ok(incoming)
    }

    /// After a restart: takes up a partial file by reading it again.
    fn resume_partial(
        &self,
        vm: &Vm,
        receiving: &mut MutexGuard<'_, Option<Incoming>>,
        head: Head,
    ) -> Result<()> {
        if receiving.is_some() {
            return Ok(());
        }
        let folder = vm.live()?.folder();
        let (files, path) = (&folder.files, folder.partial(head.number, head.id));
        if !files.exists(&path)? {
            return Ok(());
        }
        let mut incoming = Incoming::open(files, head, path)?;
        let len = incoming.file.len().map_err(Error::io("reading", &incoming.path))?;
        let mut buf = vec![0; 1 << 20];
        while incoming.offset < len {
            let part = usize::try_from(len - incoming.offset).map_or(buf.len(), |left| left.min(buf.len()));
            read_exact(&*incoming.file, &incoming.path, &mut buf[..part], incoming.offset)?;
            if incoming.verify(vm, &buf[..part]).is_err() {
                // What a crash left of it is not what had been sent (the file was not synced): start over.
                return files.remove_file(&incoming.path);
            }
            incoming.offset += part as u64;
        }
        **receiving = Some(incoming);
        Ok(())
    }

    fn take(&self, vm: &Vm, incoming: &mut Incoming, bytes: &[u8]) -> Result<()> {
        incoming.verify(vm, bytes)?;
        incoming.file.write_all_at(bytes, incoming.offset).map_err(|error| incoming.write_failed(error))?;
        incoming.offset += bytes.len() as u64;
        let fresh = incoming.offset - incoming.written_back;
        if fresh >= WRITEBACK_BYTES {
            incoming.file.start_writeback(incoming.written_back, fresh);
            incoming.written_back = incoming.offset;
            let folder = vm.live()?.folder();
            self.check_space(&folder, 0)?;
        }
        Ok(())
    }

    fn discard(&self, receiving: &mut Option<Incoming>) {
        if let Some(incoming) = receiving.take()
            && let Err(error) = self.files().remove_file(&incoming.path)
        {
            tracing::warn!(%error, "a partial log stays until the next one begins");
        }
    }

    /// Makes a whole log durable and a part of the chain.
    fn finish(&self, vm: &Vm, incoming: Incoming) -> Result<UploadState> {
        let Incoming { head, path, file, verifier, offset, .. } = incoming;
        let outcome = verifier
            .finish()
            .map_err(|error| bad_log(&error))
            .and_then(|verified| self.make_durable(vm, head, &path, &*file, &verified));
        if let Err(error) = outcome {
            // A file whose sync failed may not hold what was written: it is never used again.
            self.files().remove_file(&path)?;
            return Err(error);
        }
        self.wake(vm.id);
        Ok(UploadState { offset, durable: true })
    }

    fn make_durable(
        &self,
        vm: &Vm,
        head: Head,
        path: &Path,
        file: &dyn File,
        verified: &Verified,
    ) -> Result<()> {
        durable_step("replica::receive::verified");
        file.sync_data().map_err(|error| sync_failed(path, error))?;
        durable_step("replica::receive::synced");
        let mut state = vm.live()?;
        check_continues(&state, &verified.header)?;
        let folder = state.folder();
        let name = format!("{}.log", head.number);
        let target = folder.log(&name);
        let files = &folder.files;
        // A commit that failed may have named a file of this name.
        self.catalog().settle()?;
        files.rename(path, &target)?;
        durable_step("replica::receive::renamed");
        let settled = files.sync_folder(&folder.logs()).and_then(|()| {
            durable_step("replica::receive::listed");
            files.sync_folder(&folder.incoming())
        });
        durable_step("replica::receive::folders");
        let row = LogRow::from_verified(verified, head.number, name);
        let outcome = settled.and_then(|()| self.add_to_chain(&mut state, row, &verified.header));
        // Where the next process may find it in the catalog all the same, it finds its file too.
        if outcome.is_err() && self.catalog().settle().is_ok() {
            files.remove_file(&target)?;
        }
        durable_step("replica::receive::committed");
        outcome
    }

    /// One transaction: the log, the point that it makes, the head and the phase.
    pub(crate) fn add_to_chain(&self, state: &mut State, log: LogRow, header: &Header) -> Result<()> {
        let now = self.now();
        let mut row = state.row.clone();
        let doc = &mut row.doc;
        doc.head = log.head();
        doc.head_moment = Some(log.moment);
        doc.last_log_at = Some(now);
        doc.reported.error = None; // it was overcome
        let point = log.point();
        let last_point = state.points.values().next_back();
        let gap =
            point.zip(last_point).map_or(Duration::ZERO, |(new, last)| new.taken_at.since(last.taken_at));
        let tally = ReplicaTally {
            logs: 1,
            log_bytes: log.bytes,
            log_bytes_max: log.bytes,
            gap_ms_max: tally_ms(gap),
            ..ReplicaTally::default()
        };
        doc.measured.note(&tally, now, self.inner.config.health.window);
        let phase = phase_after(log.purpose, point.is_some(), log.progress, &doc.phase);
        set_phase(doc, phase, now);
        if point.is_some() {
            doc.damage = None;
        }
        if log.purpose != Purpose::Initial {
            doc.media = None; // the primary has heard that they were imported, or has given them up
        }
        for disk in &header.disks {
            if !doc.disks.contains(&disk.name) {
                doc.disks.push(disk.name.clone());
            }
        }
        if pin_awaited(doc, point.iter()) {
            durable_step("replica::receive::pinning");
            crate::rebuild::describe_row(&row, state)?;
            durable_step("replica::receive::pinned");
        }
        let (vm, saved) = (state.row.vm, log.clone());
        durable_step("replica::receive::chaining");
        self.commit(state, row, move |tx| {
            rows::add_log(tx, vm, &saved)?;
            point.iter().try_for_each(|point| rows::add_point(tx, vm, point))
        })?;
        durable_step("replica::receive::chained");
        if let Some(point) = point {
            state.points.insert(point.number, point);
        }
        state.newest = None;
        state.logs.insert(log.number, ChainLog::new(log));
        Ok(())
    }

    /// Refuses when less than the reserve would be free.
    pub(crate) fn check_space(&self, folder: &Folder, wanted_bytes: u64) -> Result<()> {
        let reserve = self.inner.config.free_reserve_bytes;
        let free = folder.files.free_bytes(&folder.path)?;
        if free < reserve.saturating_add(wanted_bytes) {
            let detail = format!("{} MiB free, {} MiB are kept back", free >> 20, reserve >> 20);
            return Err(Refused::no_space(&folder.path, &detail).into());
        }
        Ok(())
    }
}

impl Incoming {
    /// A partial file of which nothing has been looked at yet.
    fn open(files: &Files, head: Head, path: PathBuf) -> Result<Self> {
        let file = files.open_or_create(&path)?;
        let verifier = Verifier::new();
        Ok(Self { head, path, file, verifier, checked: false, offset: 0, written_back: 0 })
    }

    /// Feeds the verifier; the header is held against the chain as soon as it is there.
    fn verify(&mut self, vm: &Vm, bytes: &[u8]) -> Result<()> {
        self.verifier.feed(bytes).map_err(|error| bad_log(&error))?;
        if let Some(header) = self.verifier.header().filter(|_| !self.checked) {
            if (header.number, header.id) != (self.head.number, self.head.id) {
                let message = format!(
                    "the log says that it is number {} ({}), it was announced as number {} ({})",
                    header.number, header.id, self.head.number, self.head.id
                );
                return Err(Refused::lasting("wrong-number", message).into());
            }
            check_continues(&*vm.live()?, header)?;
            self.checked = true;
        }
        Ok(())
    }

    fn write_failed(&self, error: io::Error) -> Error {
        if is_no_space(&error) {
            return Refused::no_space(&self.path, &error.to_string()).into();
        }
        Error::io("writing", &self.path)(error)
    }
}

fn sync_failed(path: &Path, error: io::Error) -> Error {
    if is_no_space(&error) {
        return Refused::no_space(path, &error.to_string()).into();
    }
    Error::io("syncing", path)(error)
}

/// Nothing is taken while a backup has replication paused. What has arrived of a log stays; it goes on from there.
fn check_not_paused(vm: &Vm) -> Result<()> {
    let state = vm.live()?;
    if state.pauses == 0 {
        return Ok(());
    }
    let message = format!("replication of {} is paused for a backup; it goes on by itself", state.row.name);
    Err(Refused::transient("paused", message, Duration::from_secs(5)).into())
}

/// Whether the log may be sent now; the answer if it is here already.
fn expect(vm: &Vm, peer: &str, wanted: Head) -> Result<Option<UploadState>> {
    let state = vm.live()?;
    check_peer(&state, peer)?;
    let head = state.row.doc.head;
    if wanted == head && head != Head::EMPTY {
        let bytes = state.logs.get(&head.number).map_or(0, |log| log.row.bytes);
        return Ok(Some(UploadState { offset: bytes, durable: true }));
    }
    if let Some(refused) = refuses_logs(&state) {
        return Err(refused.into());
    }
    if wanted.number != head.number.next() {
        let message = format!(
            "log {} of VM {} does not follow: number {} is next; ask for the chain's newest log and go on from there",
            wanted.number,
            state.row.name,
            head.number.next()
        );
        return Err(Refused::lasting("wrong-number", message).into());
    }
    Ok(None)
}

/// Whether a log continues the chain, in its place and in its purpose: changes are worth nothing while
/// what they are changes of is not complete here.
pub(crate) fn check_continues(state: &State, header: &Header) -> Result<()> {
    if let Some(refused) = refuses_logs(state) {
        return Err(refused.into());
    }
    let doc = &state.row.doc;
    let tip = Tip { vm: state.row.vm, head: doc.head, moment: doc.head_moment };
    let continues =
        check_next(&tip, header).map_err(|error| Refused::lasting(error.code(), error.to_string()))?;
    if let Some(back) = continues.moment_went_back {
        tracing::warn!(vm = %state.row.name, log = %header.number, ?back, "the primary's clock was set back");
    }
    let fits = match header.purpose {
        Purpose::Initial => matches!(doc.phase, Phase::InitialReplication { .. }),
        Purpose::Changes => matches!(doc.phase, Phase::Replicating),
        // After a loss a pass that had begun is worth nothing: it has to be begun anew, and the primary's own word
        // that it must resynchronize, which comes before it compares, shows that it knows.
        Purpose::Resync => {
            !matches!(doc.phase, Phase::ResyncRequired { .. })
                || doc.damage.is_none()
                || matches!(doc.reported.phase, Phase::ResyncRequired { .. })
        }
    };
    if fits {
        return Ok(());
    }
    let message = format!(
        "VM {} is in phase {} here; a log of this kind cannot go on from there; offer the VM again to learn what can",
        state.row.name,
        doc.phase.name()
    );
    Err(Refused::transient("wrong-phase", message, Duration::from_secs(1)).into())
}

/// A log whose bytes are wrong: the link or the sender has spoilt it, another attempt may do.
fn bad_log(error: &log::Error) -> Error {
    let message = format!("the log did not arrive as it was made: {error}; send it again");
    Refused::transient(error.code(), message, Duration::from_secs(1)).into()
}

/// Removes the partial files of a VM but one.
pub(crate) fn remove_partials(folder: &Folder, keep: Option<Head>) -> Result<()> {
    let path = folder.incoming();
    for name in folder.files.names(&path)? {
        let head = name.to_str().and_then(parse_partial).map(|(number, id)| Head { number, id });
        if head.is_none() || head != keep {
            folder.files.remove_file(&path.join(name))?;
        }
    }
    Ok(())
}
