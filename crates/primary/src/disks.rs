//! Disks that come and go while their VM is protected. The others are replicated on as before.
//!
//! A disk that joins is copied in stretches, beside the changes of the others. Its stretches travel in logs that make no
//! point; the log that makes the point names only the disks that are whole by then. So there is at no time a point with
//! half of a disk, and none without the disks that it had before.

use model::{DiskName, Phase, ResyncReason};
use qemu::Monitor;
use steps::durable_step;

use crate::cover::progress_without;
use crate::error::{Failure, FailureCode};
use crate::ports::{Disk, Guest, Ports};
use crate::relationship::Relationship;
use crate::rows::KnownDisk;

impl<P: Ports> Relationship<P> {
    /// Begins to replicate more disks of the VM, by their nodes (or targets of a domain of libvirt's).
    pub async fn add_disks(&mut self, nodes: &[String]) -> Result<(), Failure> {
        self.check_is_ours()?;
        self.check_no_media("no disk can join")?;
        if let Some(known) = self.row.disks.iter().find(|disk| nodes.contains(&disk.node)) {
            let message = format!("disk {} of {} is replicated already", known.name, self.row.name);
            return Err(Failure::lasting(FailureCode::Disks, message));
        }
        let guest = self.connect_guest().await?;
        // All of them, so that the new ones get names that no other has.
        let found = guest.resolve(&[&self.row.nodes()[..], nodes].concat()).await?;
        let new: Vec<KnownDisk> = found[self.row.disks.len()..].iter().map(Disk::known).collect();
        if let Some(taken) = new.iter().find(|new| self.row.disks.iter().any(|disk| disk.name == new.name)) {
            let message = format!("a disk of {} is named {} already", self.row.name, taken.name);
            return Err(Failure::lasting(FailureCode::Disks, message));
        }
        self.row.settings.excluded.retain(|node| !nodes.contains(node));
        if !self.row.settings.nodes.is_empty() {
            self.row.settings.nodes.extend(nodes.iter().cloned());
        }
        self.join(new).await
    }

    /// The disks that are replicated. Where every writable one is to be, those that the VM has got are taken in on the
    /// way: a site has many VMs, and QEMU is asked once for both.
    pub(crate) async fn look_at_disks(
        &mut self,
        guest: &P::Guest,
    ) -> Result<Vec<<P::Guest as Guest>::Disk>, Failure> {
        if !self.takes_in_disks() {
            return guest.resolve(&self.row.nodes()).await;
        }
        let there = guest.disks().await?;
        let is_new = |new: &KnownDisk| {
            let is_known = |disk: &KnownDisk| disk.node == new.node || disk.name == new.name;
            !self.row.disks.iter().any(is_known) && !self.row.settings.excluded.contains(&new.node)
        };
        let new: Vec<KnownDisk> = there.iter().map(Disk::known).filter(is_new).collect();
        if !new.is_empty()
            && let Err(error) = self.join(new).await
        {
            tracing::warn!(vm = %self.row.name, %error, "disks that join could not be written down");
        }
        let nodes = self.row.nodes();
        let of_node = |node: &String| there.iter().find(|disk| disk.known().node == *node).cloned();
        match nodes.iter().map(of_node).collect() {
            Some(disks) => Ok(disks),
            None => guest.resolve(&nodes).await,
        }
    }

    /// Whether disks that come are taken in: while changes are being replicated, or will be without anybody's doing.
    fn takes_in_disks(&self) -> bool {
        // A replica that is passed on says itself when its disks have changed.
        let is_a_vm = !matches!(self.row.settings.monitor, Monitor::Replica);
        let all = self.row.settings.nodes.is_empty();
        all && is_a_vm && self.row.phase == Phase::Replicating && !self.row.paused
    }

    async fn join(&mut self, new: Vec<KnownDisk>) -> Result<(), Failure> {
        let names: Vec<&str> = new.iter().map(|disk| disk.name.as_str()).collect();
        tracing::info!(vm = %self.row.name, disks = names.join(", "), "disks join");
        let joining = (self.row.phase == Phase::Replicating).then_some(0);
        self.row.disks.extend(new.into_iter().map(|disk| KnownDisk { joining, ..disk }));
        let total = self.row.total_bytes();
        self.change_pass(|_, progress| progress.total_bytes = total);
        self.save_disks().await
    }

    /// Ends the replication of some disks. The points that have them keep them.
    pub async fn remove_disks(&mut self, names: &[DiskName]) -> Result<(), Failure> {
        self.check_is_ours()?;
        self.check_no_media("no disk can leave")?;
        let refuse = |message| Err(Failure::lasting(FailureCode::Disks, message));
        let all = self.row.disks.iter().map(|disk| disk.name.to_string()).collect::<Vec<_>>().join(", ");
        if let Some(name) = names.iter().find(|name| self.row.disks.iter().all(|disk| disk.name != **name)) {
            return refuse(format!("no disk of {} is named {name}; it has {all}", self.row.name));
        }
        let stays = |disk: &KnownDisk| !names.contains(&disk.name) && disk.joining.is_none();
        if !self.row.disks.iter().any(stays) {
            let name = &self.row.name;
            return refuse(format!(
                "at least one whole disk of {name} must stay; 'afterimage unprotect {name}' ends all"
            ));
        }
        let mut nodes = Vec::new();
        for name in names {
            let Some(place) = self.row.disks.iter().position(|disk| disk.name == *name) else { continue };
            self.change_pass(|disks, progress| *progress = progress_without(disks, *progress, place));
            let gone = self.row.disks.remove(place);
            self.row.settings.nodes.retain(|node| *node != gone.node);
            if self.row.settings.nodes.is_empty() {
                self.row.settings.excluded.push(gone.node.clone());
            }
            nodes.push(gone.node);
        }
        // First this: a disk that is replicated must not be without its bitmap.
        self.save_disks().await?;
        for node in nodes {
            self.stop_tracking(node).await;
        }
        Ok(())
    }

    /// Leaves no bitmap of ours on a disk; on one that the VM has no more there is none.
    async fn stop_tracking(&mut self, node: String) {
        if let Ok(guest) = self.connect_guest().await
            && let Ok(disks) = guest.resolve(&[node]).await
            && let Err(error) = guest.stop_tracking(&disks).await
        {
            tracing::warn!(vm = %self.row.name, %error, "a disk that is no longer replicated keeps a bitmap until QEMU ends");
        }
    }

    /// Changes how far a pass has come. While it is not known whether its last log has arrived, that cannot be said.
    fn change_pass(&mut self, change: impl FnOnce(&[KnownDisk], &mut model::Progress)) {
        let unsure = self.row.shipped.attempt.is_some();
        match &mut self.row.phase {
            Phase::InitialReplication { .. } | Phase::Resynchronizing { .. } if unsure => {
                let why = ResyncReason::DisksChanged("while a log's fate was not known".into());
                self.row.must_resync(why);
            }
            Phase::InitialReplication { progress } | Phase::Resynchronizing { progress } => {
                change(&self.row.disks, progress);
            }
            Phase::Replicating
            | Phase::ResyncRequired { .. }
            | Phase::Failover { .. }
            | Phase::FailedOver => {}
        }
    }

    async fn save_disks(&mut self) -> Result<(), Failure> {
        self.squared = false; // the replica is told of them
        self.book_now();
        durable_step("primary::disks::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::disks::saved");
        Ok(())
    }
}
