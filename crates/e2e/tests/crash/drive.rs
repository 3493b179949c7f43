//! What is done so that a process comes to a step, and what a person does afterwards.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rig::{Process, Result, Site, tool, wait_for};

use super::pair::{Pair, order, order_again, trouble};
use crate::common::{DISKS, LONG, MIB, VM, path};

/// An operation that passes steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Drive {
    /// The site starts.
    Start,
    /// A cycle.
    Sync,
    /// A VM is offered for the first time, and replicated.
    Protect,
    /// Images are brought, and the VM is offered for the first time.
    Seed,
    /// A VM is protected, and replicated by media.
    Media,
    /// A VM is offered again.
    Offer,
    /// The policy is set anew.
    Configure,
    /// Both sides are compared because a person wants it.
    Resync,
    /// A VM is offered again with a disk that has grown.
    Grow,
    /// The primary says that it is paused.
    Report,
    /// A disk is no longer replicated.
    Disks,
    /// The primary gives the VM up.
    Withdraw,
    /// The replica is removed.
    Remove,
    /// A backup.
    Backup,
    /// A backup into a repository that lacks the folders of packs.
    BackupToNewFolders,
    /// The backups of a policy.
    RunPolicy,
    /// An apply whose writes fail.
    ApplyFails,
    /// A start that finds a log which was renamed and is not in the catalog.
    Adopt,
    /// A start that finds a base gone.
    Lose,
    /// A start that finds an apply cut off, and one of its logs gone.
    Rewrite,
    /// A start that finds a move cut off.
    EndMove,
    /// The storage is moved.
    Migrate,
    /// The storage is moved to where it has no room.
    MigrateFails,
    /// The replica takes over.
    Failover,
    /// And goes back.
    Cancel,
    /// The flat files are held.
    Hold,
    /// And given back.
    Release,
    /// And time runs out.
    HoldRunsOut,
    /// A point is pinned.
    Pin,
    /// And let go.
    Unpin,
    /// A new monitoring window is begun: at the replica's site,
    MeasuredHere,
    /// and at the primary's.
    MeasuredThere,
    /// The replica is passed on to a third site: for the first time,
    Extend,
    /// and once more.
    ExtendedSync,
    /// The replica moves to a third site,
    MoveAway,
    /// and back from there, with a point that is pinned.
    MoveBack,
    /// The VM is put into a group,
    MakeGroup,
    /// and a moment of it is fixed.
    GroupMoment,
    /// An invite is made.
    Invite,
    /// An invite is used: at the site that made it,
    Admit,
    /// and at the one that uses it.
    Accept,
    /// A peer is removed.
    RemovePeer,
    /// What a peer may do is changed.
    AllowPeer,
    /// Another site of the trust group takes the VM over.
    TakeOver,
    /// The site's certificate is made anew,
    Renew,
    /// or its key.
    NewKey,
    /// A start that finds a new key whose certificate is not in its place yet.
    AdoptKey,
    /// A CA is named.
    UseCa,
    /// Hours go by: points are dropped, logs merged. By itself in `crash_matrix.rs`.
    Hours,
    /// The VM changes its site for good. By itself in `crash_matrix.rs`.
    Move,
    /// A site is made. By itself in `crash_matrix.rs`.
    Init,
    /// A backup is restored, in a process of its own.
    Restore,
    /// The same as VHDX.
    RestoreVhdx,
    RestoreOnto,
}

use Drive::*;

/// What the pinned point is called.
const PINNED: &str = "kept-for-now";
/// And the group.
const GROUP: &str = "shop";
/// As long as holds are made for, and a little more.
const LEASE: Duration = Duration::from_millis(3200);

impl Drive {
    /// For the table.
    pub fn words(self) -> &'static str {
        match self {
            Start => "it starts",
            Sync => "a cycle",
            Protect => "a VM is protected",
            Seed => "replica seed, and a VM is protected",
            Media => "protect --initial media, replica import",
            Offer => "the primary comes back",
            Configure => "configure",
            Resync => "resync",
            Grow => "a disk has grown",
            Report => "pause",
            Disks => "disk remove",
            Withdraw => "unprotect at the primary",
            Remove => "unprotect at the replica",
            Backup => "a backup",
            BackupToNewFolders => "a backup that makes the folders of packs",
            RunPolicy => "policy run",
            ApplyFails => "an apply whose writes fail",
            Adopt => "it starts after it died with a log renamed",
            Lose => "it starts with a base missing",
            Rewrite => "it starts after it died in an apply, with a log missing",
            EndMove => "it starts after it died in a move",
            Migrate => "migrate",
            MigrateFails => "migrate to where there is no room",
            Failover => "failover unplanned",
            Cancel => "failover cancel",
            Hold => "hold",
            Release => "release",
            HoldRunsOut => "it starts with a hold that has run out",
            Pin => "pin",
            Unpin => "unpin",
            MeasuredHere | MeasuredThere => "measurements --reset",
            Extend => "extend",
            ExtendedSync => "a cycle of an extension",
            MoveAway => "migrate --to-site",
            MoveBack => "migrate --to-site, to this site",
            MakeGroup => "group create",
            GroupMoment => "sync --group",
            Invite => "peer invite",
            Admit | Accept => "peer accept",
            RemovePeer => "peer remove",
            AllowPeer => "peer allow",
            TakeOver => "protect --take-over at another site",
            Renew => "identity renew",
            NewKey => "identity renew --new-key",
            AdoptKey => "it starts after it died with a new key half in its place",
            UseCa => "identity use --ca",
            Hours => "an hour ends",
            Move => "a failover, completed and reversed",
            Init => "init",
            Restore => "restore",
            RestoreVhdx => "restore --format vhdx",
            RestoreOnto => "restore --onto",
        }
    }

    /// Whether the two sides have to be compared afterwards: only where something was lost that they need.
    pub fn needs_resync(self) -> bool {
        matches!(self, Lose | Rewrite | Grow | Resync | Seed | TakeOver)
    }

    /// Whether the VM has another id afterwards, and begins anew.
    pub fn protects_anew(self) -> bool {
        matches!(self, Protect | Seed | Media | Withdraw | Remove)
    }

    /// Whether the site dies before it is ready.
    pub fn dies_at_start(self) -> bool {
        matches!(self, Start | Adopt | Lose | EndMove | HoldRunsOut | AdoptKey)
    }

    /// Before the site is started with its fail point.
    pub fn prepare(self, pair: &mut Pair) -> Result<()> {
        match self {
            Protect | Seed | Media => {
                pair.branch.ok(&["unprotect", VM])?;
                pair.head.ok(&["unprotect", VM])?;
                let media = pair.media();
                let _ = std::fs::remove_dir_all(&media);
                std::fs::create_dir(media).map_err(trouble)
            }
            Remove => pair.branch.ok(&["unprotect", VM]).map(drop),
            Cancel => pair.head.ok(&["failover", "unplanned", VM]).map(drop),
            Unpin => pair.head.ok(&["pin", VM, "latest", "--name", PINNED]).map(drop),
            GroupMoment => pair.branch.ok(&["group", "create", GROUP, VM]).map(drop),
            Adopt => pair.die_first("replica::receive::folders", Sync),
            Rewrite => pair.die_first("replica::apply::flushed", Sync),
            EndMove => pair.die_first("replica::migrate::copied", Migrate),
            HoldRunsOut => {
                pair.head.ok(&["hold", VM, "--for", "1s"])?;
                std::thread::sleep(Duration::from_millis(1100));
                Ok(())
            }
            Extend => pair.third_site(),
            ExtendedSync => {
                pair.third_site()?;
                pair.head.ok(&["extend", VM, "--to", "far"])?;
                pair.passed_on()
            }
            MoveAway => pair.site_to_move_to(),
            MoveBack => {
                pair.site_to_move_to()?;
                pair.head.ok(&["pin", VM, "latest", "--name", PINNED])?;
                pair.move_to("far")
            }
            AdoptKey => pair.die_first("wire::identity::next-key-adopted", NewKey),
            TakeOver => {
                let mut homes = (0..).map(|place| pair.dir.path().join(format!("depot-{place}")));
                let home = homes.find(|home| !home.exists()).unwrap_or_default();
                let mut depot = Site::init(&home, "depot")?;
                depot.serve()?;
                pair.head.invite(&depot)?;
                for peer in ["branch", "depot"] {
                    pair.head.ok(&["peer", "allow", peer, "--group", "hosts"])?;
                }
                pair.depot = Some(depot);
                Ok(())
            }
            Admit | Accept => pair.head.ok(&["peer", "remove", "branch"]).map(drop),
            BackupToNewFolders => {
                let packs = pair.head.dir().join("repository/data");
                tool(Command::new("find").arg(packs).args([
                    "-mindepth",
                    "1",
                    "-type",
                    "d",
                    "-empty",
                    "-delete",
                ]))
                .map(drop)
            }
            Restore | RestoreVhdx | RestoreOnto => pair.head.ok(&["backup", VM]).map(drop),
            _ => Ok(()),
        }
    }

    /// With the site down: what it is to find.
    pub fn spoil(self, pair: &mut Pair) -> Result<()> {
        match self {
            Lose => {
                let storage = pair.storage_known();
                std::fs::remove_file(storage.join("disks/system.raw")).map_err(trouble)
            }
            Rewrite => {
                let logs = pair.storage_known().join("logs");
                let mut found = std::fs::read_dir(logs).map_err(trouble)?.flatten();
                found.try_for_each(|log| std::fs::remove_file(log.path()).map_err(trouble))
            }
            Grow => {
                let from = pair.quiet();
                pair.branch.stop();
                pair.daemon.kill();
                let size = pair.daemon.disk("system").metadata().map_err(trouble)?.len() + MIB;
                let mut command = Command::new("truncate");
                tool(command.args(["-s", &size.to_string()]).arg(pair.daemon.disk("system")))?;
                pair.daemon.restart()?;
                pair.write_from(from)
            }
            _ => Ok(()),
        }
    }

    /// With the site ready: begins what makes it die.
    pub fn begin(self, pair: &mut Pair) -> Result<Option<Process>> {
        let (head, branch) = (&pair.head, &pair.branch);
        match self {
            Sync => order(branch, &["sync", VM]),
            Protect => pair.order_protect(&[]),
            Seed => {
                pair.bring_images()?;
                pair.order_protect(&[])
            }
            Media => pair.order_protect(&["--initial", &format!("media:{}", pair.media().display())]),
            Configure => order(branch, &["configure", VM, "--resync", "auto"]),
            Resync => order(branch, &["resync", VM]),
            Offer => {
                pair.branch.kill();
                pair.branch.serve()?;
                order(&pair.branch, &["sync", VM])
            }
            Grow => {
                pair.branch.serve()?;
                order(&pair.branch, &["sync", VM])
            }
            Report => order(branch, &["pause", VM]),
            Disks => order(branch, &["disk", "remove", VM, DISKS[1].0]),
            Withdraw => order(branch, &["unprotect", VM]),
            Remove => order(head, &["unprotect", VM]),
            Backup => order(head, &["backup", VM]),
            // Which folders a backup's packs go to is chance: most are there already.
            BackupToNewFolders => order_again(head, &["backup", VM]),
            RunPolicy => {
                let policies = head.dir().join("policies");
                std::fs::create_dir_all(&policies).map_err(trouble)?;
                // Due on no day of a test, but when it is told to.
                let policy = format!("vms = \"{VM}\"\nschedule = \"0 0 1 1 *\"\nrepository = \"local\"\n[retention]\nlast = 1000\n");
                // A name of its own each time: VMs are selected once.
                let name = format!("once-{}", std::fs::read_dir(&policies).map_err(trouble)?.count());
                std::fs::write(policies.join(format!("{name}.toml")), policy).map_err(trouble)?;
                order(head, &["policy", "run", &name])
            }
            ApplyFails => {
                let disks = pair.storage()?.join("disks");
                tool(Command::new("mount").arg("--bind").args([&disks, &disks]))?;
                tool(Command::new("mount").args(["-o", "remount,ro,bind"]).arg(&disks))?;
                order(&pair.branch, &["sync", VM])
            }
            Migrate => {
                let target = pair.other_storage()?;
                order(&pair.head, &["migrate", VM, "--storage", path(&target)])
            }
            MigrateFails => {
                let small = pair.dir.path().join("small");
                std::fs::create_dir_all(&small).map_err(trouble)?;
                tool(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&small))?;
                order(&pair.head, &["migrate", VM, "--storage", path(&small)])
            }
            Failover => order(head, &["failover", "unplanned", VM]),
            Cancel => order(head, &["failover", "cancel", VM]),
            Hold => order(head, &["hold", VM, "--for", "3s"]),
            Release => {
                let hold = head.ok(&["hold", VM, "--for", "3s"])?;
                order(head, &["release", hold["hold"].as_str().unwrap_or_default()])
            }
            MeasuredHere => order(head, &["measurements", VM, "--reset"]),
            MeasuredThere => order(branch, &["measurements", VM, "--reset"]),
            Pin => order(head, &["pin", VM, "latest", "--name", PINNED]),
            Unpin => order(head, &["unpin", VM, PINNED]),
            Extend => order(head, &["extend", VM, "--to", "far"]),
            ExtendedSync => {
                // It may be passed on, and the site die, before this has its answer.
                branch.run(&["sync", VM])?;
                order(head, &["sync", VM])
            }
            MoveAway => order(branch, &["migrate", VM, "--to-site", "far"]),
            MoveBack => order(branch, &["migrate", VM, "--to-site", "head"]),
            MakeGroup => order(branch, &["group", "create", GROUP, VM]),
            GroupMoment => {
                // A VM whose last cycle has failed takes part again when one has ended well.
                branch.ok(&["sync", VM])?;
                order(branch, &["sync", "--group", GROUP])
            }
            Invite => order(head, &["peer", "invite", "somebody"]),
            Admit | Accept => {
                let invite = head.ok(&["peer", "invite", "branch"])?;
                order(branch, &["peer", "accept", invite["invite"].as_str().unwrap_or_default()])
            }
            RemovePeer => order(head, &["peer", "remove", "branch"]),
            AllowPeer => order(head, &["peer", "allow", "branch", "--quota", "100G"]),
            TakeOver => {
                // It is asked for before the VM is looked for.
                let nowhere = pair.dir.path().join("no-qmp");
                let depot = pair.depot.as_ref().ok_or_else(|| trouble("there is no depot"))?;
                order(depot, &["protect", VM, "--qmp", path(&nowhere), "--to", "head", "--take-over"])
            }
            Renew => order(head, &["identity", "renew"]),
            NewKey => order(head, &["identity", "renew", "--new-key"]),
            UseCa => order(head, &["identity", "use", "--ca", path(&branch.dir().join("identity.crt"))]),
            Start | Adopt | Lose | Rewrite | EndMove | HoldRunsOut | AdoptKey | Hours | Move | Init
            | Restore | RestoreVhdx | RestoreOnto => {
                return Ok(None);
            }
        }
        .map(Some)
    }

    /// Once the process is dead, before it is started again: takes away what made it fail.
    pub fn clear(self, pair: &mut Pair) -> Result<()> {
        let mounted = match self {
            ApplyFails => pair.storage_known().join("disks"),
            MigrateFails => pair.dir.path().join("small"),
            _ => return Ok(()),
        };
        tool(Command::new("umount").arg("-l").arg(mounted)).map(drop)
    }

    /// With everything running again: what a person does to have it as before.
    pub fn mend(self, pair: &mut Pair) -> Result<()> {
        match self {
            Withdraw | Remove => {
                if pair.branch.run(&["status", VM])?.status == 0 {
                    pair.branch.ok(&["unprotect", VM])?;
                }
                pair.remove_replica()?;
                pair.protect()
            }
            Protect | Seed => {
                // It was protected, or it was not: then a person does it again.
                if pair.branch.run(&["status", VM])?.status != 0 {
                    return pair.protect();
                }
                pair.branch.ok(&["resume", VM])?;
                pair.replicated()
            }
            Media => {
                if pair.branch.run(&["status", VM])?.status != 0 {
                    return pair.protect();
                }
                pair.branch.ok(&["resume", VM])?;
                let written = |vm: &serde_json::Value| vm["media"]["written_at"].is_string();
                pair.branch.wait_vm(VM, "to be written to its media", LONG, written)?;
                pair.head.ok(&["replica", "import", path(&pair.media())])?;
                pair.branch.ok(&["resume", VM])?; // it would look by itself, in half a minute
                pair.replicated()
            }
            Report | Resync => pair.branch.ok(&["resume", VM]).map(drop),
            Disks => {
                // It is out or not: in the end it is back, and whole.
                let _ = pair.branch.run(&["disk", "add", VM, DISKS[1].0])?;
                let whole = |vm: &serde_json::Value| {
                    let disks = vm["disks"].as_array().map_or(&[][..], Vec::as_slice);
                    disks.len() == DISKS.len() && disks.iter().all(|disk| disk["copied_bytes"].is_null())
                };
                pair.branch.wait_vm(VM, "to have all its disks", LONG, whole).map(drop)
            }
            ApplyFails => pair.head.ok(&["resume", VM]).map(drop),
            Failover | Cancel => {
                if pair.head.vm(VM)?["state"] == "failover" {
                    // It can be carried on, and gone back from.
                    let disks = pair.head.ok(&["failover", "unplanned", VM])?;
                    for disk in disks["disks"].as_array().into_iter().flatten() {
                        let overlay = disk["path"].as_str().unwrap_or_default().to_owned();
                        tool(Command::new("qemu-img").args(["check", "-q", &overlay]))?;
                    }
                }
                pair.head.ok(&["failover", "cancel", VM]).map(drop)
            }
            Hold | Release => {
                // Nobody was told its name; its lease is short, and the next apply comes when it has run out.
                std::thread::sleep(LEASE);
                Ok(())
            }
            Pin | Unpin => {
                // Nobody was told whether it is done; done or not, it can be undone.
                let undone = pair.head.run(&["unpin", VM, PINNED])?;
                let fine = undone.status == 0 || undone.code() == Some("no-such-point");
                if fine { Ok(()) } else { Err(trouble(format!("{undone:?}"))) }
            }
            Admit | Accept | RemovePeer => {
                for (site, peer) in [(&pair.head, "branch"), (&pair.branch, "head")] {
                    let _ = site.run(&["peer", "remove", peer])?;
                }
                pair.head.invite(&pair.branch)?;
                pair.branch.ok(&["resume", VM]).map(drop)
            }
            MakeGroup | GroupMoment => {
                // There is one or not: in the end there is none.
                let removed = pair.branch.run(&["group", "remove", GROUP])?;
                let fine = removed.status == 0 || removed.code() == Some("no-such-group");
                if fine { Ok(()) } else { Err(trouble(format!("{removed:?}"))) }
            }
            Extend | ExtendedSync => pair.end_extension(),
            // Wherever it was cut off: it goes on to its end, and then the other way.
            MoveAway => pair.move_to("far").and_then(|()| pair.move_to("head")),
            MoveBack => {
                pair.move_to("head")?;
                pair.head.ok(&["unpin", VM, PINNED]).map(drop)
            }
            TakeOver => {
                if pair.head.vm(VM)?["peer"] == "depot" {
                    // Done, whether somebody was told or not: and so it is taken back.
                    pair.branch.ok(&["unprotect", VM])?;
                    let ordered = pair.order_protect(&["--take-over"])?;
                    pair.replicated()?;
                    drop(ordered);
                }
                pair.depot = None;
                pair.head.ok(&["peer", "remove", "depot"]).map(drop)
            }
            Invite => {
                let again = pair.head.run(&["peer", "invite", "somebody"])?;
                if again.status == 0 { Ok(()) } else { Err(trouble(format!("{again:?}"))) }
            }
            _ => Ok(()),
        }
    }
}

impl Pair {
    /// Lets the replica's site die at a step that another one comes after.
    fn die_first(&mut self, step: &str, drive: Drive) -> Result<()> {
        self.head.kill();
        self.head.serve_with(&[(steps::FAIL_AT, step)])?;
        let begun = drive.begin(self)?;
        await_death(&mut self.head, step)?;
        drop(begun);
        Ok(())
    }

    /// The folder on a removable disk.
    fn media(&self) -> PathBuf {
        self.dir.path().join("media")
    }

    /// Older images of the VM's disks are brought to the replica's site, which may die of it.
    fn bring_images(&self) -> Result<()> {
        let mut arguments = vec!["replica".to_owned(), "seed".into(), VM.into()];
        for (name, _) in super::pair::DISKS {
            let image = self.dir.path().join(format!("old-{name}.raw"));
            std::fs::copy(self.daemon.disk(name), &image).map_err(trouble)?;
            arguments.extend(["--disk".into(), format!("{name}={}", image.display())]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.head.run(&arguments).map(drop)
    }

    /// Removes the replica; where it has not heard that it is given up, together with its peer.
    fn remove_replica(&self) -> Result<()> {
        let Ok(replica) = self.head.vm(VM) else { return Ok(()) };
        if replica["withdrawn"] != true {
            self.head.ok(&["peer", "remove", "branch"])?;
            self.head.ok(&["unprotect", VM])?;
            self.branch.ok(&["peer", "remove", "head"])?;
            return self.head.invite(&self.branch);
        }
        self.head.ok(&["unprotect", VM]).map(drop)
    }
}

/// Waits until a site has killed itself.
pub fn await_death(site: &mut Site, step: &str) -> Result<()> {
    wait_for(&format!("the process to come to {step}"), LONG, || {
        if !site.is_running() && site.died_of() != Some(9) {
            return Err(trouble(format!("the site ended by itself before {step}: {}", site.log())));
        }
        Ok((site.died_of() == Some(9)).then_some(()))
    })
}
