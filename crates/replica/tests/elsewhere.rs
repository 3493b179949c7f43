//! The store on files that are not the operating system's: all that it does goes through the file system of its
//! config, on its caller's thread, and the same calls do the same.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use catalog::Catalog;
use common::memory::Memory;
use common::*;
use log::Header;
use model::gate::Access;
use model::{LogClass, LogNumber, Purpose};
use replica::{Chance as StoreChance, Config, Step, Store};

/// Nothing of this name is on the machine, before or after.
const NOWHERE: &str = "/afterimage-is-on-no-disk-of-this-machine";
const LOGS: u64 = 16;

struct World {
    files: Arc<Memory>,
    catalog: Catalog,
    clock: TestClock,
}

impl World {
    fn new() -> Self {
        Self {
            files: Arc::new(Memory::new()),
            catalog: Catalog::in_memory().unwrap(),
            clock: TestClock::new(),
        }
    }

    fn config(&self) -> Config {
        let drawn = AtomicU8::new(0);
        let draw = move |bytes: &mut [u8]| {
            bytes.fill(drawn.fetch_add(1, Ordering::Relaxed));
            Ok(())
        };
        Config {
            apply_threads: 1,
            files: self.files.clone(),
            chance: StoreChance::from_fn(draw),
            ..config(Path::new(NOWHERE), &self.clock)
        }
    }

    fn site(&self) -> Site {
        let store = Store::open(self.catalog.clone(), self.config()).unwrap();
        Site { store, clock: self.clock.clone() }
    }
}

/// A pass, then cycles over hours: points go, logs are folded in and merged.
fn ship(primary: &mut Primary, chance: &mut Chance, site: &Site) -> Vec<Step> {
    let number = primary.head.number.0 + 1;
    site.clock.pass(Duration::from_secs(19 * 60));
    primary.write("vda", 0..150_000, |at| (at.wrapping_mul(number) >> 3) as u8);
    primary.write("vdb", 8192..40_960, |at| (at + number) as u8 | 1);
    primary.write_some(chance, 40);
    let (purpose, class) = match number {
        1 | 2 => (Purpose::Initial, LogClass::Partial),
        3 => (Purpose::Initial, POINT),
        _ => (Purpose::Changes, POINT),
    };
    primary.ship(site, purpose, class);
    let steps = if number.is_multiple_of(3) { site.settle(VM) } else { Vec::new() };
    site.check_points(primary);
    steps
}

/// Everything that a store does with files, but for a failover, which is another program's too.
fn live(world: &World) -> (Primary, Vec<Step>) {
    let (mut primary, mut chance) =
        (Primary::new(VM, &[("vda", 400 * 1024), ("vdb", 200 * 1024)]), Chance(7));
    primary.points = 2;
    let mut site = world.site();
    site.store.offer(PEER, primary.offer()).unwrap();
    let mut steps = Vec::new();
    for number in 1..=LOGS {
        steps.extend(ship(&mut primary, &mut chance, &site));
        match number {
            5 => hold(&site, &primary),
            8 => {
                let elsewhere = PathBuf::from(NOWHERE).join("elsewhere");
                files::FileSystem::create_dir_all(&*world.files, &elsewhere).unwrap();
                assert!(site.store.migrate(VM, &elsewhere).unwrap().starts_with(&elsewhere));
            }
            10 => site = restart_within_a_log(world, site, &mut primary),
            12 => {
                let digests = site.store.digests(PEER, VM, &disk("vda"), 0, 400 * 1024, 4096).unwrap();
                assert_eq!(digests.len(), 100);
            }
            _ => {}
        }
    }
    steps.extend(site.settle(VM));
    site.check_points(&primary);
    let points = site.store.points(VM).unwrap();
    let newest = points.last().unwrap().number;
    let parents = points.iter().filter(|parent| {
        let view = site.view(VM, newest).unwrap();
        check_changes(&view, &primary, parent.number)
    });
    assert_eq!(parents.count(), points.len(), "all of them were read, and can be told changes since");
    (primary, steps)
}

fn hold(site: &Site, primary: &Primary) {
    let point = site.store.prepare_hold(VM).unwrap().expect("it equals a point");
    let admitted = site.store.admit(VM, Access::Hold, point.number).unwrap();
    let (hold, admission) = site.store.open_hold(admitted, Duration::from_secs(600)).unwrap();
    assert_eq!(hold.id, "hold-0000000000000000", "chance is what the config gives");
    check_view(&hold.view(&site.store, admission).unwrap(), &primary.truth[&point.number]);
    assert!(site.store.release(&hold.id).unwrap());
}

/// The store ends in the middle of a log and goes on there.
fn restart_within_a_log(world: &World, site: Site, primary: &mut Primary) -> Site {
    primary.write("vda", 4096..90_000, |at| (at >> 4) as u8 | 2);
    let (header, bytes) = primary.make_log(Purpose::Changes, POINT, site.clock.now());
    let half = bytes.len() / 2;
    let append = |site: &Site, range: std::ops::Range<usize>, last| {
        let Header { number, id, .. } = header;
        site.store.append(PEER, VM, number, id, range.start as u64, &bytes[range.clone()], last).unwrap()
    };
    append(&site, 0..half, false);
    drop(site);
    let site = world.site();
    let at = site.store.upload_state(PEER, VM, header.number, header.id).unwrap();
    assert_eq!((at.offset, at.durable), (half as u64, false), "it goes on where it was");
    assert!(append(&site, half..bytes.len(), true).durable);
    primary.shipped(&header);
    site
}

#[test]
fn nothing_goes_past_the_file_system_of_the_config() {
    assert!(!Path::new(NOWHERE).exists());
    let world = World::new();
    let (primary, steps) = live(&world);
    assert!(steps.iter().any(|step| matches!(step, Step::Applied { .. })), "{steps:?}");
    assert!(steps.iter().any(|step| matches!(step, Step::Compacted { .. })), "{steps:?}");
    assert!(!Path::new(NOWHERE).exists(), "the store has made files of the operating system's");

    // The files alone are enough to go on with.
    let folder = world.site().store.status(VM).unwrap().folder;
    let rebuilt = World { catalog: Catalog::in_memory().unwrap(), ..world };
    let config = Config { dir: folder.parent().unwrap().into(), ..rebuilt.config() };
    let vms = config.dir.join("vms");
    for (path, bytes) in rebuilt.files.contents() {
        let Ok(within) = path.strip_prefix(&folder) else { continue };
        let copy = vms.join(VM.to_string()).join(within);
        let fs: &dyn files::FileSystem = &*rebuilt.files;
        fs.create_dir_all(copy.parent().unwrap()).unwrap();
        fs.open(&copy, files::Open::CreateNew).unwrap().write_all_at(&bytes, 0).unwrap();
    }
    assert_eq!(replica::rebuild(&rebuilt.catalog, &config).unwrap(), [VM]);
    let store = Store::open(rebuilt.catalog.clone(), config).unwrap();
    let site = Site { store, clock: rebuilt.clock.clone() };
    assert_eq!(site.store.head(VM).unwrap(), primary.head);
    assert!(site.store.points(VM).unwrap().len() > 1);
    site.check_points(&primary);
}

#[test]
fn the_same_calls_do_the_same_to_the_same_files() {
    let worlds = [World::new(), World::new()];
    let [(_, one), (primary, other)] = worlds.each_ref().map(live);
    assert_eq!(one, other);
    let [one, other] = worlds.each_ref().map(|world| world.files.calls());
    assert!(one.len() > 1000, "{}", one.len());
    let differs = one.iter().zip(&other).position(|(one, other)| one != other);
    assert_eq!(differs.map(|at| (&one[at], &other[at])), None);
    assert_eq!(one.len(), other.len());
    assert!(worlds[0].files.contents() == worlds[1].files.contents());
    assert!(primary.head.number > LogNumber(LOGS));
}
