//! A site from its start to SIGTERM.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use catalog::Catalog;
use primary::Primary;
use replica::Store;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use wire::Identity;

use crate::backup::Backups;
use crate::checks::Checks;
use crate::commands::Site;
use crate::config::Config;
use crate::control;
use crate::endpoint::SiteEndpoint;
use crate::events::Events;
use crate::exports::Exports;
use crate::extend::{Extensions, ReplicaPorts};
use crate::failure::{Code, Failure};
use crate::identity;
use crate::jobs::{self, Jobs};
use crate::peers::Peers;
use crate::policies::Known;
use crate::repositories::OpenRepositories;
use crate::trials::Trials;
use crate::turn::Turns;

/// Runs the site in `dir` until SIGTERM or SIGINT. `ready` is told the address once it takes requests.
pub async fn serve(dir: &Path, config: Config, ready: impl FnOnce(&str)) -> Result<(), Failure> {
    // QEMU and others are told paths of this site, whatever their own folder is.
    let dir = &std::path::absolute(dir).map_err(|error| Failure::io("find", dir, &error))?;
    // The first thing, because it keeps a second site out of the folder.
    let commands = control::listen(&control::socket(dir)).await?;
    let listener = TcpListener::bind(config.listen).await.map_err(|error| {
        Failure::new(
            Code::Io,
            format!("cannot listen on {}: {error}; see 'listen' in config.toml", config.listen),
        )
    })?;
    let address =
        listener.local_addr().map_or_else(|_| config.listen.to_string(), |address| address.to_string());
    let own = Identity::load(dir).map_err(|error| Failure::new(Code::Io, error.to_string()))?;
    let stop = CancellationToken::new();
    let site = open(dir, config, &own, &stop).await?;
    site.take_up_failovers().await;
    // Jobs that go on ask their policies.
    site.policies.look()?;
    site.take_up_recoveries().await;
    site.primary.start()?;
    site.extensions.start()?;
    site.jobs.start()?;

    let endpoint = Arc::new(SiteEndpoint::new(site.clone()));
    let served = tokio::spawn({
        let (stop, router) = (stop.clone(), wire::router(endpoint));
        async move { wire::serve(listener, &own, router, stop.cancelled_owned()).await }
    });
    let controlled = tokio::spawn(control::serve(commands, site.clone(), stop.clone()));
    let exported = tokio::spawn(site.exports.serve(stop.clone()));
    let scheduled = tokio::spawn({
        let (site, stop) = (site.clone(), stop.clone());
        async move { site.checks.run_scheduled(&site.store, stop).await }
    });
    let planned = tokio::spawn(site.clone().run_policies(stop.clone()));
    let kept_up = tokio::spawn(site.clone().run_upkeep(stop.clone()));
    let watched = tokio::spawn({
        let site = site.clone();
        async move { site.watch_certificates().await }
    });
    ready(&address);
    tracing::info!(%address, "the site is running");
    wait_for_signal().await?;
    tracing::info!("the site is stopping");
    stop.cancel();
    scheduled.abort(); // its QEMU goes with it
    planned.abort();
    watched.abort();
    tokio::join!(site.primary.shutdown(), site.extensions.shutdown());
    site.trials.end_all().await;
    // Callers that wait have been told by now; a connection that does not end must not keep us.
    let _ = tokio::time::timeout(Duration::from_secs(10), async {
        tokio::join!(served, controlled, exported, kept_up)
    })
    .await;
    let store = site.store.clone();
    let closed = tokio::task::spawn_blocking(move || store.shutdown()).await;
    closed.map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    let _ = std::fs::remove_file(control::socket(dir));
    Ok(())
}

async fn open(
    dir: &Path,
    config: Config,
    own: &Identity,
    stop: &CancellationToken,
) -> Result<Arc<Site>, Failure> {
    let catalog = Catalog::open(dir.join("catalog.sqlite"))?;
    let events = Events::open(catalog.clone())?;
    let peers = Arc::new(Peers::open(catalog.clone(), own.clone(), identity::load_ca(dir)?)?);
    let primary =
        Primary::open(catalog.clone(), primary_config(&config), primary_ports(dir, &config, peers.clone())?)?;
    let store = {
        let settings = replica::Config { storages: peers.storages(), ..store_config(dir, &config) };
        let catalog = catalog.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(catalog, settings)).await;
        opened.map_err(|error| Failure::new(Code::Internal, error.to_string()))?.map_err(Failure::from)?
    };
    let extensions = Extensions::open(
        catalog.clone(),
        // What is fixed already need not be read ahead of being fixed.
        primary::Config { ahead_from_bytes: u64::MAX, ..primary_config(&config) },
        ReplicaPorts { store: store.clone(), peers: peers.clone() },
    )?;
    let config = Arc::new(config);
    let policies = Arc::new(Known::new(dir.to_owned(), config.clone()));
    let repositories = Arc::new(OpenRepositories::new(dir.to_owned(), config.clone()));
    let backups = Backups::new(
        config.clone(),
        store.clone(),
        events.clone(),
        repositories.clone(),
        policies.clone(),
        catalog.clone(),
    );
    let settings = jobs::Settings {
        retry: config.retry_policy(),
        window: Duration::from_secs(config.backup.window_min * 60),
        limits: config.limits(),
        history: Duration::from_secs(config.backup.history_days * 24 * 3600),
    };
    let checked = catalog.clone();
    let jobs = Jobs::open(catalog, settings, stop.clone(), Arc::new(backups))?;
    let exports = Exports::open(&folder(dir, "run")?, store.clone(), repositories.clone())?;
    let exports = Arc::new(exports);
    let shown = exports.clone();
    store.ask_who_reads_below(move |vm| shown.is_failover_read(vm));
    let granted = peers.clone();
    store.ask_where_replicas_go(move |peer| granted.storage(peer));
    let checks = Checks::open(dir, config.boot.clone(), checked, exports.clone(), events.clone())?;
    let trials = Trials::open(dir.join("run/tests"), exports.clone())?;
    Ok(Arc::new(Site {
        dir: dir.to_owned(),
        config,
        peers,
        events,
        primary,
        extensions,
        store,
        jobs,
        policies,
        repositories,
        exports,
        checks,
        turns: Turns::default(),
        trials,
        moves: tokio::sync::Mutex::default(),
    }))
}

/// A folder of the site, made if it is not there.
fn folder(dir: &Path, name: &str) -> Result<PathBuf, Failure> {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).map_err(|error| Failure::io("make the folder", &path, &error))?;
    Ok(path)
}

fn primary_ports(dir: &Path, config: &Config, peers: Arc<Peers>) -> Result<primary::Real, Failure> {
    Ok(primary::Real {
        peers,
        run_dir: folder(dir, "run")?,
        scratch_dir: folder(dir, "scratch")?,
        libvirt_dir: dir.join("libvirt"),
        scratch_limit_bytes: config.replication.scratch_limit_mib << 20,
    })
}

fn primary_config(config: &Config) -> primary::Config {
    primary::Config {
        site_name: config.name.clone(),
        compression_level: config.replication.compression_level,
        compress: primary::Compress::Workers,
        initial_log_bytes: config.replication.initial_log_mib << 20,
        interval_min_s: config.replication.interval_min_s,
        backoff: config.backoff(),
        patience: Duration::from_secs(config.replication.patience_s),
        thresholds: config.thresholds(),
        cycles_at_once: config.replication.cycles_at_once,
        ahead_from_bytes: primary::AHEAD_FROM_BYTES,
    }
}

fn store_config(dir: &Path, config: &Config) -> replica::Config {
    let mut settings = replica::Config::new(dir);
    settings.free_reserve_bytes = config.replica.free_reserve_mib << 20;
    settings.workers = config.replica.apply_workers;
    settings.health = config.thresholds();
    settings.hold_max = Duration::from_secs(config.replica.hold_max_min * 60);
    settings
}

async fn wait_for_signal() -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(Code::Internal, format!("no signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
