//! Policies: what is due is backed up once, also after the site was off; what was promised is reported; a file that cannot
//! be used is told of and stops nothing.

mod common;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{BURST_AT, DISKS, LONG, MIB, VM, World, path};
use jiff::Timestamp;
use rig::{LossyDisk, need, tool, wait_for};
use serde_json::Value;

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

impl World {
    fn replicated(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.write(1, Duration::from_millis(5));
        world.protect("2s", &["--points", "2"]);
        world.replicating();
        world
    }

    fn policy_file(&self, name: &str, text: &str) {
        let folder = self.head.dir().join("policies");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{name}.toml")), text).unwrap();
    }

    fn jobs(&self) -> Vec<Value> {
        self.head.ok(&["jobs"]).unwrap()["jobs"].as_array().unwrap().clone()
    }

    /// The jobs of a policy, once all are at their end and there are this many at the least.
    fn ended(&self, policy: &str, least: usize) -> Vec<Value> {
        self.ended_while(policy, least, || {})
    }

    /// The same; `look` is called again and again meanwhile.
    fn ended_while(&self, policy: &str, least: usize, mut look: impl FnMut()) -> Vec<Value> {
        wait_for("the jobs of a policy to end", LONG * 3, || {
            look();
            let jobs: Vec<Value> = self.jobs().into_iter().filter(|job| job["policy"] == policy).collect();
            let all = jobs.iter().all(|job| job["ended_at"].is_string());
            Ok((jobs.len() >= least && all).then_some(jobs))
        })
        .unwrap()
    }

    fn report(&self) -> Value {
        self.head.run(&["backup", "report"]).unwrap().json
    }

    fn selected(&self, policy: &str) -> u64 {
        let policies = self.head.ok(&["policy", "list"]).unwrap();
        let found =
            policies["policies"].as_array().unwrap().iter().find(|one| one["name"] == policy).cloned();
        found.map_or(0, |policy| policy["vms"].as_u64().unwrap_or_default())
    }
}

#[test]
fn a_promise_is_reported_from_the_first_day_to_the_day_it_is_broken() {
    let world = World::replicated(91);
    let made = world.head.ok(&["policy", "new", "nightly", "--vms", "we*", "--at", "23:30"]).unwrap();
    assert!(text(&made["path"]).ends_with("policies/nightly.toml"));
    assert_eq!(world.head.run(&["policy", "new", "nightly"]).unwrap().code(), Some("exists"));
    wait_for("the policy to be taken up", LONG, || Ok((world.selected("nightly") == 1).then_some(())))
        .unwrap();

    // Nothing yet, and time enough.
    let report = world.report();
    assert_eq!((report["kept"].as_u64(), report["broken"].as_u64()), (Some(1), Some(0)), "{report}");
    assert!(report["vms"][0]["backup"].is_null() && report["vms"][0]["promise_s"] == 26 * 3600);

    let begun = world.head.ok(&["policy", "run", "nightly"]).unwrap();
    assert_eq!(begun["jobs"].as_array().unwrap().len(), 1);
    let job = &world.ended("nightly", 1)[0];
    assert_eq!((text(&job["state"]), text(&job["repository"])), ("done", "local"), "{job}");
    let report = world.report();
    let vm = &report["vms"][0];
    assert_eq!(
        (text(&vm["standing"]), &vm["backup"], &vm["first_try"]),
        ("kept", &job["backup"], &vm["done"])
    );
    assert_eq!((text(&vm["peer"]), &report["all"]["done"]), ("branch", &Value::from(1)), "{report}");

    // The same for other eyes.
    let shown = |arguments: &[&str]| {
        let command = world.head.command(arguments).unwrap();
        let words = command.get_args().filter(|word| *word != "--json");
        let output = Command::new(command.get_program()).args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let csv = shown(&["backup", "report", "--csv"]);
    assert!(csv.lines().nth(1).unwrap().starts_with("web,branch,nightly,local,93600,kept,"), "{csv}");
    assert!(shown(&["backup", "report", "--html"]).contains("<tr class=\"kept\"><td>web</td>"));

    // A backup can't be a second old when the next one is a day away.
    world.policy_file(
        "strict",
        "vms = \"web\"\nschedule = \"0 0 1 1 *\"\nrepository = \"local\"\npromise = \"1s\"",
    );
    wait_for("the promise to be broken", LONG, || {
        let output = world.head.run(&["backup", "report"])?;
        let broken = output.json["broken"] == 1;
        assert_eq!(output.status, i32::from(broken), "a broken promise is an exit status");
        Ok(broken.then_some(()))
    })
    .unwrap();
    let report = world.report();
    assert_eq!(
        (text(&report["vms"][0]["policy"]), text(&report["vms"][0]["standing"])),
        ("strict", "broken")
    );
    assert!(text(&report["vms"][0]["why"]).contains("1 s is promised"), "{report}");

    // What its retention would do, and who is not selected by anything.
    let plan = world.head.ok(&["policy", "plan", "nightly", "web"]).unwrap();
    let backups = plan["vms"][0]["backups"].as_array().unwrap();
    assert_eq!(backups.len(), 1, "{plan}");
    assert!(
        backups[0]["kept"] == true && backups[0]["kept_by"].as_array().unwrap().contains(&"newest".into())
    );
    std::fs::remove_dir_all(world.head.dir().join("policies")).unwrap();
    assert_eq!(world.report()["without_policy"], serde_json::json!([VM]));
}

#[test]
fn what_was_due_while_the_site_was_off_is_caught_up_once() {
    let mut world = World::replicated(92);
    // Each minute; a second policy that cannot be used stops nothing.
    world.policy_file(
        "often",
        "tags = [\"gold\"]\nschedule = \"* * * * *\"\nrepository = \"local\"\nwindow = \"10s\"",
    );
    world.policy_file("bad", "vms = \"*\"\nschedule = \"at night\"\nrepository = \"local\"");
    std::fs::write(world.head.dir().join("tags.toml"), "gold = \"web\"\n").unwrap();
    wait_for("the VM to be selected", LONG, || Ok((world.selected("often") == 1).then_some(()))).unwrap();
    let policies = world.head.ok(&["policy", "list"]).unwrap();
    assert!(text(&policies["policies"][0]["error"]).contains("at night"), "{policies}");
    assert_eq!(world.head.run(&["policy", "show", "bad"]).unwrap().code(), Some("no-such-policy"));
    let before = world.jobs().len();
    world.head.kill();

    // Off over the beginning of a minute, and past the window that it opened.
    let second = |now: Timestamp| now.as_second().rem_euclid(60);
    let minute = Timestamp::now().as_second() / 60;
    wait_for("a minute to begin, and its window to end", LONG * 3, || {
        let now = Timestamp::now();
        Ok((now.as_second() / 60 > minute && second(now) > 12).then_some(()))
    })
    .unwrap();
    world.head.serve().unwrap();
    world.replicating();
    let jobs = world.ended("often", before + 1);
    let made = |job: &Value| text(&job["made_at"]).parse::<Timestamp>().unwrap();
    let minutes: BTreeSet<i64> = jobs.iter().map(|job| made(job).as_second() / 60).collect();
    assert_eq!(minutes.len(), jobs.len(), "no minute is seen to twice: {jobs:?}");
    let first = jobs.iter().map(made).min().unwrap();
    assert!(first.as_second() / 60 > minute, "{jobs:?}");
    let report = world.report();
    let vm = report["vms"].as_array().unwrap().iter().find(|vm| vm["policy"] == "often").cloned().unwrap();
    assert_eq!(vm["done"], vm["ended"], "{vm}");
    if second(first) >= 10 {
        assert_eq!(
            vm["in_window"].as_u64().unwrap() + 1,
            vm["done"].as_u64().unwrap(),
            "it was caught up: {vm}"
        );
    }
    let events = world.head.ok(&["events"]).unwrap();
    let told = events["events"].as_array().unwrap().iter().filter(|event| event["kind"] == "policy");
    assert!(
        told.clone().any(|event| text(&event["message"]).contains("policy bad cannot be used")),
        "{events}"
    );
}

/// A disk so slow to be written at random that folding a log in takes longer than the next one takes to come: there is always
/// an apply that runs. Retrying alone would meet it again and again.
#[test]
fn an_apply_that_never_ends_starves_no_backup() {
    let folder = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    let (at, backing) = (folder.path().join("slow"), folder.path().join("backing"));
    for folder in [&at, &backing] {
        std::fs::create_dir(folder).unwrap();
    }
    let mut disk = LossyDisk::mount(&at, &backing).unwrap();
    {
        let mut world = World::with_head_in(93, Some(disk.path()));
        world.write(1, Duration::from_millis(5));
        world.protect("1s", &[]);
        world.replicating();
        disk.order("faults slow=8000").unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (stopped, daemon) = (&stop, &world.daemon);
            scope.spawn(move || {
                for seed in (0..).take_while(|_| !stopped.load(Ordering::Relaxed)) {
                    rig::fill(daemon, DISKS[1].0, BURST_AT, 48 * MIB, seed).unwrap();
                    std::thread::sleep(Duration::from_millis(500));
                }
            });
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.is_never_idle()));
            stop.store(true, Ordering::Relaxed);
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
        });
        disk.order("faults slow=0").unwrap();
    }
}

impl World {
    /// All views, while an apply always runs.
    fn is_never_idle(&self) {
        self.head.wait_vm(VM, "an apply", LONG, |vm| vm["apply"] == "running").unwrap();
        let (mut looks, mut busy) = (0, 0);
        for view in ["strict", "hold", "pinned"] {
            let text = format!(
                "vms = \"web\"\nschedule = \"0 0 1 1 *\"\nwindow = \"10m\"\nview = \"{view}\"\nrepository = \"local\"\n[retry]\ndelay-max = \"3s\""
            );
            self.policy_file(view, &text);
            for round in 1..=2 {
                self.head.ok(&["policy", "run", view]).unwrap();
                let jobs = self.ended_while(view, round, || {
                    looks += 1;
                    busy += u32::from(self.head.vm(VM).is_ok_and(|vm| vm["apply"] == "running"));
                });
                assert!(jobs.iter().all(|job| job["state"] == "done"), "{view}: {jobs:?}");
            }
        }
        let report = self.report();
        let of = |view: &str| {
            report["vms"].as_array().unwrap().iter().find(|vm| vm["policy"] == view).cloned().unwrap()
        };
        for view in ["strict", "hold", "pinned"] {
            let vm = of(view);
            assert_eq!((vm["done"].as_u64(), vm["in_window"].as_u64()), (Some(2), Some(2)), "{vm}");
        }
        let collisions = |view: &str| of(view)["setbacks"]["apply-in-progress"].as_u64().unwrap_or_default();
        println!(
            "applies ran at {busy} of {looks} looks; collisions: strict {}, hold {}",
            collisions("strict"),
            collisions("hold")
        );
        assert!(
            collisions("strict") + collisions("hold") > 0,
            "the applies are not slow enough to be met: {report}"
        );
        assert_eq!(collisions("pinned"), 0, "{report}");
    }
}

#[test]
fn what_no_rule_keeps_is_forgotten_and_every_backup_is_copied() {
    need("restic", "restic").unwrap();
    let mut world = World::new(94);
    let copies = world.dir.path().join("copies");
    let config = world.head.dir().join("config.toml");
    let before = std::fs::read_to_string(&config).unwrap();
    let more =
        format!("\n[repositories.copies]\npath = {copies:?}\npassword-file = \"repository.password\"\n");
    std::fs::write(&config, before + &more).unwrap();
    world.head.stop();
    world.head.ok(&["repository", "init", "--repository", "copies"]).unwrap();
    world.head.serve().unwrap();
    world.write(1, Duration::from_millis(5));
    world.protect("2s", &["--points", "2"]);
    world.replicating();
    // A person's own backup is nothing that a policy forgets.
    let by_hand = world.backup(&[]).json["backup"].clone();
    world.policy_file(
        "short",
        "vms = \"web\"\nschedule = \"0 0 1 1 *\"\nrepository = \"local\"\ncopies = [\"copies\"]\n[retention]\nlast = 2",
    );
    let listed = |repository: &str| -> Vec<Value> {
        let listed = world.head.ok(&["backups", "--repository", repository]).unwrap();
        listed["backups"].as_array().unwrap().iter().map(|backup| backup["id"].clone()).collect()
    };
    let mut made = Vec::new();
    for round in 1..=4 {
        world.head.ok(&["policy", "run", "short"]).unwrap();
        let jobs = world.ended("short", round);
        made.push(jobs[0]["backup"].clone());
        wait_for("the copy of a backup", LONG, || {
            Ok((!listed("copies").is_empty() && listed("copies").len() >= round.min(2)).then_some(()))
        })
        .unwrap();
    }
    wait_for("old backups to be forgotten", LONG, || {
        Ok((listed("local").len() == 3 && listed("copies").len() == 2).then_some(()))
    })
    .unwrap();
    let left = listed("local");
    assert!(
        left.contains(&by_hand) && left.contains(&made[2]) && left.contains(&made[3]),
        "{left:?} of {made:?}"
    );
    let plan = world.head.ok(&["policy", "plan", "short"]).unwrap();
    let kept: Vec<bool> =
        plan["vms"][0]["backups"].as_array().unwrap().iter().map(|one| one["kept"] == true).collect();
    assert_eq!(kept, [true; 3], "{plan}");

    // The copy is the same moment, restored from the second repository alone; restic finds both whole.
    let newest = listed("copies").pop().unwrap();
    let to = world.dir.path().join("from-copy");
    world
        .head
        .ok(&["restore", VM, "--backup", text(&newest), "--repository", "copies", "--to", path(&to)])
        .unwrap();
    let images: Vec<_> = DISKS.iter().map(|(disk, _)| to.join(format!("{disk}.raw"))).collect();
    world.state(&images);
    let password = world.head.dir().join("repository.password");
    for repository in [&copies, &world.head.dir().join("repository")] {
        tool(Command::new("restic").args([
            "-q",
            "check",
            "--no-cache",
            "-r",
            path(repository),
            "-p",
            path(&password),
        ]))
        .unwrap();
    }
}

/// Nothing arrives while it reads, so nothing is folded in: the flat files are quiet at the first try, and newer than retention
/// alone would have made them. What waited at the VM's site comes afterwards.
#[test]
fn a_backup_that_pauses_replication_meets_no_apply_and_lets_it_go_on() {
    let world = World::replicated(95);
    for seed in 1..=3 {
        world.burst(96, seed);
        let backup = world.backup(&["--view", "hold", "--pause", "--no-retry"]);
        assert_eq!(backup.status, 0, "{backup:?}");
        world.state(&world.restore(text(&backup.json["backup"])));
        let before = world.head.vm(VM).unwrap()["received"].as_u64();
        world.head.wait_vm(VM, "more logs", LONG, |vm| vm["received"].as_u64() > before).unwrap();
        assert_ne!(world.head.vm(VM).unwrap()["health"], "critical");
    }
}
