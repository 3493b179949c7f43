//! Repositories on servers, with the real programs from end to end: backups of a replica to a REST, an S3 and an SFTP
//! server, a site and servers that are killed in the middle, copies, passwords and prunes.

mod common;

use std::io::Write as _;
use std::time::Duration;

use common::{LONG, VM, World};
use rig::{RepositoryServer, ServerKind, wait_for};
use serde_json::Value;

const KINDS: [(&str, ServerKind); 3] =
    [("rest", ServerKind::Rest), ("s3", ServerKind::S3), ("sftp", ServerKind::Sftp)];

/// What the config says of a repository on this server; its secrets are in files and variables.
fn settings(name: &str, server: &RepositoryServer) -> String {
    let mut text = format!(
        "\n[repositories.{name}]\nurl = \"{}\"\npassword-command = [\"echo\", \"sesame-{name}\"]\n",
        server.url()
    );
    if let Some((user, _)) = server.credentials() {
        text.push_str(&format!("user = \"{user}\"\nsecret-file = \"{name}.secret\"\n"));
    }
    text.push_str(&format!("ssh-options = {:?}\n", server.ssh_options()));
    text
}

impl World {
    /// Restarts the replica's site with more in its config.
    fn configure_head(&mut self, more: &str) {
        self.head.stop();
        let path = self.head.dir().join("config.toml");
        let mut config = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        config.write_all(more.as_bytes()).unwrap();
        self.head.serve().unwrap();
    }

    fn secret(&self, name: &str, secret: &str) {
        std::fs::write(self.head.dir().join(format!("{name}.secret")), secret).unwrap();
    }

    fn backup_to(&self, name: &str) -> Value {
        self.head.ok(&["backup", VM, "--repository", name]).unwrap()
    }

    fn listed(&self, name: &str) -> usize {
        self.head.ok(&["backups", "--repository", name]).unwrap()["backups"].as_array().unwrap().len()
    }

    /// Every byte of every backup there is as it was written.
    fn is_well(&self, name: &str) {
        let check = self.head.ok(&["repository", "check", "--read-data", "--repository", name]).unwrap();
        assert_eq!(check["backups"]["damaged"].as_array().unwrap().len(), 0, "{check}");
    }
}

#[test]
fn a_replica_is_backed_up_to_servers_that_come_and_go() {
    let mut world = World::new(81);
    let mut servers: Vec<(&str, RepositoryServer)> = KINDS
        .iter()
        .map(|(name, kind)| {
            (*name, RepositoryServer::start(*kind, &world.dir.path().join(name), None).unwrap())
        })
        .collect();
    world.write(1, Duration::from_millis(2));
    world.protect("15m", &[]);
    world.replicating();
    world.quiet();
    world.branch.ok(&["sync", VM]).unwrap();
    let more: String = servers.iter().map(|(name, server)| settings(name, server)).collect();
    for (name, server) in &servers {
        world.secret(name, server.credentials().map_or("", |(_, secret)| secret));
    }
    world.configure_head(&more);
    for (name, _) in &servers {
        let missing = world.head.run(&["backup", VM, "--repository", name, "--no-retry"]).unwrap();
        assert!(
            missing.status == 1 && missing.json.to_string().contains("there is no repository"),
            "{missing:?}"
        );
        world.head.ok(&["repository", "init", "--repository", name]).unwrap();
        world.backup_to(name);
        world.is_well(name);
    }
    wrong_secrets_are_told(&world);
    a_server_that_is_gone_is_told(&world, &mut servers[0].1);
    a_site_that_is_killed_goes_on(&mut world);
    copies_passwords_and_prunes(&world);
}

fn wrong_secrets_are_told(world: &World) {
    world.secret("rest", "not-the-secret");
    let refused = world.head.run(&["backup", VM, "--repository", "rest", "--no-retry"]).unwrap();
    assert_eq!((refused.status, refused.code()), (1, Some("repository")), "{refused:?}");
    let said = refused.json.to_string();
    assert!(said.contains("repository rest") && said.contains("credentials"), "{said}");
    assert!(!said.contains("not-the-secret") && !world.head.log().contains("not-the-secret"));
    world.secret("rest", "open-sesame");
}

fn a_server_that_is_gone_is_told(world: &World, server: &mut RepositoryServer) {
    server.kill();
    let refused = world.head.run(&["backup", VM, "--repository", "rest", "--no-retry"]).unwrap();
    assert_eq!((refused.status, refused.code()), (75, Some("repository")), "{refused:?}");
    let listed = world.head.ok(&["repository", "list"]).unwrap();
    let rest = listed["repositories"].as_array().unwrap().iter().find(|one| one["name"] == "rest").unwrap();
    assert_eq!(rest["error"]["transient"], true, "{listed}");
    server.start_again().unwrap();
    world.backup_to("rest");
    world.is_well("rest");
}

/// Killed while packs go to a server; the job goes on when the site is there again.
fn a_site_that_is_killed_goes_on(world: &mut World) {
    world.burst(96, 5);
    world.branch.ok(&["sync", VM]).unwrap();
    let before = world.listed("sftp");
    let folder = world.dir.path().join("sftp/files/data");
    let packs = || {
        let folders = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.map(|folder| std::fs::read_dir(folder.path()).map_or(0, Iterator::count)).sum::<usize>()
    };
    let there = packs();
    let mut asked = world.head.command(&["backup", VM, "--repository", "sftp"]).unwrap();
    let mut asking =
        asked.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    wait_for("a pack at the server", LONG, || Ok((packs() > there).then_some(()))).unwrap();
    world.head.kill();
    asking.wait().unwrap();
    world.is_well("sftp");
    world.head.serve().unwrap();
    wait_for("the job to go on", LONG, || Ok((world.listed("sftp") > before).then_some(()))).unwrap();
    world.is_well("sftp");
}

fn copies_passwords_and_prunes(world: &World) {
    let copied = world.head.ok(&["repository", "copy", "--from", "sftp", "--to", "s3"]).unwrap();
    assert!(!copied["copied"].as_array().unwrap().is_empty(), "{copied}");
    let again = world.head.ok(&["repository", "copy", "--from", "sftp", "--to", "s3"]).unwrap();
    assert_eq!((&again["copied"], &again["bytes_read"]), (&serde_json::json!([]), &serde_json::json!(0)));
    world.is_well("s3");

    world.backup_to("local");
    let new = world.dir.path().join("new");
    std::fs::write(&new, "a new one\n").unwrap();
    world.head.ok(&["repository", "password", "--new", new.to_str().unwrap()]).unwrap();
    let keys = world.head.ok(&["repository", "key", "list"]).unwrap();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 1);
    let file = std::fs::read_to_string(world.head.dir().join("repository.password")).unwrap();
    assert_eq!(file, "a new one");
    world.backup_to("local");

    let backups = world.head.ok(&["backups"]).unwrap();
    let oldest = backups["backups"][0]["id"].as_str().unwrap();
    let pruned = world.head.ok(&["repository", "prune", "--forget", &oldest[..12], "--wait", "30s"]).unwrap();
    assert_eq!(pruned["forgotten"][0], oldest, "{pruned}");
    world.is_well("local");
    assert_eq!(world.head.ok(&["repository", "unlock"]).unwrap()["removed"], serde_json::json!([]));
}
