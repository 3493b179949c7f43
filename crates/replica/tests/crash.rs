//! A kill at every durable step. A child process (this test again) lives a fixed life and is killed by a step
//! that the environment names; then the store is opened here, and must have every log that it acknowledged, no
//! half one, every point right, and go on.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::*;
use model::bitmaps::{after_durable, repair};
use model::gate::{Access, Condition};
use model::{ApplyState, LogClass, LogNumber, Phase, PointName, Purpose};
use replica::Error;
use steps::FAIL_AT;

const CHILD: &str = "AFTERIMAGE_CRASH_DIR";
const LOGS: u64 = 16;
/// What this life does not come to, by how the steps begin. The end-to-end crash matrix has all of them.
const ELSEWHERE: &[&str] = &[
    "replica::apply::fail",
    "replica::completion::",
    "replica::hold::expir",
    "replica::measured::",
    "replica::migrate::giv",
    "replica::moment::",
    "replica::offer::described",
    "replica::offer::updat",
    "replica::parent::",
    "replica::recover::adopt",
    "replica::recover::end",
    "replica::recover::los",
    "replica::rewrite::",
    "replica::remove::",
    "replica::receive::pinn",
    "replica::relocate::",
    "replica::report::",
    "replica::seed::",
    "replica::staging::",
    "replica::takeover::",
    "replica::withdraw::",
];

/// What a life consists of. Only `ship` and `Pass` are the primary's.
#[derive(Clone, Copy, Debug)]
enum Act {
    Ship,
    Settle,
    Hold,
    Migrate,
    Failover,
    Pin,
    Unpin,
    /// The replica is passed on: to the newest point, and once more.
    Forward,
    Unextend,
}

/// The fixed life: a pass, then cycles that overwrite the same bytes over hours, so that points go, logs are
/// folded in and merged; and in between everything else that can be begun.
fn life() -> Vec<Act> {
    let mut acts = Vec::new();
    for number in 1..=LOGS {
        acts.push(Act::Ship);
        match number {
            1 | 4..=7 | 9 | 10 | 12 => acts.push(Act::Settle),
            3 => acts.extend([Act::Settle, Act::Hold]),
            8 => acts.extend([Act::Migrate, Act::Settle]),
            11 => acts.extend([Act::Settle, Act::Pin]),
            13 => acts.extend([Act::Settle, Act::Unpin]),
            14 => acts.extend([Act::Settle, Act::Failover, Act::Forward]),
            _ => {}
        }
    }
    acts.extend([Act::Forward, Act::Settle, Act::Unextend, Act::Settle]);
    acts
}

fn purpose_and_class(number: u64) -> (Purpose, LogClass) {
    match number {
        1 | 2 => (Purpose::Initial, LogClass::Partial),
        3 => (Purpose::Initial, POINT),
        _ => (Purpose::Changes, POINT),
    }
}

/// The primary's part of one log: the same in the child and here.
fn write(primary: &mut Primary, chance: &mut Chance, clock: &TestClock) {
    let number = primary.head.number.0 + 1;
    clock.pass(Duration::from_secs(19 * 60));
    primary.write("vda", 0..150_000, |at| (at.wrapping_mul(number) >> 3) as u8);
    primary.write("vdb", 8192..40_960, |at| (at + number) as u8 | 1);
    primary.write_some(chance, 40);
}

fn primary() -> (Primary, Chance) {
    let mut primary = Primary::new(VM, &[("vda", 400 * 1024), ("vdb", 200 * 1024)]);
    primary.points = 2;
    (primary, Chance(7))
}

/// The primary as it was at its log `number`.
fn primary_at(number: LogNumber) -> (Primary, Chance, TestClock) {
    let ((mut primary, mut chance), clock) = (primary(), TestClock::new());
    while primary.head.number < number {
        write(&mut primary, &mut chance, &clock);
        let (purpose, class) = purpose_and_class(primary.head.number.0 + 1);
        let (header, _) = primary.make_log(purpose, class, clock.now());
        primary.shipped(&header);
    }
    (primary, chance, clock)
}

fn pinned_name() -> Option<PointName> {
    Some(PointName::new("kept").unwrap())
}

fn live(dir: &Path) {
    let clock = TestClock::new();
    let mut acked = fs::File::create(dir.join("acked")).unwrap();
    let site = Site::open(dir, &clock);
    let (mut primary, mut chance) = primary();
    fs::create_dir_all(dir.join("elsewhere")).unwrap();
    site.store.offer(PEER, primary.offer()).unwrap();
    for act in life() {
        match act {
            Act::Ship => {
                write(&mut primary, &mut chance, &clock);
                let (purpose, class) = purpose_and_class(primary.head.number.0 + 1);
                let number = primary.ship(&site, purpose, class);
                writeln!(acked, "{number}").unwrap();
            }
            Act::Settle => drop(site.settle(VM)),
            Act::Hold => {
                let point = site.store.prepare_hold(VM).unwrap().expect("it equals a point");
                let admitted = site.store.admit(VM, Access::Hold, point.number).unwrap();
                let (hold, _) = site.store.open_hold(admitted, Duration::from_secs(600)).unwrap();
                site.store.release(&hold.id).unwrap();
            }
            Act::Migrate => drop(site.store.migrate(VM, &dir.join("elsewhere")).unwrap()),
            Act::Pin => drop(site.store.pin_point(VM, &"latest".parse().unwrap(), pinned_name()).unwrap()),
            Act::Unpin => drop(site.store.unpin_point(VM, &"kept".parse().unwrap()).unwrap()),
            Act::Forward => {
                let base = site.store.marks(VM).unwrap().first().map(|mark| mark.k);
                let next = base.map_or(LogNumber(1), LogNumber::next);
                drop(site.store.forward(VM, base, next, false).unwrap());
                site.store.change_marks(VM, |found| after_durable(found, base, next)).unwrap();
            }
            Act::Unextend => site.store.change_marks(VM, |found| repair(found, None)).unwrap(),
            Act::Failover => {
                let newest = site.store.points(VM).unwrap().last().unwrap().number;
                site.store.failover_begin(VM, newest).unwrap();
                site.store.failover_cancel(VM).unwrap();
            }
        }
    }
}

/// Not a test of its own: what the child runs.
#[test]
fn child() {
    if let Ok(dir) = std::env::var(CHILD) {
        live(Path::new(&dir));
    }
}

fn kill_at(dir: &Path, step: &str) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--test-threads=1"])
        .env(CHILD, dir)
        .env(FAIL_AT, step)
        .output()
        .unwrap();
    assert_eq!(
        status.status.signal(),
        Some(9),
        "the life never came to {step}: {}",
        String::from_utf8_lossy(&status.stdout)
    );
}

/// Opens what the kill has left and holds it against what the primary knows.
fn check(dir: &Path, step: &str) {
    let acked = fs::read_to_string(dir.join("acked")).unwrap();
    let acked = LogNumber(acked.lines().last().map_or(0, |line| line.parse().unwrap()));
    // A quarter of an hour after it was killed: no hold lasts any more, and health is not Critical yet.
    let (_, _, clock) = primary_at(acked);
    clock.pass(Duration::from_secs(15 * 60));
    let site = Site::open(dir, &clock);
    let Ok(head) = site.store.head(VM) else {
        assert_eq!(acked, LogNumber::ZERO, "{step}: acknowledged logs are gone with their VM");
        let (mut primary, mut chance) = primary();
        site.store.offer(PEER, primary.offer()).unwrap();
        write(&mut primary, &mut chance, &clock);
        primary.ship(&site, Purpose::Initial, POINT);
        site.settle(VM);
        return site.check_points(&primary);
    };
    assert!(
        head.number >= acked,
        "{step}: log {acked} was acknowledged, the chain ends with {}",
        head.number
    );
    assert!(head.number.0 <= acked.0 + 1, "{step}: nobody sent log {}", head.number);
    let (mut primary, mut chance, _) = primary_at(head.number);
    assert_eq!(primary.head, head, "{step}");
    check_interrupted(&site, step);
    if matches!(site.store.facts(VM).unwrap().phase, Phase::Failover { .. }) {
        check_failover(&site, &primary);
    }
    site.settle(VM);
    site.check_points(&primary);
    for _ in 0..2 {
        write(&mut primary, &mut chance, &clock);
        let (purpose, class) = purpose_and_class(primary.head.number.0 + 1);
        site.store.offer(PEER, primary.offer()).unwrap();
        primary.ship(&site, purpose, class);
        site.settle(VM);
        site.check_points(&primary);
    }
    check_files(&site, &primary);
}

/// While the base is in the middle of an apply nobody gets to read it.
fn check_interrupted(site: &Site, step: &str) {
    let facts = site.store.facts(VM).unwrap();
    if let (ApplyState::Interrupted { .. }, Phase::Replicating) = (&facts.apply, &facts.phase) {
        assert!(step.contains("apply"), "{step}");
        assert_eq!(site.store.hold_point(VM).unwrap(), None);
        for point in site.store.points(VM).unwrap() {
            for access in [Access::Pinned, Access::Strict, Access::Hold] {
                match site.store.admit(VM, access, point.number) {
                    Err(Error::Gate(refusal)) => assert_eq!(refusal.condition, Condition::ApplyInterrupted),
                    other => panic!("{step}: {other:?}"),
                }
            }
        }
    }
}

/// A failover that was cut off is carried on, shows its point, and can be cancelled.
fn check_failover(site: &Site, primary: &Primary) {
    let Phase::Failover { point } = site.store.facts(VM).unwrap().phase else { return };
    let disks = site.store.failover_begin(VM, point).unwrap();
    let below = site.store.failover_view(VM).unwrap();
    for disk in disks {
        let mut bytes = vec![0; disk.size_bytes as usize];
        below.read_at(&disk.name, 0, &mut bytes).unwrap();
        assert_eq!(bytes, primary.truth[&point][disk.name.as_str()]);
        assert!(disk.overlay.exists());
    }
    site.store.failover_cancel(VM).unwrap();
}

/// Nothing lies about that belongs to nothing, and flat files that equal a point do.
fn check_files(site: &Site, primary: &Primary) {
    let status = site.store.status(VM).unwrap();
    let count = |name: &str| fs::read_dir(status.folder.join(name)).unwrap().count();
    assert_eq!(count("logs"), status.logs, "log files and rows");
    assert_eq!(count("incoming"), 0);
    if let Some(point) = site.store.hold_point(VM).unwrap() {
        for (name, bytes) in &primary.truth[&point.number] {
            assert_eq!(&fs::read(status.folder.join(format!("disks/{name}.raw"))).unwrap(), bytes);
        }
    }
    let homes = [status.folder.join("../../elsewhere"), status.folder.join("../../vms")];
    let copies = homes.iter().filter(|home| home.join(VM.to_string()).exists()).count();
    assert!(copies <= 1, "the VM is in one folder");
}

fn each(steps: &[String]) {
    for step in steps {
        let dir = tempfile::tempdir().unwrap();
        kill_at(dir.path(), step);
        check(dir.path(), step);
    }
}

#[test]
fn a_kill_at_any_durable_step_loses_nothing_that_was_acknowledged() {
    if std::env::var(CHILD).is_ok() {
        return;
    }
    let is_here = |step: &&&str| {
        step.starts_with("replica::") && !ELSEWHERE.iter().any(|begins| step.starts_with(begins))
    };
    let mut steps: Vec<String> = steps::ALL.iter().filter(is_here).map(ToString::to_string).collect();
    // Some steps are different when they come again: a first and a later log, a second batch.
    for later in [
        "receive::renamed:6",
        "receive::committed:6",
        "apply::mapped:3",
        "apply::writing:4",
        "apply::committed:3",
    ] {
        steps.push(format!("replica::{later}"));
    }
    let (one, other) = steps.split_at(steps.len() / 2);
    std::thread::scope(|scope| {
        scope.spawn(|| each(one));
        each(other);
    });
}
