//! Recovery points and backups judged by QEMU's own record of what the guest wrote (`blklogwrites`): each is a
//! state that the disks went through, all at one moment. Points are read by libnbd, not by our client.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{DISKS, LONG, VM, World};
use e2e::foreign::nbdcopy;
use e2e::oracle::{CommonOrder, Guest, Image, Prefixes, WriteLog};
use rig::Process;

/// What a recovery point or a backup shows.
struct Sight {
    what: String,
    images: Vec<Image>,
    /// Steps that the guest had made for certain, and those that it can have made at the most.
    made: usize,
    begun: usize,
}

/// All that was seen, in the order of the points.
#[derive(Default)]
struct Album {
    sights: Vec<Sight>,
    newest: u64,
}

impl Album {
    /// Looks at the points that came since the last look. The newest of them was asked for when `made` steps
    /// had been made; `begun` gives how many have begun by now.
    fn look(&mut self, world: &World, made: usize, begun: impl Fn() -> usize) {
        let (points, seen) = (world.points(), self.newest);
        let last = points.last().map(|point| point["number"].clone());
        for point in points.iter().filter(|point| point["number"].as_u64().unwrap() > seen) {
            self.newest = point["number"].as_u64().unwrap();
            let Some(shown) = world.export_point(point, &[]) else { continue };
            let images = shown.uris.iter().map(|uri| {
                let copy = world.dir.path().join("copy.raw");
                nbdcopy(uri, &copy, &[]).unwrap();
                let image = Image::read(&copy).unwrap();
                fs::remove_file(&copy).unwrap();
                image
            });
            let images = images.collect();
            world.unexport(&shown);
            let made = if Some(&point["number"]) == last.as_ref() { made } else { 0 };
            let what = format!("point {} of {}", self.newest, point["taken_at"]);
            self.sights.push(Sight { what, images, made, begun: begun() });
        }
    }
}

fn images_of(files: &[PathBuf]) -> Vec<Image> {
    files.iter().map(|file| Image::read(file).unwrap()).collect()
}

/// What QEMU logged, replayed.
fn replayed(world: &World) -> Vec<Prefixes> {
    let replay = |(name, bytes): (&str, u64)| {
        Prefixes::replay(WriteLog::open(&world.daemon.log(name), bytes).unwrap()).unwrap()
    };
    DISKS.map(replay).into()
}

/// The states that each disk can be in; panics if one of them was never so.
fn states<'a>(disks: &'a [Prefixes], sight: &Sight) -> Vec<&'a [usize]> {
    let states: Vec<_> = disks.iter().zip(&sight.images).map(|(disk, image)| disk.of(image)).collect();
    for (disk, (name, _)) in DISKS.iter().enumerate() {
        if states[disk].is_empty() {
            let closest = disks[disk].closest(&sight.images[disk]).unwrap();
            panic!("{}: disk {name} never was so; {closest:?}", sight.what);
        }
    }
    states
}

fn backups(world: &World) -> Vec<Sight> {
    let listed = world.head.ok(&["backups", VM]).unwrap();
    let ids = listed["backups"].as_array().unwrap().iter().map(|backup| backup["id"].as_str().unwrap());
    let sight = |id: &str| {
        let files = world.restore(id);
        let images = images_of(&files);
        files.iter().for_each(|file| fs::remove_file(file).unwrap());
        Sight { what: format!("backup {id}"), images, made: 0, begun: usize::MAX }
    };
    ids.map(sight).collect()
}

/// What happens meanwhile, in turn.
#[derive(Debug, Clone, Copy)]
enum Meanwhile {
    Nothing,
    Backup,
    CutLine,
    KillHead,
    KillBranch,
    Resync,
}

impl World {
    fn meanwhile(&mut self, what: Meanwhile) {
        match what {
            Meanwhile::Nothing => std::thread::sleep(Duration::from_millis(200)),
            Meanwhile::Backup => drop(self.head.ok(&["backup", VM]).unwrap()),
            Meanwhile::CutLine => {
                self.line.cut();
                std::thread::sleep(Duration::from_millis(300));
                self.line.mend();
            }
            Meanwhile::KillHead => {
                self.head.kill();
                self.head.serve().unwrap();
            }
            Meanwhile::KillBranch => {
                self.branch.kill();
                self.branch.serve().unwrap();
            }
            Meanwhile::Resync => {
                self.branch.ok(&["resync", VM]).unwrap();
                self.replicating();
            }
        }
    }
}

/// One guest, one step at a time over both disks; everything that can be seen of it is judged. Gives how many
/// points and backups that were.
fn one_step_at_a_time(seed: u64, points: &str, seconds: u64) -> usize {
    use Meanwhile::{Backup, CutLine, KillBranch, KillHead, Nothing, Resync};
    let mut world = World::logged(seed);
    let guest = Guest::start(&world.daemon, seed, Duration::from_micros(200));
    world.protect("1s", &["--points", points]);
    world.replicating();
    let mut album = Album::default();
    let mut turns = [Nothing, Backup, Nothing, CutLine, Resync, Nothing, KillHead, KillBranch].iter().cycle();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(seconds) {
        world.meanwhile(*turns.next().unwrap());
        let made = guest.begun().saturating_sub(1);
        let synced = world.branch.run(&["sync", VM]).unwrap();
        album.look(&world, if synced.status == 0 { made } else { 0 }, || guest.begun());
    }
    let steps = guest.stop().unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    album.look(&world, steps.len(), || steps.len());
    world.meanwhile(Backup);

    let disks = replayed(&world);
    let order = CommonOrder::of(&steps, &disks).unwrap();
    let mut moment = 0;
    for sight in &album.sights {
        let found = order.moment(&states(&disks, sight), moment.max(sight.made));
        moment = found.filter(|&found| found <= sight.begun).unwrap_or_else(|| {
            let Sight { what, made, begun, .. } = sight;
            panic!("{what}: no moment from {moment} and {made} to {begun} shows both disks so, but {found:?}")
        });
    }
    assert_eq!(moment, order.last(), "the newest point holds everything");
    let backups = backups(&world);
    for backup in &backups {
        assert!(
            order.moment(&states(&disks, backup), 0).is_some(),
            "{}: the disks do not agree",
            backup.what
        );
    }
    the_oracle_can_refuse(&album, &disks, &order);
    let judged = album.sights.len() + backups.len();
    println!(
        "seed {seed}: {} steps ({} discards dropped by QEMU), {} points and {} backups judged over both disks together",
        steps.len(),
        order.dropped(),
        album.sights.len(),
        backups.len()
    );
    judged
}

/// One sector from elsewhere, or disks of two moments, and it says no.
fn the_oracle_can_refuse(album: &Album, disks: &[Prefixes], order: &CommonOrder) {
    let (first, last) = (&album.sights[0], album.sights.last().unwrap());
    let mut torn = last.images[0].clone();
    let sector =
        first.images[0].sectors().find(|&sector| torn.print(sector) != first.images[0].print(sector));
    assert!(sector.is_some(), "the points differ");
    torn.write(sector.unwrap() * 512, &[0xEE; 512]);
    assert!(disks[0].of(&torn).is_empty());
    let mixed = [disks[0].of(&first.images[0]), disks[1].of(&last.images[1])];
    assert_eq!(order.moment(&mixed, 0), None);
}

/// Many writes and discards of fio in flight on each disk. Which came first on the two disks nobody knows, so
/// each disk is judged alone.
fn fio_at_full_depth(seed: u64, seconds: u64) -> usize {
    let world = World::logged(seed);
    let mut fio = fio_on_both_disks(&world, seed, seconds);
    world.protect("1s", &["--points", "24"]);
    world.branch.wait_vm(VM, "to replicate", LONG, |vm| vm["state"] == "replicating").unwrap();
    let mut album = Album::default();
    while !fio.has_ended() {
        world.branch.ok(&["sync", VM]).unwrap();
        album.look(&world, 0, || 0);
    }
    flush(&world);
    world.head.ok(&["backup", VM]).unwrap();
    world.branch.ok(&["sync", VM]).unwrap();
    album.look(&world, 0, || 0);
    let backups = backups(&world);

    let disks = replayed(&world);
    let mut at = [0, 0];
    for sight in &album.sights {
        for (at, states) in at.iter_mut().zip(states(&disks, sight)) {
            let later = states.iter().find(|&state| state >= at);
            *at =
                *later.unwrap_or_else(|| panic!("{}: a disk went back from {at} to {states:?}", sight.what));
        }
    }
    let last = states(&disks, album.sights.last().unwrap());
    for (disk, states) in disks.iter().zip(last) {
        assert!(states.contains(&disk.changes()), "the newest point holds everything");
        assert!(disk.changes() > 500, "fio has written: {}", disk.changes());
    }
    backups.iter().for_each(|backup| drop(states(&disks, backup)));
    let changes: usize = disks.iter().map(Prefixes::changes).sum();
    let judged = album.sights.len() + backups.len();
    println!(
        "seed {seed}: {changes} writes and discards of fio, {judged} points and backups judged, each disk alone"
    );
    judged
}

/// Random writes in one area of each disk, discards and writes by turns in another.
fn fio_on_both_disks(world: &World, seed: u64, seconds: u64) -> Process {
    rig::need("fio", "fio").unwrap();
    let mut command = Command::new("fio");
    command.args([
        "--ioengine=nbd",
        "--bsrange=512-64k",
        "--iodepth=8",
        "--serialize_overlap=1",
        "--norandommap=1",
    ]);
    command.args(["--time_based=1", "--rate_iops=400", "--fsync=64", "--end_fsync=1"]);
    command.arg(format!("--runtime={seconds}")).arg(format!("--randseed={seed}"));
    for (name, _) in DISKS {
        for (rw, offset) in [("randwrite", "0"), ("randtrimwrite", "8M")] {
            command.arg(format!("--name={name}-{rw}")).arg(format!("--rw={rw}"));
            command.arg(format!("--offset={offset}")).arg("--size=6M");
            command.arg(format!("--uri=nbd+unix:///{name}?socket={}", world.daemon.nbd().display()));
        }
    }
    let log = fs::File::create(world.dir.path().join("fio.log")).unwrap();
    Process::start(command.stdout(log).stderr(Stdio::inherit())).unwrap()
}

/// Has QEMU bring its logs up to date, by qemu-io.
fn flush(world: &World) {
    for (name, _) in DISKS {
        let uri = format!("nbd+unix:///{name}?socket={}", world.daemon.nbd().display());
        rig::tool(
            Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 1 20M 512", "-c", "flush"]).arg(uri),
        )
        .unwrap();
    }
}

#[test]
fn every_point_and_backup_is_a_moment_that_qemu_logged() {
    assert!(one_step_at_a_time(61, "24", 14) >= 10);
}

#[test]
fn under_fio_every_disk_is_in_a_state_that_qemu_logged() {
    assert!(fio_at_full_depth(62, 8) >= 6);
}

#[test]
#[ignore = "minutes: make soak"]
fn hundreds_of_moments_that_qemu_logged() {
    let minutes =
        std::env::var("AFTERIMAGE_SOAK_MINUTES").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let judge = |minute| match minute % 3 {
        0 => one_step_at_a_time(600 + minute, "24", 60),
        1 => fio_at_full_depth(600 + minute, 60),
        _ => one_step_at_a_time(600 + minute, "0", 60),
    };
    let judged: usize = (0..minutes).map(judge).sum();
    assert!(judged as u64 >= 20 * minutes, "{judged}");
}
