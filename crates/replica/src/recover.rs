//! What opening a store does: brings memory, catalog and files together again after whatever ended it.
//!
//! | found | done |
//! |---|---|
//! | a move that was not switched, a folder that was moved out of | the copy, the old folder: removed |
//! | a log file whose row is missing, that follows the newest log and verifies | taken in |
//! | any other file that no row names | removed |
//! | a row whose file is missing or has another size, a base that is missing | the chain ends before it: resynchronization |
//! | a partial log that would be the next | kept, goes on where it is |
//! | an apply that has begun | interrupted (or failed): it is run again before anything else |
//! | a hold that has run out | forgotten |
//! | a VM that is being removed | its files are removed, and its rows |
//! | layers of a failover that there is not | removed |
//! | logs in the folder of a VM whose failover is at its end | removed |

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use model::{ApplyState, Head, LogNumber, Phase, ResyncReason};
use steps::durable_step;

use crate::completion::{is_released, tidy_released};
use crate::error::Result;
use crate::folder::{Folder, parse_log, parse_partial};
use crate::receive::{check_continues, remove_partials};
use crate::relationship::set_phase;
use crate::rows::{self, HoldRow, LogRow, VmRow};
use crate::store::Store;
use crate::vm::{At, ChainLog, OpenLog, State, Vm};

impl Store {
    pub(crate) fn recover(&self) -> Result<()> {
        let vms_folder = self.inner.config.dir.join("vms");
        self.files().make_folder(&vms_folder)?;
        durable_step("replica::recover::made");
        self.files().sync_folder(&self.inner.config.dir)?;
        durable_step("replica::recover::settled");
        let mut holds: BTreeMap<_, Vec<HoldRow>> = BTreeMap::new();
        for hold in rows::load_holds(self.catalog())? {
            holds.entry(hold.vm).or_default().push(hold);
        }
        for row in rows::load_vms(self.catalog())? {
            let id = row.vm;
            if row.doc.removing {
                self.end_removal(&row)?;
                continue;
            }
            let vm = self.recover_vm(row, holds.remove(&id).unwrap_or_default())?;
            self.vms_mut().insert(id, vm);
        }
        self.recover_seeds()?;
        self.tidy_released_folders(&vms_folder)?;
        for storage in &self.inner.config.storages {
            // It may be on a disk that is not mounted today.
            if self.files().exists(storage)? {
                self.tidy_released_folders(storage)?;
            }
        }
        Ok(())
    }

    fn tidy_released_folders(&self, vms_folder: &Path) -> Result<()> {
        let files = self.files();
        let replicas: Vec<Arc<Vm>> = self.vms().values().cloned().collect();
        for name in files.names(vms_folder)? {
            let folder = Folder { files: files.clone(), path: vms_folder.join(name) };
            let is_replica = || replicas.iter().any(|vm| vm.lock().row.folder == folder.path);
            if is_released(&folder)? && !is_replica() {
                tidy_released(&folder)?;
            }
        }
        Ok(())
    }

    fn recover_vm(&self, row: VmRow, holds: Vec<HoldRow>) -> Result<Arc<Vm>> {
        let now = self.now();
        let mut state = State::new(row, self.files(), now);
        self.end_migration(&mut state)?;
        state.folder().create()?;
        if state.row.doc.failover.is_none() {
            // Of one that was cancelled, and a power cut brought back.
            state.files.remove_folder(&state.folder().failover())?;
        }
        state.holds = holds;
        self.expire_holds(&mut state)?;
        for log in rows::load_logs(self.catalog(), state.row.vm)? {
            state.logs.insert(log.number, ChainLog::new(log));
        }
        state.moments = rows::load_moments(self.catalog(), state.row.vm)?;
        for point in rows::load_points(self.catalog(), state.row.vm)? {
            state.points.insert(point.number, point);
        }
        state.apply = match state.row.doc.applying.clone().map(|applying| applying.failed) {
            None => ApplyState::Idle,
            Some(None) => ApplyState::Interrupted { since: now },
            Some(Some((since, error))) => ApplyState::Failed { since, error },
        };
        self.find_losses(&mut state)?;
        self.settle_log_files(&mut state)?;
        self.settle_incoming(&state)?;
        Ok(Vm::new(state))
    }

    fn end_migration(&self, state: &mut State) -> Result<()> {
        let mut row = state.row.clone();
        if let Some(migrating) = row.doc.migrating.take() {
            state.files.remove_folder(&migrating.to)?;
        }
        if let Some(leftover) = row.doc.leftover.take() {
            state.files.remove_folder(&leftover)?;
        }
        if row != state.row {
            durable_step("replica::recover::ending-move");
            self.commit_row(state, row)?;
            durable_step("replica::recover::ended-move");
        }
        Ok(())
    }

    /// Ends the chain before the first log whose file is not what its row says.
    fn find_losses(&self, state: &mut State) -> Result<()> {
        let folder = state.folder();
        for disk in &state.row.doc.base.disks {
            let path = folder.disk(&disk.name);
            if !folder.files.exists(&path)? {
                let why = format!("the flat file {} is missing", path.display());
                return self.lose(state, LogNumber::ZERO, &why);
            }
        }
        for LogRow { file, bytes, first, .. } in state.logs.values().map(|log| &log.row) {
            let path = folder.log(file);
            if folder.files.len(&path)? != Some(*bytes) {
                let why = format!("the log file {} is missing or cut off", path.display());
                return self.lose(state, *first, &why);
            }
        }
        Ok(())
    }

    /// Gives up the chain from `first` on. The head stays what it was, so that numbers never mean two
    /// things: the resynchronization's logs follow it. What is left here is what they are compared with.
    pub(crate) fn lose(&self, state: &mut State, first: LogNumber, why: &str) -> Result<()> {
        tracing::error!(vm = %state.row.name, %why, "a part of the replica is lost; it must be resynchronized");
        let mut row = state.row.clone();
        let doc = &mut row.doc;
        doc.damage = Some(why.to_owned());
        // Whatever the primary has compared, it has compared with what was here before: see `check_continues`.
        doc.reported.phase = Phase::Replicating;
        let phase = Phase::ResyncRequired { why: ResyncReason::ChainBroken(why.to_owned()) };
        match &mut doc.failover {
            Some(failover) => failover.before = phase,
            None => set_phase(doc, phase, self.now()),
        }
        // An apply that was under way has mixed newer bytes into the base. That is no point any more, but a
        // state to compare with like any other, and nothing is left to apply it to its end with. If its sync has
        // failed, the system shows bytes that it will never write: see `rewrite`.
        let dirty = doc.applying.as_ref().is_some_and(|applying| applying.through >= first);
        if dirty {
            doc.applying = None;
            doc.unsure = true;
        }
        let gone: Vec<LogNumber> =
            state.points.keys().filter(|number| dirty || **number >= first).copied().collect();
        for pin in row.doc.pinned.extract_if(.., |pin| gone.contains(&pin.number)) {
            tracing::error!(vm = %state.row.name, point = %pin.id, "a point that was pinned by hand is lost with it");
        }
        // Else what changed since could no longer be told.
        row.doc.forwarded.retain(|mark| mark.at < first);
        let (id, dropped) = (row.vm, gone.clone());
        durable_step("replica::recover::losing");
        self.commit(state, row, move |tx| {
            rows::remove_points(tx, id, &dropped)?;
            rows::remove_logs(tx, id, first, LogNumber(u64::MAX))?;
            rows::forget_parents(tx, id, first)
        })?;
        durable_step("replica::recover::lost");
        if dirty {
            state.apply = ApplyState::Idle;
        }
        state.logs.retain(|number, _| *number < first);
        state.points.retain(|number, _| !gone.contains(number));
        state.revoke_views("a part of the replica is lost");
        Ok(())
    }

    /// After an apply or a merge has found a log damaged: verifies the file as a whole, and gives the chain up
    /// from there if it really is. A read that merely failed is tried again later.
    pub(crate) fn check_damage(&self, vm: &Vm, path: &Path) -> Result<()> {
        let mut state = vm.live()?;
        let folder = state.folder();
        let Some(log) = state.logs.values().find(|log| folder.log(&log.row.file) == path).cloned() else {
            return Ok(());
        };
        let OpenLog { file, .. } = log.open(&folder)?;
        match log::verify(&mut At::start(&*file)) {
            Err(error) if !error.is_io() => self.lose(
                &mut state,
                log.row.first,
                &format!("the log file {} is damaged: {error}", path.display()),
            ),
            _ => Ok(()),
        }
    }

    /// Takes in a log that was renamed but not committed; removes what the catalog does not name.
    fn settle_log_files(&self, state: &mut State) -> Result<()> {
        let folder = state.folder();
        let named = |state: &State, name: &str| state.logs.values().any(|log| log.row.file == name);
        for name in folder.files.names(&folder.logs())? {
            let path = folder.logs().join(&name);
            let name = name.to_string_lossy().into_owned();
            if named(state, &name) {
                continue;
            }
            let next = state.row.doc.head.number.next();
            let is_next = parse_log(&name) == Some((next, next)) && name == format!("{next}.log");
            if is_next && self.adopt(state, &name)? {
                tracing::info!(vm = %state.row.name, log = %next, "a log that had arrived just before the end was taken in");
            } else {
                tracing::info!(file = %path.display(), "a file that belongs to no chain is removed");
                folder.files.remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn adopt(&self, state: &mut State, name: &str) -> Result<bool> {
        let path = state.folder().log(name);
        let file = state.files.open_read(&path)?;
        let Ok(verified) = log::verify(&mut At::start(&*file)) else { return Ok(false) };
        let fits = format!("{}.log", verified.header.number) == name;
        if !fits || check_continues(state, &verified.header).is_err() {
            return Ok(false);
        }
        // It had been synced before it was renamed; the rename may not have been.
        durable_step("replica::recover::adopting");
        state.files.sync_folder(&state.folder().logs())?;
        durable_step("replica::recover::adopted");
        let row = LogRow::from_verified(&verified, verified.header.number, name.to_owned());
        self.add_to_chain(state, row, &verified.header)?;
        Ok(true)
    }

    /// Keeps a partial log if it could go on.
    fn settle_incoming(&self, state: &State) -> Result<()> {
        let folder = state.folder();
        let next = state.row.doc.head.number.next();
        let mut keep: Option<Head> = None;
        for name in folder.files.names(&folder.incoming())? {
            if let Some((number, id)) = name.to_str().and_then(parse_partial)
                && number == next
            {
                keep = Some(Head { number, id });
            }
        }
        remove_partials(&folder, keep)
    }
}
