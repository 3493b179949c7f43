//! Boot checks: a point or a backup is booted, isolated, until it shows a sign of life. What came of each is kept, with
//! the guest's console and a picture of its screen, in `DIR/checks/VM/ID`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use boot::{Accelerator, BootDisk, Evidence, Instance, Local, Machine, Order};
use catalog::{Catalog, params};
use model::{Phase, Timestamp, VmId, VmName};
use replica::Store;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::clock::{now, rfc3339};
use crate::config::Boot;
use crate::events::{Event, Events};
use crate::exports::{Exports, Shown, ShownDisk};
use crate::failure::{Code, Failure};
use crate::request::{Check, Export, Exported};

const TABLES: &[&str] = &["
    CREATE TABLE boot_checks (
        id     TEXT PRIMARY KEY,        -- that of its export and of its folder
        vm     TEXT NOT NULL,           -- its name
        at     INTEGER NOT NULL,        -- microseconds since 1970
        alive  INTEGER NOT NULL,
        report TEXT NOT NULL            -- json: what `check` answers
    ) STRICT;
"];

/// How often it is looked whose check is due.
const SCHEDULE: Duration = Duration::from_secs(60);

/// The name of a replica that could be checked now.
fn due_name(store: &Store, vm: VmId) -> Option<VmName> {
    let status = store.status(vm).ok()?;
    (status.facts.phase == Phase::Replicating && !status.points.is_empty()).then_some(status.name)
}

/// The boot checks of a site.
pub(crate) struct Checks {
    dir: PathBuf,
    config: Boot,
    catalog: Catalog,
    exports: Arc<Exports>,
    events: Events,
    /// What was found out, once it was. Held while a guest runs: one at a time, replication comes first.
    found: Mutex<Option<Accelerator>>,
}

impl Checks {
    pub fn open(
        dir: &Path,
        config: Boot,
        catalog: Catalog,
        exports: Arc<Exports>,
        events: Events,
    ) -> Result<Self, Failure> {
        catalog.migrate("checks", TABLES)?;
        Ok(Self { dir: dir.to_owned(), config, catalog, exports, events, found: Mutex::default() })
    }

    /// Boots what is asked for, and waits for the outcome.
    pub async fn run(&self, check: Check) -> Result<Value, Failure> {
        let mut found = self.found.lock().await;
        let export = Export { what: check.what.clone(), writable: true };
        let shown = self.exports.add(export).await?;
        let outcome = self.boot(&check, &shown, &mut found).await;
        // The writable layer goes with it.
        self.exports.remove(&shown.id).await?;
        let report = outcome?;
        self.keep(&check.vm, &shown.id, &report).await?;
        if report["alive"] != true {
            let why = report["why"].as_str().unwrap_or_default();
            let what = format!(
                "a boot check of {} {} failed: {why}",
                report["kind"].as_str().unwrap_or_default(),
                shown.seen
            );
            self.events.note(Event::new("boot-check-failed", what).vm(&check.vm)).await;
        }
        Ok(report)
    }

    async fn boot(
        &self,
        check: &Check,
        shown: &Shown,
        found: &mut Option<Accelerator>,
    ) -> Result<Value, Failure> {
        let accelerator = self.accelerator(found).await?;
        let mut order = self.order(&check.vm, shown, self.folder(&check.vm).join(&shown.id), accelerator)?;
        if let Some(sign) = &check.sign {
            order.sign = sign.clone();
        }
        order.within = Duration::from_secs(check.within_s.unwrap_or(self.config.within_s));
        let at = now();
        let mut evidence = self.try_once(&order).await?;
        if evidence.alive_after.is_none() && *found == Some(Accelerator::Kvm) {
            // KVM within a VM may run a firmware and fail at a kernel.
            order.accelerator = Accelerator::Tcg;
            evidence = self.try_once(&order).await?;
            if evidence.alive_after.is_some() {
                tracing::warn!(vm = %check.vm, "the guest boots without KVM alone: KVM is not used for checks any more");
                *found = Some(Accelerator::Tcg);
            }
        }
        let kind = match check.what {
            Exported::Point { .. } => "point",
            Exported::Backup { .. } => "backup",
        };
        Ok(json!({
            "check": shown.id, "vm": check.vm, "kind": kind, kind: shown.seen, "at": rfc3339(at),
            "alive": evidence.alive_after.is_some(), "sign": order.sign,
            "boot_s": evidence.alive_after.map(|time| time.as_secs_f64()), "why": evidence.why_not,
            "accelerator": order.accelerator, "screenshot": evidence.screenshot, "console": evidence.console,
        }))
    }

    async fn accelerator(&self, found: &mut Option<Accelerator>) -> Result<Accelerator, Failure> {
        match self.config.accelerator.or(*found) {
            Some(accelerator) => Ok(accelerator),
            None => Ok(*found.insert(self.find_accelerator().await?)),
        }
    }

    /// How an export of a VM's disks is booted.
    fn order(
        &self,
        vm: &VmName,
        shown: &Shown,
        dir: PathBuf,
        accelerator: Accelerator,
    ) -> Result<Order, Failure> {
        let named = shown.definition["sign-of-life"].as_str().and_then(|sign| sign.parse().ok());
        let disk = |disk: &ShownDisk| BootDisk {
            name: disk.name.clone(),
            socket: shown.socket.clone(),
            export: disk.export.clone(),
        };
        let local = self.local(vm)?;
        let mut disks: Vec<&ShownDisk> = shown.disks.iter().collect();
        // A kernel that is started directly finds its disks where they always were.
        if local.kernel.is_none() {
            disks.sort_by_key(|disk| disk.boot_rank);
        }
        Ok(Order {
            program: self.config.program.clone(),
            accelerator,
            machine: Machine::of_definition(&shown.definition)
                .at_most(self.config.memory_max_mib, self.config.cpus_max),
            local,
            disks: disks.into_iter().map(disk).collect(),
            sign: named.unwrap_or_default(),
            within: Duration::from_secs(self.config.within_s),
            dir,
            vnc: false,
        })
    }

    /// Boots an export for somebody who looks at it himself; it runs until it is ended.
    pub async fn start(&self, vm: &VmName, shown: &Shown, dir: PathBuf) -> Result<Instance, Failure> {
        let accelerator = self.accelerator(&mut *self.found.lock().await).await?;
        let order = Order { vnc: true, ..self.order(vm, shown, dir, accelerator)? };
        Ok(Instance::start(&order).await?)
    }

    /// When a VM was checked last.
    fn newest(&self, vm: &VmName) -> Result<Option<Timestamp>, Failure> {
        let query = "SELECT max(at) FROM boot_checks WHERE vm = ?1";
        let at: Option<i64> = self.catalog.read(|c| c.query_row(query, [vm.as_str()], |row| row.get(0)))?;
        Ok(at.map(Timestamp))
    }

    /// Checks the newest point of every replica whose last check is older than the config wants it, until `stop`.
    pub async fn run_scheduled(&self, store: &Store, stop: CancellationToken) {
        let every = Duration::from_secs(self.config.every_h.saturating_mul(3600));
        while !every.is_zero() && !stop.is_cancelled() {
            for vm in store.list().into_iter().filter_map(|vm| due_name(store, vm)) {
                let is_due = match self.newest(&vm) {
                    Ok(newest) => newest.is_none_or(|at| now().since(at) >= every),
                    Err(_) => false,
                };
                if !is_due || stop.is_cancelled() {
                    continue;
                }
                let what = Exported::Point { vm: vm.clone(), point: None };
                let check = Check { vm: vm.clone(), what, sign: None, within_s: None };
                if let Err(failure) = self.run(check).await {
                    let what = format!("a scheduled boot check could not be made: {}", failure.message);
                    self.events.note(Event::new("boot-check-failed", what).vm(&vm)).await;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(SCHEDULE) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// One boot; what the guest has written on its disks is seen by the next one, as after a reset.
    async fn try_once(&self, order: &Order) -> Result<Evidence, Failure> {
        boot::boot(order).await.map_err(|error| {
            let _ = fs::remove_dir_all(&order.dir);
            error.into()
        })
    }

    async fn find_accelerator(&self) -> Result<Accelerator, Failure> {
        let works = boot::kvm_works(&self.config.program, &self.dir.join("run")).await?;
        Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
    }

    /// The accelerator for a VM that is to run at once: a check that is under way is not waited for.
    pub async fn accelerator_now(&self) -> Result<Accelerator, Failure> {
        if let Some(accelerator) = self.config.accelerator {
            return Ok(accelerator);
        }
        match self.found.try_lock() {
            Ok(mut found) => self.accelerator(&mut found).await,
            Err(_) => self.find_accelerator().await,
        }
    }

    /// What this site's owner says of the VM.
    pub fn local(&self, vm: &VmName) -> Result<Local, Failure> {
        let path = self.dir.join("machines").join(format!("{vm}.toml"));
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .map_err(|error| Failure::new(Code::Config, format!("{}: {error}", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Local::default()),
            Err(error) => Err(Failure::io("read", &path, &error)),
        }
    }

    fn folder(&self, vm: &VmName) -> PathBuf {
        self.dir.join("checks").join(vm.as_str())
    }

    /// Writes the outcome down, and lets the oldest of the VM go.
    async fn keep(&self, vm: &VmName, id: &str, report: &Value) -> Result<(), Failure> {
        let (name, id, at, text) = (vm.to_string(), id.to_owned(), now().0, report.to_string());
        let (alive, kept) = (report["alive"] == true, self.config.kept);
        let gone = self.catalog.change(move |tx| {
            tx.execute(
                "INSERT INTO boot_checks VALUES (?1, ?2, ?3, ?4, ?5)",
                params![id, name, at, alive, text],
            )?;
            let beyond = "SELECT id FROM boot_checks WHERE vm = ?1 ORDER BY at DESC LIMIT -1 OFFSET ?2";
            let gone: Vec<String> = tx
                .prepare(beyond)?
                .query_map(params![name, kept], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            gone.iter()
                .try_for_each(|id| tx.execute("DELETE FROM boot_checks WHERE id = ?1", [id]).map(drop))?;
            Ok(gone)
        });
        for id in gone.await? {
            let _ = fs::remove_dir_all(self.folder(vm).join(id));
        }
        Ok(())
    }

    /// What came of the newest checks, newest first.
    pub fn list(&self, vm: Option<&VmName>) -> Result<Vec<Value>, Failure> {
        let query = "SELECT report FROM boot_checks WHERE ?1 IS NULL OR vm = ?1 ORDER BY at DESC LIMIT 1000";
        let reports: Vec<String> = self
            .catalog
            .read(|c| c.prepare(query)?.query_map([vm.map(VmName::as_str)], |row| row.get(0))?.collect())?;
        Ok(reports.iter().filter_map(|report| serde_json::from_str(report).ok()).collect())
    }
}
