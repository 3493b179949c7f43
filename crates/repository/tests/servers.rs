//! Repositories on real servers: a REST server, an S3 server, an SFTP server. Whatever is killed, stopped, full or
//! wrong, no backup that is listed is damaged, and the next run goes on.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use repository::{Access, BackupInfo, ErrorKind, Location, Progress, Repository, Secret, VerifyOptions};
use rig::{RepositoryServer, ServerKind};
use support::*;

fn access(server: &RepositoryServer) -> Access {
    let credentials = server.credentials();
    Access {
        user: credentials.map(|(user, _)| user.to_owned()),
        secret: credentials.map(|(_, secret)| Secret::new(secret.to_owned())),
        ssh_options: server.ssh_options(),
        ..Access::default()
    }
}

fn location(server: &RepositoryServer) -> Location {
    Location::remote(&server.url(), access(server)).unwrap()
}

/// What stock restic and we find in the repository: nothing wrong.
fn is_whole(server: &RepositoryServer, repository: &Repository) {
    let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
    let report = repository.verify(&options, &|_| (), &AtomicBool::new(false)).unwrap();
    assert_eq!(report.damaged, []);
    restic_on(server, &["check", "--read-data"]);
}

fn restic_on(server: &RepositoryServer, arguments: &[&str]) -> Vec<u8> {
    need("restic", "restic");
    let output = server.restic(PASSWORD).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "restic {arguments:?}: {}{said}",
        String::from_utf8_lossy(&output.stdout)
    );
    output.stdout
}

fn start(kind: ServerKind, folder: &Path) -> RepositoryServer {
    RepositoryServer::start(kind, folder, None).unwrap()
}

/// Everything that a server is put through.
fn put_through(kind: ServerKind) {
    let folder = tempfile::tempdir().unwrap();
    let mut server = start(kind, &folder.path().join("server"));
    let repository = Repository::create(location(&server), PASSWORD).unwrap();
    let disk = Chance::new(1).bytes(40 * CHUNK);
    let first = backups_and_restores(&server, &repository, &disk);
    a_server_that_is_killed_is_waited_for(&mut server, &repository, &first);
    a_server_that_does_not_answer_is_told(&server, &first);
    wrong_credentials_are_told_without_them(&server);
    is_whole(&server, &repository);
}

fn backups_and_restores(server: &RepositoryServer, repository: &Repository, disk: &[u8]) -> BackupInfo {
    assert_eq!(
        Repository::create(location(server), PASSWORD).unwrap_err().kind(),
        ErrorKind::RepositoryExists
    );
    assert_eq!(Repository::open(location(server), "wrong").unwrap_err().kind(), ErrorKind::WrongPassword);
    let first = backup(repository, &Disks::new(1, &[("a", disk)]), None).unwrap().backup;
    let mut changed = disk.to_vec();
    changed[5..9].copy_from_slice(b"news");
    let source = Disks::new(2, &[("a", &changed)]).with_changes(1, vec![vec![5..9]]);
    let second = backup(repository, &source, Some(&first)).unwrap();
    assert_eq!(second.incremental_disks, 1);

    // Another that opens it sees the same, and so does restic.
    let again = Repository::open(location(server), PASSWORD).unwrap();
    assert_eq!(again.backups(None).unwrap(), [first.clone(), second.backup.clone()]);
    assert_restores(&again, &first, &[("a", disk)]);
    assert_restores(&again, &second.backup, &[("a", &changed)]);
    let dumped = restic_on(server, &["dump", &second.backup.id.to_string(), "/a.raw"]);
    assert!(dumped == changed);
    let said = restic_on(server, &["list", "locks"]);
    assert_eq!(String::from_utf8_lossy(&said), "", "no lock is left");
    first
}

/// A run whose server goes away fails, as something that may clear; its packs serve the next one.
fn a_server_that_is_killed_is_waited_for(
    server: &mut RepositoryServer,
    repository: &Repository,
    first: &BackupInfo,
) {
    let disk = Chance::new(2).bytes(160 * CHUNK);
    let source = Disks { slow: Duration::from_millis(15), ..Disks::new(3, &[("a", &disk)]) };
    let killed = Mutex::new(&mut *server);
    let stopped = AtomicBool::new(false);
    let progress = |progress: Progress| {
        // A pack is there, and the next ones are on their way.
        if progress.added_bytes > 0 && !stopped.swap(true, Ordering::Relaxed) {
            killed.lock().unwrap().kill();
        }
    };
    let error =
        repository.backup(&source, meta(VM, 3), None, &progress, &AtomicBool::new(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("try again"), "{error}");
    assert_eq!(repository.backups(None).unwrap_err().kind(), ErrorKind::Unavailable);
    server.start_again().unwrap();
    assert_eq!(repository.backups(None).unwrap().len(), 2);
    assert_restores(repository, first, &[("a", &Chance::new(1).bytes(40 * CHUNK))]);
    let report = backup(repository, &Disks::new(3, &[("a", &disk)]), None).unwrap();
    assert_restores(repository, &report.backup, &[("a", &disk)]);
    // Only an index file makes a pack of use to others, and that comes with every 8192 chunks, or at the end.
    let report = backup(repository, &Disks::new(4, &[("a", &disk)]), None).unwrap();
    assert_eq!(report.chunks_added, 0);
    is_whole(server, repository);
}

fn a_server_that_does_not_answer_is_told(server: &RepositoryServer, first: &BackupInfo) {
    let access = Access { timeout: Duration::from_secs(5), ..access(server) };
    let repository = Repository::open(Location::remote(&server.url(), access).unwrap(), PASSWORD).unwrap();
    server.freeze(true).unwrap();
    let error = repository.backups(None).unwrap_err();
    server.freeze(false).unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(repository.backups(None).unwrap().contains(first));
}

fn wrong_credentials_are_told_without_them(server: &RepositoryServer) {
    let mut access = access(server);
    match server.credentials() {
        Some(_) => access.secret = Some(Secret::new("a-wrong-one".into())),
        // A key that the server does not know.
        None => {
            let folder = tempfile::tempdir().unwrap();
            let key = folder.path().join("key");
            let made = need("ssh-keygen", "openssh-client")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(&key)
                .status();
            assert!(made.unwrap().success());
            access.ssh_options.iter_mut().filter(|option| option.starts_with("-i")).for_each(|option| {
                *option = format!("-i{}", key.display());
            });
            let error =
                Repository::open(Location::remote(&server.url(), access).unwrap(), PASSWORD).unwrap_err();
            assert!(error.kind() == ErrorKind::Denied && error.to_string().contains("publickey"), "{error}");
            return;
        }
    }
    let error = Repository::open(Location::remote(&server.url(), access).unwrap(), PASSWORD).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.to_string().contains("credentials") && !error.to_string().contains("wrong-one"), "{error}");
}

#[test]
fn a_rest_server() {
    put_through(ServerKind::Rest);
}

#[test]
fn an_s3_server() {
    put_through(ServerKind::S3);
}

#[test]
fn an_sftp_server() {
    put_through(ServerKind::Sftp);
}

/// A file system that is full is the server's: a run fails for now, and goes on where there is room again.
fn fill_up(kind: ServerKind) {
    let folder = tempfile::tempdir().unwrap();
    let server = RepositoryServer::start(kind, &folder.path().join("server"), Some(24)).unwrap();
    let repository = Repository::create(location(&server), PASSWORD).unwrap();
    let small = Chance::new(1).bytes(8 * CHUNK);
    let info = backup(&repository, &Disks::new(1, &[("a", &small)]), None).unwrap().backup;
    let large = Chance::new(2).bytes(120 * CHUNK);
    let error = backup(&repository, &Disks::new(2, &[("a", &large)]), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(repository.backups(None).unwrap(), std::slice::from_ref(&info));
    assert_restores(&repository, &info, &[("a", &small)]);
    let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
    let report = repository.verify(&options, &|_| (), &AtomicBool::new(false)).unwrap();
    assert_eq!(report.damaged, []);
}

#[test]
fn a_full_rest_server() {
    fill_up(ServerKind::Rest);
}

#[test]
fn a_full_s3_server() {
    fill_up(ServerKind::S3);
}

#[test]
fn a_full_sftp_server() {
    fill_up(ServerKind::Sftp);
}

/// What a server does not let us remove stays, and everything else goes on; locks it does let go.
#[test]
fn a_server_that_only_takes() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(ServerKind::AppendOnlyRest, &folder.path().join("server"));
    let repository = Repository::create(location(&server), PASSWORD).unwrap();
    let disk = Chance::new(4).bytes(10 * CHUNK);
    let first = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap().backup;
    let report = backup(&repository, &Disks::new(2, &[("a", &disk)]), None).unwrap();
    assert_eq!(report.chunks_added, 0);
    let error = repository.forget(&[first.id]).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Denied && error.to_string().contains("what they may do there"),
        "{error}"
    );
    let key = repository.add_key("another", "tenant").unwrap();
    assert_eq!(repository.remove_key(&key.to_string()).unwrap_err().kind(), ErrorKind::Denied);
    // Packs that nothing needs are there: a run was cut off.
    let source = Disks { valid: Err("the pin was taken away".into()), ..Disks::new(3, &[("a", &disk[5..])]) };
    backup(&repository, &source, None).unwrap_err();
    let options = repository::PruneOptions { unused_percent: 0, ..Default::default() };
    let error = repository.prune(&options, &AtomicBool::new(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert_eq!(repository.backups(None).unwrap().len(), 2);
    assert_restores(&repository, &first, &[("a", &disk)]);
    assert_eq!(restic_on(&server, &["list", "locks"]), b"");
    is_whole(&server, &repository);
}

/// The state of the disk at each point of the killed writer's history.
fn killed_disk(number: u64) -> Vec<u8> {
    let mut disk = Chance::new(77).bytes(100 * CHUNK);
    for step in 1..=number {
        let place = usize::try_from(step % 50).unwrap() * CHUNK;
        disk[place..place + 30 * CHUNK].copy_from_slice(&Chance::new(step).bytes(30 * CHUNK));
    }
    disk
}

/// This test's binary again, as a process that makes backups until it is killed.
#[test]
fn a_writer_until_it_is_killed() {
    let Some(url) = std::env::var_os("AFTERIMAGE_TEST_URL") else { return };
    let lines = |name: &str| {
        let text = std::env::var(name).unwrap_or_default();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut credentials = lines("AFTERIMAGE_TEST_CREDENTIALS").into_iter();
    let access = Access {
        user: credentials.next(),
        secret: credentials.next().map(Secret::new),
        ssh_options: lines("AFTERIMAGE_TEST_SSH"),
        ..Access::default()
    };
    let repository =
        Repository::open(Location::remote(url.to_str().unwrap(), access).unwrap(), PASSWORD).unwrap();
    let mut number = repository.backups(None).unwrap().last().map_or(0, |last| last.point.number.0);
    loop {
        number += 1;
        let disk = killed_disk(number);
        backup(&repository, &Disks::new(number, &[("a", &disk)]), None).unwrap();
    }
}

fn kill_writers(kind: ServerKind) {
    let folder = tempfile::tempdir().unwrap();
    let server = start(kind, &folder.path().join("server"));
    let repository = Repository::create(location(&server), PASSWORD).unwrap();
    let mut chance = Chance::new(u64::from(std::process::id()));
    for _ in 0..3 {
        let before = repository.backups(None).unwrap().len();
        let (user, secret) = server.credentials().unwrap_or_default();
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["a_writer_until_it_is_killed", "--exact", "--nocapture", "--test-threads=1"])
            .env("AFTERIMAGE_TEST_URL", server.url())
            .env("AFTERIMAGE_TEST_SSH", server.ssh_options().join("\n"))
            .env("AFTERIMAGE_TEST_CREDENTIALS", format!("{user}\n{secret}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while repository.backups(None).unwrap().len() == before {
            assert!(writer.try_wait().unwrap().is_none(), "the writer ended by itself");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(chance.below(700)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
        let report = repository.verify(&options, &|_| (), &AtomicBool::new(false)).unwrap();
        assert_eq!(report.damaged, []);
    }
    let backups = repository.backups(None).unwrap();
    assert!(backups.len() >= 3, "a backup that was made is not listed");
    let last = backups.last().unwrap();
    assert_restores(&repository, last, &[("a", &killed_disk(last.point.number.0))]);
    let next = last.point.number.0 + 1;
    let disk = killed_disk(next);
    let report = backup(&repository, &Disks::new(next, &[("a", &disk)]), Some(last)).unwrap();
    assert_restores(&repository, &report.backup, &[("a", &disk)]);
    restic_on(&server, &["check", "--read-data"]);
}

#[test]
fn killed_writers_to_a_rest_server() {
    kill_writers(ServerKind::Rest);
}

#[test]
fn killed_writers_to_an_s3_server() {
    kill_writers(ServerKind::S3);
}

#[test]
fn killed_writers_to_an_sftp_server() {
    kill_writers(ServerKind::Sftp);
}
