//! Begins to protect a VM.

use std::sync::Arc;
use std::time::Duration;

use model::{INTERVAL_SECONDS, InitialStart, POINTS_MAX, VmId, check_initial_start};
use qemu::{DomainAddress, libvirt};
use steps::durable_step;

use crate::ProtectRequest;
use crate::error::{Error, Failure, FailureCode};
use crate::ports::{Disk, Guest, Ports};
use crate::relationship::{Relationship, Shared, first_phase};
use crate::rows::{self, KnownDisk, Measured, Protected, Settings};

impl<P: Ports> Relationship<P> {
    /// Finds the VM's disks and writes the relationship down. Nothing is replicated before its first cycle.
    pub async fn protect(shared: &Arc<Shared<P>>, request: ProtectRequest) -> Result<Self, Error> {
        let vm = VmId::from_bytes(shared.ports.random_id()?);
        Self::begin(shared, request, vm, 1).await
    }

    /// The same for a VM that has its id already: a replica that is passed on.
    pub async fn begin(
        shared: &Arc<Shared<P>>,
        request: ProtectRequest,
        vm: VmId,
        generation: u64,
    ) -> Result<Self, Error> {
        let (peer, initial) = (&request.settings.peer, request.initial.clone());
        if let InitialStart::At { at } = &initial {
            check_initial_start(*at, shared.now()).map_err(Error::Setting)?;
        }
        if shared.ports.remote(peer).is_none() {
            return Err(Error::Setting(format!(
                "no peer is named {peer}; 'afterimage peer list' shows the ones there are"
            )));
        }
        let mut row = Self::first_row(shared, request, vm).await?;
        row.generation = generation;
        row.phase = first_phase(row.total_bytes());
        row.passes.media = match &initial {
            InitialStart::Media { dir } => Some(Self::begin_media(&shared.ports, dir).await?),
            _ => None,
        };
        let announces = matches!(initial, InitialStart::At { .. } | InitialStart::Media { .. });
        row.passes.initial = initial;
        durable_step("primary::protect::saving");
        let is_new = row.save_new(&shared.catalog).await?;
        durable_step("primary::protect::saved");
        if !is_new {
            return Err(Error::Exists(row.name));
        }
        let mut relationship = Self::new(row, Measured::beginning(shared.now()), shared.clone());
        if announces {
            relationship.announce().await;
        }
        Ok(relationship)
    }

    /// What is known of a VM before its first cycle, its disks among it.
    pub(crate) async fn first_row(
        shared: &Arc<Shared<P>>,
        request: ProtectRequest,
        vm: VmId,
    ) -> Result<Protected, Error> {
        let ProtectRequest { name, settings, .. } = request;
        check_settings(&settings, shared.config.interval_min_s)?;
        if rows::is_known(&shared.catalog, &name)? {
            return Err(Error::Exists(name));
        }
        let mut row = Protected::first(vm, name, settings, shared.now());
        row.disks = find_disks(&row, &shared.ports).await?;
        Ok(row)
    }
}

/// Finds a running domain of libvirt's by its name; with an agent, if application-consistent points are wanted.
pub async fn find_domain(uri: &str, name: &str, needs_agent: bool) -> Result<DomainAddress, Error> {
    let found = libvirt::find(uri, name).await.map_err(|error| {
        let message = error.to_string();
        match error {
            libvirt::Error::NoDomain { .. } | libvirt::Error::Uri { .. } => Error::Setting(message),
            _ => Failure::transient(FailureCode::QemuGone, message).into(),
        }
    })?;
    if needs_agent && !found.description.has_agent {
        return Err(Error::Setting(format!(
            "domain {name} has no channel to a guest agent, so there can be no application-consistent points; add one ('virsh edit {name}': <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>), and install qemu-guest-agent in the guest"
        )));
    }
    Ok(found.address)
}

pub(crate) fn check_settings(settings: &Settings, least: u64) -> Result<(), Error> {
    check_interval(settings.interval, least)?;
    if settings.points > POINTS_MAX {
        return Err(Error::Setting(format!(
            "{} recovery points are too many; use 0 to {POINTS_MAX}",
            settings.points
        )));
    }
    Ok(())
}

pub(crate) fn check_interval(interval: Duration, least: u64) -> Result<(), Error> {
    let seconds = interval.as_secs();
    if !(least..=*INTERVAL_SECONDS.end()).contains(&seconds) {
        return Err(Error::Setting(format!(
            "an interval of {seconds} s is out of range; use {least} s to {} s",
            INTERVAL_SECONDS.end()
        )));
    }
    Ok(())
}

pub(crate) async fn find_disks<P: Ports>(row: &Protected, ports: &P) -> Result<Vec<KnownDisk>, Error> {
    let guest = ports.connect(row.vm, &row.settings).await?;
    let found = match row.settings.nodes.as_slice() {
        [] => guest.disks().await?,
        nodes => guest.resolve(nodes).await?,
    };
    let mut found: Vec<KnownDisk> = found.iter().map(Disk::known).collect();
    if let Some(node) = row.settings.excluded.iter().find(|node| found.iter().all(|disk| disk.node != **node))
    {
        let nodes: Vec<_> = found.into_iter().map(|disk| disk.node).collect();
        let nodes = nodes.join(", ");
        return Err(Error::Setting(format!("there is no writable disk {node} to exclude; there is {nodes}")));
    }
    found.retain(|disk| !row.settings.excluded.contains(&disk.node));
    if found.is_empty() {
        return Err(Error::Setting(format!(
            "QEMU at {} has no writable disk to protect; name its block nodes with --disk",
            row.settings.monitor
        )));
    }
    Ok(found)
}
