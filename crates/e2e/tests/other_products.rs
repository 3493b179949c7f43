//! Other backup products read a held replica: restic and borg back it up, and both restore to the held point exactly.
//! One that reads on when its lease has run out is told that its backup must be thrown away.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, LONG, VM, World, path};
use e2e::foreign::are_alike;
use rig::{need, tool, wait_for};
use serde_json::Value;

/// Where programs are.
const PROGRAMS: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";
const QUICK: Duration = Duration::from_millis(2);

/// A replica that is held, with a backup of ours of the same point to compare with.
struct Held {
    id: String,
    files: Vec<PathBuf>,
    /// What the point's disks are, by our own restore of our own backup.
    reference: Vec<PathBuf>,
}

fn hold(world: &World, lease: &str) -> Value {
    wait_for("a hold", LONG, || {
        let output = world.head.run(&["hold", VM, "--for", lease])?;
        assert!(matches!(output.status, 0 | 75), "{output:?}");
        Ok((output.status == 0).then_some(output.json))
    })
    .unwrap()
}

fn held(world: &World) -> Held {
    let hold = hold(world, "10m");
    let disks = hold["disks"].as_array().unwrap();
    let file = |name: &str| {
        let disk = disks.iter().find(|disk| disk["name"] == name).unwrap();
        PathBuf::from(disk["path"].as_str().unwrap())
    };
    let point = hold["point"].as_str().unwrap();
    let backup = world.head.ok(&["backup", VM, "--point", point]).unwrap();
    Held {
        id: hold["hold"].as_str().unwrap().to_owned(),
        files: DISKS.iter().map(|(name, _)| file(name)).collect(),
        reference: world.restore(backup["backup"].as_str().unwrap()),
    }
}

fn assert_restored(held: &Held, root: &Path) {
    for (file, reference) in held.files.iter().zip(&held.reference) {
        let restored = root.join(file.strip_prefix("/").unwrap());
        assert!(
            are_alike(("raw", path(&restored)), ("raw", path(reference))).unwrap(),
            "{} is not the held point",
            restored.display()
        );
    }
}

#[test]
fn restic_and_borg_back_up_a_held_replica_while_it_is_replicated() {
    need("restic", "restic").unwrap();
    need("borg", "borgbackup").unwrap();
    let mut world = World::new(71);
    world.write(1, QUICK);
    world.burst(16, 3);
    world.protect("1s", &[]);
    world.replicating();
    let held = held(&world);
    let received = world.head.vm(VM).unwrap()["received"].as_u64().unwrap();
    let dir = world.dir.path();
    let [restic_repository, borg_repository] = ["restic", "borg"].map(|name| dir.join(name));

    let restic = |arguments: &[&str]| {
        let mut command = Command::new("restic");
        command.args(["--no-cache", "-r"]).arg(&restic_repository).args(arguments);
        tool(command.env("RESTIC_PASSWORD", "x").env("HOME", dir)).unwrap()
    };
    let borg = |folder: &Path, arguments: &[&str]| {
        let mut command = Command::new("borg");
        command.args(arguments).current_dir(folder).env("BORG_BASE_DIR", dir.join("borg-base"));
        tool(command.env("BORG_REPO", &borg_repository)).unwrap()
    };
    let files: Vec<&str> = held.files.iter().map(|file| path(file)).collect();
    restic(&["init"]);
    restic(&[&["backup"], &files[..]].concat());
    borg(dir, &["init", "--encryption=none"]);
    borg(dir, &[&["create", "--sparse", "::held"], &files[..]].concat());
    // Logs went on arriving all the while.
    world.head.wait_vm(VM, "more logs", LONG, |vm| vm["received"].as_u64() > Some(received)).unwrap();
    let released = world.head.ok(&["release", &held.id]).unwrap();
    assert_eq!(released["valid"], true, "{released}");

    let [by_restic, by_borg] = ["by-restic", "by-borg"].map(|name| dir.join(name));
    restic(&["restore", "latest", "--target", path(&by_restic)]);
    assert_restored(&held, &by_restic);
    std::fs::create_dir(&by_borg).unwrap();
    borg(&by_borg, &["extract", "--sparse", "::held"]);
    assert_restored(&held, &by_borg);
    world.state(&held.reference);
}

/// Runs one of the project's examples.
fn example(world: &World, name: &str, lease: &str, variables: &[(&str, &Path)]) -> (bool, String) {
    need("jq", "jq").unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples").join(name);
    let program = rig::this_program().unwrap();
    let afterimage = format!("{} --dir {}", program.display(), world.head.dir().display());
    let mut command = Command::new("sh");
    command.arg(script).arg(VM).env("AFTERIMAGE", afterimage).env("LEASE", lease);
    command.env("HOME", world.dir.path()).env("RESTIC_PASSWORD", "x").envs(variables.iter().copied());
    // Refused for now: it comes again, as a timer would.
    wait_for("the example", LONG, || {
        let output = command.output().map_err(|error| rig::Trouble(error.to_string()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code() != Some(75)).then_some((output.status.success(), said)))
    })
    .unwrap()
}

#[test]
fn the_examples_keep_a_backup_only_if_the_lease_has_lasted() {
    need("restic", "restic").unwrap();
    need("borg", "borgbackup").unwrap();
    let mut world = World::new(73);
    world.write(1, QUICK);
    world.burst(64, 3);
    world.protect("1s", &[]);
    world.replicating();
    let dir = world.dir.path().to_owned();
    let restic = [("RESTIC_REPOSITORY", dir.join("restic"))];
    let borg = [("BORG_REPO", dir.join("borg")), ("BORG_BASE_DIR", dir.join("borg-base"))];
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env("HOME", &dir).env("RESTIC_PASSWORD", "x");
        tool(command.envs(restic.clone()).envs(borg.clone())).unwrap()
    };
    run("restic", &["init"]);
    run("borg", &["init", "--encryption=none"]);
    let backups = || {
        let listed: Value = serde_json::from_str(&run("restic", &["snapshots", "--json"])).unwrap();
        (listed.as_array().unwrap().len(), run("borg", &["list", "--short"]).lines().count())
    };
    for (lease, kept) in [("10m", (1, 1)), ("1s", (1, 1))] {
        let path = if lease == "1s" { slowly(&dir) } else { PROGRAMS.into() };
        for (name, of) in [("hold-restic", &restic[..]), ("hold-borg", &borg[..])] {
            let mut variables: Vec<(&str, &Path)> =
                of.iter().map(|(name, path)| (*name, path.as_path())).collect();
            variables.push(("PATH", &path));
            let (succeeded, said) = example(&world, name, lease, &variables);
            assert_eq!(succeeded, lease == "10m", "{name}: {said}");
        }
        assert_eq!(backups(), kept);
    }
}

/// A path on which restic and borg take three seconds longer.
fn slowly(dir: &Path) -> PathBuf {
    let bin = dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    for program in ["restic", "borg"] {
        let text = format!(
            "#!/bin/sh\n/usr/bin/{program} \"$@\"\nstatus=$?\ncase $1 in backup|create) sleep 3;; esac\nexit $status\n"
        );
        let path = bin.join(program);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    format!("{}:{PROGRAMS}", bin.display()).into()
}

#[test]
fn whoever_reads_on_when_the_lease_has_run_out_is_told_to_throw_the_backup_away() {
    let mut world = World::new(72);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    let hold = hold(&world, "2s");
    let id = hold["hold"].as_str().unwrap();
    wait_for("the lease to end and logs to be folded in", LONG, || {
        let vm = world.head.vm(VM)?;
        Ok((vm["applied"].as_u64() > hold["number"].as_u64()).then_some(()))
    })
    .unwrap();
    let refused = world.head.run(&["release", id]).unwrap();
    assert_eq!((refused.status, refused.code()), (1, Some("hold")), "{refused:?}");
    let said = refused.json["error"]["message"].as_str().unwrap();
    assert!(said.contains("throw away"), "{said}");
}
