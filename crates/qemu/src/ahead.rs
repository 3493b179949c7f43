//! Reads most of a cycle's changes before its moment, while nothing is fixed and the guest pays no copies.
//!
//! ```text
//! ONE transaction: bitmap `again` begins, `seen` is a copy of `base` ─▶ NBD exports of the disks as they are, with
//!   `seen` ─▶ (read) ─▶ exports and `seen` removed ─▶ the moment: `again` ends with `base`
//! ```
//!
//! What was read of `seen` and is not in `again` is what it was at the moment: QEMU sets a block's bit when a write of
//! it ends, and the moment's transaction waits for all writes that have begun. `base` and `next` know nothing of it:
//! whatever becomes of this, a cycle without it reads everything at its moment.

use model::LogNumber;
use serde_json::{Value, json};
use tokio::sync::OwnedMutexGuard;

use crate::bitmaps::{remove_strays, transaction};
use crate::capture::{CapturedDisk, context, joined};
use crate::disks::Disk;
use crate::error::Error;
use crate::qmp::Command;
use crate::sweep::sweep;
use crate::vm::Vm;

/// The disks as they are, and what has changed so far. [`Vm::end_ahead`] ends it; so does dropping it.
#[derive(Debug)]
pub struct Ahead {
    /// The disks, in the order they were given; they change while they are read.
    pub disks: Vec<CapturedDisk>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    vm: Vm,
    disks: Vec<Disk>,
    _changing: OwnedMutexGuard<()>,
}

impl Vm {
    /// Shows what has changed since the moment of log `base`, and begins to note what changes from now on.
    pub async fn begin_ahead(&self, disks: &[Disk], base: LogNumber) -> Result<Ahead, Error> {
        joined(tokio::spawn(begin(self.clone(), disks.to_vec(), base))).await
    }

    /// Takes it out of QEMU but for bitmap `again`, which the capture that follows reads. Goes on to its end even if
    /// the caller does not.
    pub async fn end_ahead(&self, mut ahead: Ahead) -> Result<(), Error> {
        match ahead.open.take() {
            Some(open) => joined(tokio::spawn(async move { open.end(true).await })).await,
            None => Ok(()),
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let (Some(open), Ok(runtime)) = (self.open.take(), tokio::runtime::Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            if let Err(error) = open.end(false).await {
                tracing::warn!(%error, "what was read ahead could not be removed; the next cycle does it");
            }
        });
    }
}

impl Open {
    async fn end(&self, keeps_again: bool) -> Result<(), Error> {
        sweep(&self.vm.inner.qmp, &self.vm.inner.names).await?;
        let graph = self.vm.graph().await?;
        remove_strays(&self.vm.inner.qmp, &graph, self.vm.names(), &self.disks, keeps_again).await?;
        self.vm.free_nbd_server().await
    }
}

async fn begin(vm: Vm, disks: Vec<Disk>, base: LogNumber) -> Result<Ahead, Error> {
    let changing = vm.changing().await?;
    vm.check_others().await?;
    vm.start_nbd_server().await?;
    let graph = vm.graph().await?;
    remove_strays(vm.qmp(), &graph, vm.names(), &disks, false).await?;
    let open = Open { vm, disks, _changing: changing };
    match show(&open, base).await {
        Ok(shown) => Ok(Ahead { disks: shown, open: Some(open) }),
        Err(error) => {
            if let Err(error) = open.end(false).await {
                tracing::warn!(%error, "what was to be read ahead could not be removed; the next cycle does it");
            }
            Err(error)
        }
    }
}

async fn show(open: &Open, base: LogNumber) -> Result<Vec<CapturedDisk>, Error> {
    let (vm, names) = (&open.vm, open.vm.names());
    let actions = open.disks.iter().flat_map(|disk| {
        let node = &disk.block_node;
        let add = |name: String, disabled: bool| {
            json!({"type": "block-dirty-bitmap-add", "data": {
                "node": node, "name": name, "granularity": model::BLOCK_BYTES, "persistent": false, "disabled": disabled,
            }})
        };
        // First what notes all that comes, then the copy: a write in between is in both.
        [add(names.again(), false), add(names.seen(), true), json!({"type": "block-dirty-bitmap-merge", "data": {
            "node": node, "target": names.seen(), "bitmaps": [names.bitmap(base)],
        }})]
    });
    transaction(vm.qmp(), actions.collect::<Vec<Value>>()).await?;
    let (mut commands, mut shown) = (Vec::new(), Vec::new());
    for (i, disk) in open.disks.iter().enumerate() {
        let export = names.export_ahead(i);
        commands.push(Command::new(
            "block-export-add",
            json!({
                "type": "nbd", "id": export, "name": export, "node-name": disk.block_node, "writable": false,
                "bitmaps": [{"node": disk.block_node, "name": names.seen()}],
            }),
        ));
        shown.push(CapturedDisk {
            name: disk.name.clone(),
            node: disk.node.clone(),
            size_bytes: disk.size_bytes,
            export,
            nbd_socket: vm.inner.nbd_socket.clone(),
            bitmap_context: Some(context(&names.seen())),
            again_context: None,
        });
    }
    vm.qmp().run_all(commands).await?;
    Ok(shown)
}
