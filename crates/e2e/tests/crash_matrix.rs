//! The crash matrix: at every durable step of the product a real process kills itself; it is started again,
//! and nothing that was acknowledged is lost, every point and every backup is a moment of the VM, the next cycle
//! and the next backup succeed, and nothing is left over.
//!
//! The matrix is made from `steps::ALL`, so that a new step is in it or fails it. On a lossy disk (the program
//! `afterimage-lossy`) the power goes with the process: what had not been synced is lost in part, by a seed. Of that a
//! sample runs here, all of it in `make soak`.
//!
//! `AFTERIMAGE_CRASH=replica::receive` runs the steps that begin so; `AFTERIMAGE_CRASH_SEEDS=20` takes so many
//! seeds for each; `AFTERIMAGE_CRASH_TABLE=FILE` writes the table (docs/crash-matrix.md) there.

mod common;
mod crash;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use common::{VM, path};
use crash::{Case, Drive, Expect, Hours, Pair, Side, await_death, cases, crash_move};
use rig::{LossyDisk, Result, Site, Trouble};

/// What came of one line.
struct Row {
    case: Case,
    power: Option<String>,
    outcome: Result<()>,
    seconds: f64,
}

/// Runs one line; `work` says what was lost, if the power went.
fn run_row(case: &Case, power: Option<u64>, work: impl FnOnce(&mut Option<String>) -> Result<()>) -> Row {
    let (started, mut lost) = (Instant::now(), None);
    let outcome = work(&mut lost)
        .map_err(|Trouble(text)| Trouble(format!("{} (power {power:?}): {text}", case.fail_at())));
    let seconds = started.elapsed().as_secs_f64();
    println!("{:6.1} s  {}  {}", seconds, case.fail_at(), if outcome.is_ok() { "ok" } else { "FAILED" });
    Row { case: *case, power: lost, outcome, seconds }
}

/// Steps that share two sites; several such groups run side by side.
type Group = Vec<Case>;

fn wanted(case: &Case) -> bool {
    std::env::var("AFTERIMAGE_CRASH").map_or(true, |begins| case.step.starts_with(&begins))
}

fn seeds(otherwise: u64) -> u64 {
    std::env::var("AFTERIMAGE_CRASH_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Groups of about the same length, so that two at a time are busy to the end.
fn groups(cases: Vec<Case>, count: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = vec![Vec::new(); count];
    for (place, case) in cases.into_iter().enumerate() {
        groups[place % count].push(case);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// Runs groups, two at a time; all rows, in the order of the list.
fn run(groups: Vec<Group>, power: Option<u64>) -> Vec<Row> {
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(group) = groups.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let done = run_group(group, power);
                    rows.lock().unwrap().extend(done);
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|row| (row.case.step, row.case.nth));
    rows
}

fn run_group(group: &[Case], power: Option<u64>) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut pair = None;
    for case in group {
        let seed = power.map(|seed| seed_of(case).wrapping_add(seed));
        let row = run_row(case, seed, |lost| {
            sites(&mut pair, case, seed.is_some()).and_then(|pair| crash(pair, case, seed, lost))
        });
        if row.outcome.is_err() {
            pair = None; // the next one starts afresh
        }
        rows.push(row);
    }
    if let Some(pair) = pair
        && let Err(trouble) = pair.check_all_backups()
        && let Some(last) = rows.last_mut()
    {
        last.outcome = Err(trouble);
    }
    rows
}

/// A number of its own for each line.
fn seed_of(case: &Case) -> u64 {
    case.fail_at().bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)))
}

fn sites<'a>(pair: &'a mut Option<Pair>, case: &Case, lossy: bool) -> Result<&'a mut Pair> {
    if pair.is_none() {
        *pair = Some(Pair::new(seed_of(case), lossy, "0")?);
    }
    Ok(pair.as_mut().expect("it was just set"))
}

/// One line: dies at the step, loses the power if it is to, starts again, checks.
fn crash(pair: &mut Pair, case: &Case, power: Option<u64>, lost: &mut Option<String>) -> Result<()> {
    let Case { side, drive, .. } = *case;
    drive.prepare(pair)?;
    let expect = pair.expect()?;
    if side == Side::Command {
        return crash_restore(pair, case, &expect);
    }
    pair.site(side).kill();
    drive.spoil(pair)?;
    let fail_at = case.fail_at();
    let variables = [(steps::FAIL_AT, fail_at.as_str())];
    let begun = if drive.dies_at_start() {
        pair.site(side).start(&variables).map(|()| None)
    } else {
        pair.site(side).serve_with(&variables).and_then(|()| drive.begin(pair))
    };
    // A site that starts goes on with what it was at, and may come to the step by that.
    let begun = match begun {
        Err(trouble) if pair.site(side).died_of().is_none() => return Err(trouble),
        begun => begun.ok().flatten(),
    };
    await_death(pair.site(side), &fail_at)?;
    drop(begun);
    drive.clear(pair)?;
    if let Some(seed) = power {
        *lost = Some(pair.lose_power(side, seed)?);
    }
    pair.site(side).serve()?;
    drive.mend(pair)?;
    let resync = drive.needs_resync() || drive.protects_anew() || (power.is_some() && side == Side::Branch);
    pair.check(&expect, resync, touches_backups(case))
}

fn touches_backups(case: &Case) -> bool {
    matches!(
        case.drive,
        Drive::Backup | Drive::BackupToNewFolders | Drive::Restore | Drive::RestoreVhdx | Drive::RestoreOnto
    )
}

/// A restore is a process of its own.
fn crash_restore(pair: &mut Pair, case: &Case, expect: &Expect) -> Result<()> {
    let to = pair.dir.path().join("restored");
    let format = if case.drive == Drive::RestoreVhdx { "vhdx" } else { "raw" };
    let whole = ["restore", VM, "--backup", "latest", "--overwrite"];
    let (system, data) = (to.join("system.raw"), to.join("data.raw"));
    let onto = [&system, &data].map(|path| format!("{}={}", name_of(path), path.display()));
    let where_to = match case.drive {
        Drive::RestoreOnto => ["--onto", onto[0].as_str(), "--onto", onto[1].as_str()],
        _ => ["--to", path(&to), "--format", format],
    };
    let arguments = [&whole[..], &where_to[..]].concat();
    std::fs::create_dir_all(&to).map_err(|error| Trouble(error.to_string()))?;
    let status = pair.head.command(&arguments)?.env(steps::FAIL_AT, case.fail_at()).output();
    let died_of = status.map_err(|error| Trouble(error.to_string()))?.status.signal();
    if died_of != Some(9) {
        return Err(Trouble(format!("the restore never came to {}", case.step)));
    }
    pair.head.ok(&arguments)?;
    let left = std::fs::read_dir(&to).map_err(|error| Trouble(error.to_string()))?.flatten();
    let mut names: Vec<String> = left.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    if names != [format!("data.{format}"), format!("system.{format}")] {
        return Err(Trouble(format!("left over after a restore: {names:?}")));
    }
    std::fs::remove_dir_all(&to).map_err(|error| Trouble(error.to_string()))?;
    pair.check(expect, false, true)
}

/// A disk's name, from its file's.
fn name_of(path: &Path) -> &str {
    path.file_stem().and_then(|name| name.to_str()).expect("paths of tests are text")
}

/// Making a site: whatever it was cut off at, it can be made, and runs.
fn crash_init(case: &Case, power: Option<u64>, lost: &mut Option<String>) -> Result<()> {
    let io = |error: std::io::Error| Trouble(error.to_string());
    let dir = tempfile::tempdir().map_err(io)?;
    let mut disk =
        power.map(|_| LossyDisk::mount(&dir.path().join("on"), &dir.path().join("disk"))).transpose()?;
    let home = dir.path().join("on/deep/deeper");
    let mut site = Site::at(&home, "site")?;
    site.keep_log_at(dir.path().join("log"));
    let arguments = ["init", "--name", "site", "--listen", site.address()].map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let status = site.command(&arguments)?.env(steps::FAIL_AT, case.fail_at()).output().map_err(io)?.status;
    if status.signal() != Some(9) {
        return Err(Trouble(format!("init never came to {}: {status}", case.step)));
    }
    if let (Some(seed), Some(disk)) = (power, &mut disk) {
        *lost = Some(disk.lose_power(seed)?);
    }
    if !site.dir().join("config.toml").exists() {
        site.ok(&arguments)?;
    }
    site.serve()?;
    site.ok(&["backups"])?;
    site.kill();
    let partial = site.dir().join("repository.partial");
    if partial.exists() { Err(Trouble(format!("left over: {}", partial.display()))) } else { Ok(()) }
}

fn run_inits(cases: &[Case], power: Option<u64>) -> Vec<Row> {
    cases.iter().map(|case| run_row(case, power, |lost| crash_init(case, power, lost))).collect()
}

fn run_moves(cases: &[Case], power: Option<u64>) -> Vec<Row> {
    let seed = |case: &Case| power.map(|power| seed_of(case).wrapping_add(power));
    cases.iter().map(|case| run_row(case, seed(case), |lost| crash_move(case, seed(case), lost))).collect()
}

/// One after the other on the same sites.
fn run_hours(cases: &[Case], power: Option<u64>) -> Vec<Row> {
    let mut hours = None;
    let run = |case: &Case| {
        run_row(case, power, |lost| {
            let mut sites = hours.take().map_or_else(|| Hours::new(power.is_some()), Ok)?;
            sites.crash(case, power, lost)?;
            hours = Some(sites);
            Ok(())
        })
    };
    cases.iter().map(run).collect()
}

/// All of the matrix that is wanted, once.
fn run_all(mut wanted_cases: Vec<Case>, power: Option<u64>) -> Vec<Row> {
    wanted_cases.retain(wanted);
    let (inits, rest): (Vec<Case>, Vec<Case>) =
        wanted_cases.into_iter().partition(|c| c.drive == Drive::Init);
    let (hours, rest): (Vec<Case>, Vec<Case>) = rest.into_iter().partition(|c| c.drive == Drive::Hours);
    let (moves, rest): (Vec<Case>, Vec<Case>) = rest.into_iter().partition(|c| c.drive == Drive::Move);
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut rows = run_inits(&inits, power);
            rows.extend(run_hours(&hours, power));
            rows.extend(run_moves(&moves, power));
            rows
        });
        let mut rows = run(groups(rest, 6), power);
        rows.extend(others.join().expect("no panic"));
        rows.sort_by_key(|row| (row.case.step, row.case.nth));
        rows
    })
}

/// What stands above the table in docs/crash-matrix.md.
const PREFACE: &str = "\
# The crash matrix

At each step at which the product makes something durable, and right before it, a real process kills itself with
SIGKILL (`crates/steps`); it is started again without that, and then:

* every log that the primary knew to be acknowledged is there, and no resynchronization was needed (but where a
  base or a disk was changed on purpose);
* every recovery point, over all disks together, is a moment that the guest took its disks through;
* every backup that was listed is listed, verifies, and what it restores is such a moment; none that was cut off is
  listed, and its job comes home by itself;
* the next cycle and the next backup succeed;
* nothing is left over: bitmaps, jobs, exports and nodes in QEMU, scratch, partial and temporary files, locks, folders.

The table has every step of `steps::ALL`: a test holds that list against the sources, and the sources against the rule
that a sync, a rename or a commit has a step on either side; the matrix fails on a step that it does not know how to reach,
and on one that is not reached. It is made by

```console
$ AFTERIMAGE_CRASH_TABLE=docs/crash-matrix.md cargo test -p afterimage-e2e --test crash_matrix a_kill
```

In `make test` the process alone dies at each step; at a sample of them the power goes with it, in `make soak` at each, with
several seeds: the sites' folders are then on a file system of ours (`crates/lossy`) that takes back a part of what was not
synced: blocks, torn at 512 bytes, lengths, names. One step by itself, with twenty seeds:

```console
$ AFTERIMAGE_CRASH=replica::receive::committed AFTERIMAGE_CRASH_SEEDS=20 \\
      cargo test -p afterimage-e2e --test crash_matrix at_any -- --include-ignored --nocapture
```

";

fn table(rows: &[Row]) -> String {
    let mut text = String::from("| step | who dies | what is done | outcome |\n|---|---|---|---|\n");
    for row in rows {
        let outcome = if row.outcome.is_ok() { "holds" } else { "**broken**" };
        let who = match row.case.side {
            Side::Head => "the replica's site",
            Side::Branch => "the primary's site",
            Side::Command => "the command",
        };
        let _ =
            writeln!(text, "| `{}` | {who} | {} | {outcome} |", row.case.fail_at(), row.case.drive.words());
    }
    text
}

/// Prints the table, and panics with everything that failed.
fn report(rows: &[Row]) {
    print!("{}", table(rows));
    let seconds: f64 = rows.iter().map(|row| row.seconds).sum();
    println!("{} steps, {seconds:.0} s of work", rows.len());
    for row in rows.iter().filter(|row| row.power.is_some()) {
        println!("{}: {}", row.case.fail_at(), row.power.as_deref().unwrap_or_default());
    }
    if let Ok(file) = std::env::var("AFTERIMAGE_CRASH_TABLE") {
        std::fs::write(file, PREFACE.to_owned() + &table(rows)).expect("the table can be written");
    }
    let failed: Vec<String> =
        rows.iter().filter_map(|row| row.outcome.as_ref().err().map(|Trouble(text)| text.clone())).collect();
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), rows.len(), failed.join("\n\n"));
    assert!(!rows.is_empty(), "AFTERIMAGE_CRASH fits no step");
}

#[test]
fn a_kill_at_every_step_loses_nothing() {
    report(&run_all(cases(), None));
}

/// Where the most is to be lost: a log that arrives, an apply, a backup.
fn sample() -> Vec<Case> {
    let begins = [
        "replica::receive::synced",
        "replica::receive::folders",
        "replica::receive::committed",
        "replica::apply::mapped",
        "replica::apply::written",
        "replica::apply::committed",
        "repository::pack::written",
        "repository::index::written",
        "repository::listing::written",
    ];
    cases().into_iter().filter(|case| begins.contains(&case.step) && case.nth == 1).collect()
}

#[test]
fn nor_does_a_power_cut_at_some() {
    report(&run_all(sample(), Some(1)));
}

#[test]
#[ignore = "every step with several seeds: make soak"]
fn nor_does_a_power_cut_at_any() {
    let mut by_step: BTreeMap<String, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for seed in 1..=seeds(5) {
        let rows = run_all(cases(), Some(seed));
        for row in &rows {
            *by_step.entry(row.case.fail_at()).or_default() += 1;
        }
        all.extend(rows);
    }
    println!("{} steps, each with {} seeds", by_step.len(), seeds(5));
    report(&all);
}
