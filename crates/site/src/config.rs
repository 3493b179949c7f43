//! What a person can set for a site, in `DIR/config.toml`. `init` writes the file with every setting at
//! its default, so that nothing has to be looked up.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use boot::{Accelerator, NetworkMap};
use model::{CycleBackoff, HealthThresholds, RetryPolicy, WINDOW_HOURS_MAX};
use serde::Deserialize;

use crate::failure::{Code, Failure};
use crate::repositories::RepositorySettings;

/// The name of the repository that `init` makes.
pub const LOCAL_REPOSITORY: &str = "local";

/// A site's settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// What the site is called; peers show it.
    pub name: String,
    /// Where it listens.
    pub listen: SocketAddr,
    /// The address that invites name, where it is not the one it listens on.
    #[serde(default)]
    pub advertise: Option<String>,
    /// How cycles run.
    #[serde(default)]
    pub replication: Replication,
    /// How replicas are kept.
    #[serde(default)]
    pub replica: Replica,
    /// When health turns.
    #[serde(default)]
    pub health: HealthSettings,
    /// How refused backups come home.
    #[serde(default)]
    pub backup: Backup,
    /// How points and backups are booted to check them.
    #[serde(default)]
    pub boot: Boot,
    /// What networks of VMs' primary sites are here, for VMs that are failed over; `*` stands for all others.
    #[serde(default)]
    pub networks: NetworkMap,
    /// Where backups live, by name.
    #[serde(default)]
    pub repositories: BTreeMap<String, RepositorySettings>,
}

/// How cycles run on the primary.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Replication {
    /// The zstd level of logs, 1 to 19.
    pub compression_level: i32,
    /// Initial replication and resynchronization are cut into logs of about this much data, in MiB.
    pub initial_log_mib: u64,
    /// The most that one cycle may write to the scratch, in MiB.
    pub scratch_limit_mib: u64,
    /// Cycles at the same time, over all VMs.
    pub cycles_at_once: usize,
    /// The shortest interval that `--every` takes, in seconds.
    pub interval_min_s: u64,
    /// How long an upload waits for a broken link before its cycle is given up, in seconds.
    pub patience_s: u64,
    /// Delays after failed cycles, in seconds; the last one is used again and again.
    pub backoff_s: Vec<u64>,
}

impl Default for Replication {
    fn default() -> Self {
        Self {
            compression_level: 1,
            initial_log_mib: 1024,
            scratch_limit_mib: 8192,
            cycles_at_once: 4,
            interval_min_s: 5,
            patience_s: 30,
            backoff_s: vec![60, 120, 240, 480, 600, 1800],
        }
    }
}

/// How replicas are kept.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Replica {
    /// New logs are refused when less than this is free, in MiB.
    pub free_reserve_mib: u64,
    /// VMs whose logs are applied at the same time.
    pub apply_workers: usize,
    /// How long other programs may read the flat files at the most, in minutes.
    pub hold_max_min: u64,
    /// No peer may have more VMs here.
    pub vms_per_peer: usize,
}

impl Default for Replica {
    fn default() -> Self {
        Self { free_reserve_mib: 1024, apply_workers: 2, hold_max_min: 24 * 60, vms_per_peer: 10_000 }
    }
}

/// When health turns.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct HealthSettings {
    /// The monitoring window, in hours: so far back cycles count.
    pub window_h: u64,
    /// Warning above this share of missed cycles, in percent.
    pub missed_percent: u32,
    /// Warning above this average time from a moment to its durable acknowledgement, in seconds.
    pub latency_max_s: u64,
    /// Warning when the newest log is older than this, in seconds (and than three intervals).
    pub warning_after_s: u64,
    /// Critical when the newest log is older than this, in seconds (and than three intervals).
    pub critical_after_s: u64,
}

impl Default for HealthSettings {
    fn default() -> Self {
        let thresholds = HealthThresholds::default();
        Self {
            window_h: thresholds.window.as_secs() / 3600,
            missed_percent: thresholds.missed_percent,
            latency_max_s: thresholds.latency_max.as_secs(),
            warning_after_s: thresholds.warning_after.as_secs(),
            critical_after_s: thresholds.critical_after.as_secs(),
        }
    }
}

/// How refused backups come home.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Backup {
    /// Backups at the same time, over all VMs.
    pub at_once: usize,
    /// Of these, into one repository.
    pub per_repository: usize,
    /// Of these, from one storage (file system) of replicas.
    pub per_storage: usize,
    /// It is remembered so long what came of backups, in days.
    pub history_days: u64,
    /// A repository in which a policy has had backups forgotten is pruned so often, in hours; never with 0.
    pub prune_every_h: u64,
    /// The bound of the first delay after a refusal, in seconds; each later one is `factor` times longer.
    pub first_delay_s: u64,
    /// See `first-delay-s`.
    pub factor: u32,
    /// No delay is longer, in seconds.
    pub delay_max_s: u64,
    /// No more attempts than this.
    pub attempts_max: u32,
    /// After this many collisions with an apply in a row the next attempt holds applies off.
    pub barrier_after: u32,
    /// How long a backup is tried at the most, in minutes.
    pub window_min: u64,
    /// `prefer-application` takes an application-consistent point no older than this, in minutes.
    pub application_max_age_min: u64,
}

impl Default for Backup {
    fn default() -> Self {
        let policy = RetryPolicy::default();
        Self {
            at_once: 2,
            per_repository: 2,
            per_storage: 2,
            history_days: 90,
            prune_every_h: 7 * 24,
            first_delay_s: policy.first_delay.as_secs(),
            factor: policy.factor,
            delay_max_s: policy.delay_max.as_secs(),
            attempts_max: policy.attempts_max,
            barrier_after: policy.barrier_after,
            window_min: 8 * 60,
            application_max_age_min: 24 * 60,
        }
    }
}

/// How points and backups are booted to check them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Boot {
    /// QEMU.
    pub program: String,
    /// What a checked guest's processor is made of; found out if nothing is set.
    pub accelerator: Option<Accelerator>,
    /// No checked guest gets more memory, in MiB.
    pub memory_max_mib: u64,
    /// No checked guest gets more processors.
    pub cpus_max: u32,
    /// How long a guest may take to show a sign of life, in seconds.
    pub within_s: u64,
    /// Boot checks whose evidence is kept, of each VM.
    pub kept: u32,
    /// The newest point of each replica is checked when its last check is so many hours old; never with 0.
    pub every_h: u64,
}

impl Default for Boot {
    fn default() -> Self {
        Self {
            program: "qemu-system-x86_64".into(),
            accelerator: None,
            memory_max_mib: 2048,
            cpus_max: 2,
            within_s: 300,
            kept: 10,
            every_h: 0,
        }
    }
}

impl Config {
    /// Reads and checks `DIR/config.toml`.
    pub fn load(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("config.toml");
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Failure::new(
                Code::NoSite,
                format!(
                    "there is no site in {}; make one with 'afterimage --dir {} init --name NAME --listen ADDRESS'",
                    dir.display(),
                    dir.display()
                ),
            ),
            _ => Failure::io("read", &path, &error),
        })?;
        Self::parse(&text).map_err(|why| Failure::new(Code::Config, format!("{}: {why}", path.display())))
    }

    /// Reads and checks the text of a `config.toml`; else what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check().map(|()| config)
    }

    /// The text of a new site's `config.toml`.
    #[must_use]
    pub fn template(name: &str, listen: SocketAddr) -> String {
        template(name, listen)
    }

    fn check(&self) -> Result<(), String> {
        self.name
            .parse::<model::VmName>()
            .map_err(|error| error.to_string().replace("VM name", "site name"))?;
        let replication = &self.replication;
        let ranges = [
            ("replication.compression-level", replication.compression_level as u64, 1..=19),
            ("replication.initial-log-mib", replication.initial_log_mib, 1..=4096),
            ("replication.scratch-limit-mib", replication.scratch_limit_mib, 16..=1 << 24),
            ("replication.cycles-at-once", replication.cycles_at_once as u64, 1..=1000),
            ("replication.interval-min-s", replication.interval_min_s, 1..=900),
            ("replica.apply-workers", self.replica.apply_workers as u64, 1..=64),
            ("replica.hold-max-min", self.replica.hold_max_min, 1..=7 * 24 * 60),
            ("replica.free-reserve-mib", self.replica.free_reserve_mib, 0..=1 << 30),
            ("health.window-h", self.health.window_h, 1..=WINDOW_HOURS_MAX),
            ("health.latency-max-s", self.health.latency_max_s, 1..=86_400),
            ("health.missed-percent", u64::from(self.health.missed_percent), 1..=100),
            ("backup.at-once", self.backup.at_once as u64, 1..=64),
            ("backup.per-repository", self.backup.per_repository as u64, 1..=64),
            ("backup.per-storage", self.backup.per_storage as u64, 1..=64),
            ("backup.history-days", self.backup.history_days, 1..=3660),
            ("backup.prune-every-h", self.backup.prune_every_h, 0..=24 * 366),
            ("backup.attempts-max", u64::from(self.backup.attempts_max), 1..=1000),
            ("backup.window-min", self.backup.window_min, 1..=7 * 24 * 60),
            ("boot.memory-max-mib", self.boot.memory_max_mib, 64..=1 << 20),
            ("boot.cpus-max", u64::from(self.boot.cpus_max), 1..=256),
            ("boot.within-s", self.boot.within_s, 1..=86_400),
            ("boot.kept", u64::from(self.boot.kept), 1..=1000),
        ];
        for (name, settings) in &self.repositories {
            settings.check().map_err(|why| format!("repository {name}: {why}"))?;
        }
        for (setting, value, range) in ranges {
            if !range.contains(&value) {
                let (least, most) = (range.start(), range.end());
                return Err(format!("{setting} = {value} is out of range; use {least} to {most}"));
            }
        }
        Ok(())
    }

    /// The address that peers are told: what is set, or where the site listens; where that is every address
    /// of this machine, the one that it would send from.
    pub fn advertised(&self) -> Result<String, Failure> {
        if let Some(address) = &self.advertise {
            return Ok(address.clone());
        }
        if !self.listen.ip().is_unspecified() {
            return Ok(self.listen.to_string());
        }
        let own = own_address(self.listen.is_ipv6()).map_err(|error| {
            let message = format!(
                "this site listens on {} and the machine has no address to tell a peer ({error}); set 'advertise' in config.toml",
                self.listen
            );
            Failure::new(Code::Config, message)
        })?;
        Ok(SocketAddr::new(own, self.listen.port()).to_string())
    }

    /// The retry policy of backups.
    #[must_use]
    pub fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy {
            first_delay: Duration::from_secs(self.backup.first_delay_s),
            factor: self.backup.factor,
            delay_max: Duration::from_secs(self.backup.delay_max_s),
            attempts_max: self.backup.attempts_max,
            barrier_after: self.backup.barrier_after,
        }
    }

    /// How many backups run at once.
    #[must_use]
    pub(crate) fn limits(&self) -> policy::Limits {
        let Backup { at_once, per_repository, per_storage, .. } = self.backup;
        policy::Limits { site: at_once, repository: per_repository, storage: per_storage }
    }

    /// The thresholds of health.
    #[must_use]
    pub fn thresholds(&self) -> HealthThresholds {
        HealthThresholds {
            window: Duration::from_secs(self.health.window_h * 3600),
            missed_percent: self.health.missed_percent,
            latency_max: Duration::from_secs(self.health.latency_max_s),
            warning_after: Duration::from_secs(self.health.warning_after_s),
            critical_after: Duration::from_secs(self.health.critical_after_s),
        }
    }

    /// The delays after failed cycles.
    #[must_use]
    pub fn backoff(&self) -> CycleBackoff {
        CycleBackoff::new(self.replication.backoff_s.iter().copied().map(Duration::from_secs).collect())
    }

    /// A repository by its name, with paths that start at `dir` made whole.
    pub fn repository(&self, dir: &Path, name: &str) -> Result<RepositorySettings, Failure> {
        let found = self.repositories.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.repositories.keys().map(String::as_str).collect();
            Failure::new(
                Code::NoSuchRepository,
                format!("the config has no repository named {name:?}; it has: {}", known.join(", ")),
            )
        })?;
        Ok(found.within(dir))
    }
}

/// The address that this machine sends from. Connecting a datagram socket asks the routing table and sends
/// nothing; the target is an address reserved for documentation.
fn own_address(v6: bool) -> std::io::Result<IpAddr> {
    let (from, to) = if v6 { ("[::]:0", "[2001:db8::1]:9") } else { ("0.0.0.0:0", "192.0.2.1:9") };
    let socket = UdpSocket::bind(from)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// The text of a new site's `config.toml`: every setting with its default and what it means.
#[must_use]
pub fn template(name: &str, listen: SocketAddr) -> String {
    let (replication, replica) = (Replication::default(), Replica::default());
    let (health, backup, boot) = (HealthSettings::default(), Backup::default(), Boot::default());
    let backoff: Vec<String> = replication.backoff_s.iter().map(u64::to_string).collect();
    let mut text = String::new();
    let _ = write!(
        text,
        r#"# The settings of this site. A change takes effect when the site is started again.
name = "{name}"
listen = "{listen}"
# What peers are told, where it is not the address above (a name, a port forwarded by a router):
# advertise = "backup.example.org:7443"

[replication]
compression-level = {level}      # zstd level of logs, 1 to 19
initial-log-mib = {initial}      # a lost link costs at most this much of an initial replication
scratch-limit-mib = {scratch}    # a cycle is given up before it writes more to the scratch
cycles-at-once = {cycles}        # over all VMs
interval-min-s = {interval}      # the shortest interval that --every takes
patience-s = {patience}          # how long an upload waits for a broken link
backoff-s = [{backoff}]          # delays after failed cycles; the last one again and again

[replica]
free-reserve-mib = {reserve}     # new logs are refused when less is free
apply-workers = {workers}        # VMs whose logs are applied at the same time
hold-max-min = {hold}            # the longest hold of the flat files
vms-per-peer = {vms}             # no peer may have more VMs here

[health]
window-h = {window_h}            # the monitoring window: so far back cycles count (1 to 168)
missed-percent = {missed}        # Warning above this share of missed cycles
latency-max-s = {latency}        # Warning above this average time from a moment to its acknowledgement
warning-after-s = {warning}      # Warning when the newest log is older (and than three intervals)
critical-after-s = {critical}    # Critical when the newest log is older (and than three intervals)

[backup]
at-once = {at_once}              # over all VMs; the most urgent first
per-repository = {per_repository}       # of these, into one repository
per-storage = {per_storage}          # of these, from one file system with replicas
prune-every-h = {prune}         # repositories in which policies have had backups forgotten; 0: only by hand
history-days = {history}        # so long 'backup report' remembers what came of them
first-delay-s = {first}          # after a refusal; each later delay is `factor` times longer, with jitter
factor = {factor}
delay-max-s = {delay_max}
attempts-max = {attempts}
barrier-after = {barrier}        # collisions with an apply in a row until applies are held off
window-min = {window}            # how long a backup is tried at the most
application-max-age-min = {age}  # for --consistency prefer-application

[boot]                           # how points and backups are booted to check them
program = "{program}"
# accelerator = "tcg"            # or "kvm"; found out if nothing is set
memory-max-mib = {memory_max}    # no checked guest gets more memory
cpus-max = {cpus_max}            # nor more processors
within-s = {within}              # how long a guest may take to show a sign of life
kept = {kept}                    # checks whose console and screen are kept, of each VM
every-h = {every}                # check the newest point of each replica so often, in hours; 0: only on demand

[networks]                       # for VMs that are failed over to this site: which network there is which one here
# "default" = "bridge:br0"       # or "tap:NAME", "user" (out, not in), "none"
# "*" = "none"                   # all others; a card without a network has no cable

[repositories.{LOCAL_REPOSITORY}]
path = "repository"
password-file = "repository.password"
# Others, on servers (docs/repositories.md):
# [repositories.offsite]
# url = "s3:https://s3.example.org/bucket/prefix"   # or "rest:https://host:8000/path/", "sftp:user@host:/folder"
# user = "access key id"                            # of REST servers, the user
# secret-file = "offsite.secret"                    # or secret-command = ["program", "argument"], secret-env = "NAME"
# password-command = ["pass", "show", "offsite"]    # or password-file, password-env
"#,
        level = replication.compression_level,
        initial = replication.initial_log_mib,
        scratch = replication.scratch_limit_mib,
        cycles = replication.cycles_at_once,
        interval = replication.interval_min_s,
        patience = replication.patience_s,
        backoff = backoff.join(", "),
        reserve = replica.free_reserve_mib,
        workers = replica.apply_workers,
        hold = replica.hold_max_min,
        vms = replica.vms_per_peer,
        window_h = health.window_h,
        missed = health.missed_percent,
        latency = health.latency_max_s,
        warning = health.warning_after_s,
        critical = health.critical_after_s,
        at_once = backup.at_once,
        per_repository = backup.per_repository,
        per_storage = backup.per_storage,
        history = backup.history_days,
        prune = backup.prune_every_h,
        first = backup.first_delay_s,
        factor = backup.factor,
        delay_max = backup.delay_max_s,
        attempts = backup.attempts_max,
        barrier = backup.barrier_after,
        window = backup.window_min,
        age = backup.application_max_age_min,
        program = boot.program,
        memory_max = boot.memory_max_mib,
        cpus_max = boot.cpus_max,
        within = boot.within_s,
        kept = boot.kept,
        every = boot.every_h,
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, String> {
        Config::parse(text)
    }

    #[test]
    fn the_template_says_the_defaults_and_can_be_read() {
        let listen = "127.0.0.1:7443".parse().unwrap();
        let config = parsed(&template("branch", listen)).unwrap();
        let bare = parsed("name = \"branch\"\nlisten = \"127.0.0.1:7443\"").unwrap();
        assert_eq!(config.repositories.len(), 1);
        assert_eq!(Config { repositories: BTreeMap::new(), ..config }, bare);
    }

    #[test]
    fn a_setting_that_does_not_exist_or_does_not_fit_is_named() {
        let head = "name = \"branch\"\nlisten = \"127.0.0.1:7443\"\n";
        let error = |text: &str| parsed(&format!("{head}{text}")).unwrap_err();
        assert!(error("[replication]\ncompresion-level = 3").contains("compresion-level"));
        assert!(error("[replication]\ncompression-level = 40").contains("use 1 to 19"));
        assert!(parsed("name = \"../x\"\nlisten = \"127.0.0.1:1\"").unwrap_err().contains("site name"));
    }
}
