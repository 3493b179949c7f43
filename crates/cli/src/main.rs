//! The command `afterimage`: arguments in, tables or JSON out, exit statuses that scripts can rely on.
//!
//! What a running site has to do it is asked over its control socket; what only reads a repository
//! (`backups`, `restore`, `verify`, `repository`) is done here, so that a backup can be restored when nothing else runs.

mod args;
mod configure;
mod demo;
mod failover;
mod files;
mod groups;
mod measurements;
mod memory;
mod peer_args;
mod peers;
mod points;
mod policies;
mod progress;
mod recover;
mod repositories;
mod repository_args;
mod repository_commands;
mod show;
mod when;

use std::process::ExitCode;

use clap::Parser;
use model::gate::Access;
use serde_json::{Value, json};
use site::{BackupRequest, By, Code, Config, Exported, Failure, GroupRequest, Request};

use crate::args::{Arguments, Command, Disk, View};
use crate::groups::Aim;
use crate::policies::{BackupCommand, Report};
use crate::progress::Bar;

fn main() -> ExitCode {
    memory::bound();
    // Disks of guests, keys and passwords are for whoever runs this alone, wherever they are written.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("afterimage: no threads can be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(&arguments));
    // A restore that was given up must not wait for its threads.
    runtime.shutdown_background();
    finish(&arguments, outcome)
}

/// What a command has to say: for a script, and for a person.
struct Said {
    json: Value,
    text: String,
    status: u8,
}

impl Said {
    fn new(json: Value, text: impl Into<String>) -> Self {
        Self { json, text: text.into(), status: 0 }
    }
}

fn finish(arguments: &Arguments, outcome: Result<Option<Said>, Failure>) -> ExitCode {
    match outcome {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(said)) => {
            let text = if arguments.json { said.json.to_string() } else { said.text };
            if !text.is_empty() {
                print(text.trim_end());
            }
            ExitCode::from(said.status)
        }
        Err(failure) => {
            if arguments.json {
                print(&json!({ "error": failure }).to_string());
            } else {
                eprintln!("{}", show::harmless(&show::failure(&failure)));
            }
            ExitCode::from(failure.exit_status())
        }
    }
}

/// Like `println`, but a reader that has gone away (`| head`) is no panic, and nothing that came from elsewhere (a
/// peer's reason, QEMU's words) controls the terminal.
fn print(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{}", show::harmless(text));
}

/// Help and version are answers; anything else is wrong usage, in the form that was asked for.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let failure = Failure::new(Code::Usage, error.render().to_string().trim_end().to_owned());
    if std::env::args_os().any(|argument| argument == "--json") {
        print(&json!({ "error": failure }).to_string());
    } else {
        let _ = error.print();
    }
    ExitCode::from(failure.exit_status())
}

async fn run(arguments: &Arguments) -> Result<Option<Said>, Failure> {
    let dir = &arguments.dir;
    match &arguments.command {
        Command::Init { name, listen } => {
            let made = site::init(dir, name, *listen)?;
            let text = show::init(dir, &made);
            Ok(Some(Said::new(json!(made), text)))
        }
        Command::Serve => serve(arguments).await.map(|()| None),
        Command::Backups { vm, repository } => {
            repositories::list(dir, &repository.repository, vm.as_ref()).await.map(Some)
        }
        Command::Restore(restore) => repositories::restore(arguments, restore).await.map(Some),
        Command::Files(wanted) => files::run(arguments, wanted).await.map(Some),
        Command::Verify { vm, backup, repository } => {
            repositories::verify(arguments, &repository.repository, vm.as_ref(), backup.as_deref())
                .await
                .map(Some)
        }
        Command::Policy(args::Policy::New { name, vms, at, repository }) => {
            policies::write(dir, name, vms, at, repository).map(Some)
        }
        Command::Repository(command) => repository_commands::command(arguments, command).await.map(Some),
        Command::Demo { keep } => demo::run(arguments, *keep).await.map(Some),
        command => ask(arguments, command).await.map(Some),
    }
}

async fn serve(arguments: &Arguments) -> Result<(), Failure> {
    let level = if arguments.quiet { "error" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("AFTERIMAGE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let config = Config::load(&arguments.dir)?;
    site::serve(&arguments.dir, config, |address| print(&format!("listening on https://{address}"))).await
}

/// Asks the running site.
async fn ask(arguments: &Arguments, command: &Command) -> Result<Said, Failure> {
    let request = request(command)?;
    let bar = Bar::new(arguments);
    let answer = site::ask(&arguments.dir, &request, |progress| bar.show(&progress)).await;
    bar.clear();
    let mut answer = answer?;
    groups::start_all(&arguments.dir, command, &mut answer).await?;
    let text = match command {
        Command::Measurements { csv: true, .. } => measurements::csv(&answer),
        Command::Backup(args::Backup { command: Some(BackupCommand::Report(report)), .. }) => match report {
            Report { csv: true, .. } => policies::csv(&answer),
            Report { html: true, .. } => policies::html(&answer),
            _ => show::answer(&request, &answer),
        },
        _ => show::answer(&request, &answer),
    };
    // A guest that does not boot is an answer, and no success; so is a promise that is broken.
    let status = match request {
        Request::Check(_) => u8::from(answer["alive"] != true),
        Request::BackupReport { .. } => u8::from(answer["broken"] != 0),
        _ => 0,
    };
    Ok(Said { json: answer, text, status })
}

fn request(command: &Command) -> Result<Request, Failure> {
    Ok(match command {
        Command::Peer(peer) => peers::request(peer)?,
        Command::Identity(identity) => peers::identity_request(identity)?,
        Command::Protect(protect) => Request::Protect(Box::new(wanted(protect)?)),
        Command::Status { vm } => Request::Status { vm: vm.clone() },
        Command::Points { target, plan } => match groups::target(target)? {
            Aim::Vm(vm) => Request::Points { vm, plan: *plan },
            Aim::Group(group) => Request::Group(GroupRequest::Points { group }),
        },
        Command::Pin { vm, point, name } => {
            Request::Pin { vm: vm.clone(), point: point.clone(), name: name.clone() }
        }
        Command::Unpin { vm, point } => Request::Unpin { vm: vm.clone(), point: point.clone() },
        Command::Pause { vm } => Request::Pause { vm: vm.clone() },
        Command::Resume { vm } => Request::Resume { vm: vm.clone() },
        Command::Resync { vm, cancel } => Request::Resync { vm: vm.clone(), cancel: *cancel },
        Command::Configure(configure) => configure.request()?,
        Command::Replica(replica) => when::replica(replica)?,
        Command::Sync { target } => match groups::target(target)? {
            Aim::Vm(vm) => Request::Sync { vm },
            Aim::Group(group) => Request::Group(GroupRequest::Sync { group }),
        },
        Command::Group(group) => Request::Group(groups::request(group)),
        Command::Disk(Disk::Add { vm, nodes }) => Request::AddDisks { vm: vm.clone(), nodes: nodes.clone() },
        Command::Disk(Disk::Remove { vm, disks }) => {
            Request::RemoveDisks { vm: vm.clone(), disks: disks.clone() }
        }
        Command::Unprotect { vm } => Request::Unprotect { vm: vm.clone() },
        Command::Extend(extend) => Request::Extend(site::Extend {
            vm: extend.vm.clone(),
            to: extend.to.clone(),
            every_s: extend.every.map(|every| every.as_secs()),
            points: extend.points,
            bandwidth_bytes_per_s: extend.bandwidth,
        }),
        Command::Unextend { vm } => Request::Unextend { vm: vm.clone() },
        Command::Backup(args::Backup { command: Some(BackupCommand::Report(report)), .. }) => {
            policies::report_request(report)
        }
        Command::Backup(backup) => backed_up(backup)?,
        Command::Policy(policy) => Request::Policy(policies::request(policy)?),
        Command::Jobs => Request::Jobs,
        Command::Hold { vm, lease } => Request::Hold { vm: vm.clone(), for_s: lease.as_secs() },
        Command::Release { hold } => Request::Release { hold: hold.clone() },
        Command::Export(export) => Request::Export(exported(export)?),
        Command::Unexport { export } => Request::Unexport { export: export.clone() },
        Command::Check(check) => {
            let what = match &check.backup {
                Some(backup) => Exported::Backup {
                    backup: backup.clone(),
                    repository: check.repository.repository.clone(),
                },
                None => Exported::Point { vm: check.vm.clone(), point: check.point.clone() },
            };
            let within_s = check.within.map(|within| within.as_secs().max(1));
            Request::Check(site::Check {
                vm: check.vm.clone(),
                what,
                sign: check.sign_of_life.clone(),
                within_s,
            })
        }
        Command::Checks { vm } => Request::Checks { vm: vm.clone() },
        Command::Failover(failover) => Request::Failover(failover::request(failover)?),
        Command::Migrate(args::Migrate { vm, storage, to_site, .. }) => match storage {
            Some(storage) => Request::Migrate { vm: vm.clone(), storage: absolute(storage)? },
            None => Request::Relocate { vm: vm.clone(), to: to_site.clone() },
        },
        Command::Recover(recover) => Request::Recover(recover::request(recover)?),
        Command::Measurements { vm, reset, .. } => Request::Measurements { vm: vm.clone(), reset: *reset },
        Command::Events { count } => Request::Events { count: *count },
        Command::Init { .. }
        | Command::Serve
        | Command::Backups { .. }
        | Command::Restore(_)
        | Command::Files(_)
        | Command::Verify { .. }
        | Command::Repository(_)
        | Command::Demo { .. } => {
            return Err(Failure::new(Code::Internal, "this command is not for a running site"));
        }
    })
}

fn wanted(protect: &args::Protect) -> Result<site::Protect, Failure> {
    let by = match (&protect.qmp, &protect.libvirt) {
        (Some(socket), None) => By::Qmp(absolute(socket)?),
        (None, Some(uri)) => {
            let domain = protect.domain.clone().unwrap_or_else(|| protect.vm.to_string());
            By::Libvirt { uri: uri.clone(), domain }
        }
        _ => {
            return Err(Failure::new(Code::Usage, "name a QMP socket with --qmp, or libvirt with --libvirt"));
        }
    };
    if protect.app_every.is_some() && protect.guest_agent.is_none() && matches!(by, By::Qmp(_)) {
        return Err(Failure::new(
            Code::Usage,
            "--app-every needs the guest agent's socket: --guest-agent SOCKET",
        ));
    }
    Ok(site::Protect {
        vm: protect.vm.clone(),
        by,
        nbd: protect.nbd.as_deref().map(absolute).transpose()?,
        to: protect.to.clone(),
        every_s: protect.every.as_secs(),
        disks: protect.disks.clone(),
        points: protect.points,
        app_every_s: protect.app_every.map(|every| every.as_secs()),
        guest_agent: protect.guest_agent.as_deref().map(absolute).transpose()?,
        bandwidth_bytes_per_s: protect.bandwidth,
        sign_of_life: protect.sign_of_life.clone(),
        excluded: protect.excluded.clone(),
        resync: protect.passes.resync.unwrap_or_default(),
        initial: protect.passes.initial.clone().unwrap_or_default(),
        take_over: protect.take_over,
    })
}

fn backed_up(backup: &args::Backup) -> Result<Request, Failure> {
    let (point, repository) = (backup.point.clone(), backup.repository.repository.clone());
    Ok(match groups::target(&backup.target)? {
        Aim::Group(group) => {
            Request::Group(GroupRequest::Backup { group, point, repository, no_retry: backup.no_retry })
        }
        Aim::Vm(vm) => Request::Backup(BackupRequest {
            vm,
            point,
            consistency: consistency(backup.consistency),
            view: match backup.view {
                View::Pinned => Access::Pinned,
                View::Strict => Access::Strict,
                View::Hold => Access::Hold,
            },
            repository,
            no_retry: backup.no_retry,
            pause: backup.pause,
        }),
    })
}

fn exported(export: &args::Export) -> Result<site::Export, Failure> {
    let what = match (&export.vm, &export.backup) {
        (Some(vm), None) => Exported::Point { vm: vm.clone(), point: export.point.clone() },
        (None, Some(backup)) => {
            Exported::Backup { backup: backup.clone(), repository: export.repository.repository.clone() }
        }
        _ => return Err(Failure::new(Code::Usage, "name a VM, or a backup with --backup")),
    };
    Ok(site::Export { what, writable: export.writable })
}

/// The site's own `prefer-application` stands where nothing else is asked for.
fn consistency(wanted: args::ConsistencyWanted) -> Option<model::Wanted> {
    match wanted {
        args::ConsistencyWanted::Application => Some(model::Wanted::Application),
        args::ConsistencyWanted::PreferApplication => None,
        args::ConsistencyWanted::Crash => Some(model::Wanted::Crash),
    }
}

/// A path as the site sees it, which runs in another folder.
pub(crate) fn absolute(path: &std::path::Path) -> Result<std::path::PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::io("find", path, &error))
}
