//! A replica's whole life, at random, on real files: logs arrive in parts, points go, logs are folded in and
//! merged, views and holds come and go, the store is dropped and opened again. Every point that is shown, and
//! every view however old, reads as the primary was.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::*;
use model::gate::Access;
use model::{LogClass, LogNumber, Phase, PointName, Purpose, ResyncReason};
use replica::{ConsistentView, Error, Hold};

struct World {
    dir: tempfile::TempDir,
    site: Site,
    clock: TestClock,
    primary: Primary,
    chance: Chance,
    views: Vec<ConsistentView>,
    holds: Vec<Hold>,
    /// Points that were read through a view.
    parents: Vec<LogNumber>,
    /// The naive model of pins: what is in it is there.
    pinned: BTreeMap<LogNumber, Option<PointName>>,
    merges: usize,
    applies: usize,
    incremental: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = TestClock::new();
        let site = Site::open(dir.path(), &clock);
        let mut primary = Primary::new(VM, &[("vda", 700 * 1024), ("vdb", 300 * 1024)]);
        let mut chance = Chance(seed);
        primary.points = chance.below(4) as u8;
        site.store.offer(PEER, primary.offer()).unwrap();
        Self {
            dir,
            site,
            clock,
            primary,
            chance,
            views: vec![],
            holds: vec![],
            parents: vec![],
            pinned: BTreeMap::new(),
            merges: 0,
            applies: 0,
            incremental: 0,
        }
    }

    fn step(&mut self) {
        match self.chance.below(28) {
            0..=7 => self.cycle(),
            8..=12 => self.maintain(),
            13..=14 => self.open_view(),
            15 if !self.views.is_empty() => {
                let gone = self.chance.below(self.views.len() as u64) as usize;
                self.check_view(gone);
                self.views.remove(gone);
            }
            16..=17 if !self.views.is_empty() => {
                let place = self.chance.below(self.views.len() as u64) as usize;
                self.check_view(place);
            }
            18 => self.reopen(),
            19 => self.clock.pass(Duration::from_secs(60 * self.chance.below(90))),
            20 => self.hold(),
            21 => self.release(),
            22 => self.check_digests(),
            23 if self.chance.one_in(3) => self.require_resync(),
            24..=25 => self.pin(),
            26 => self.unpin(),
            _ => self.site.check_changes_of_newest(&self.primary, &self.parents),
        }
    }

    fn cycle(&mut self) {
        self.clock.pass(Duration::from_secs(60 * self.chance.below(25)));
        for _ in 0..self.chance.below(12) {
            self.primary.write_some(&mut self.chance, 200);
        }
        if self.chance.one_in(12) {
            let size = UNIT * (100 + self.chance.below(1600));
            self.primary.resize("vda", size);
        }
        let standing = self.site.store.offer(PEER, self.primary.offer()).unwrap();
        assert_eq!(standing.head, self.primary.head);
        let partial = self.chance.one_in(4);
        let purpose = match standing.phase {
            Phase::InitialReplication { .. } => Purpose::Initial,
            Phase::Replicating => Purpose::Changes,
            _ => Purpose::Resync,
        };
        let class = if partial { LogClass::Partial } else { POINT };
        self.primary.phase = Phase::Replicating;
        if self.chance.one_in(6) {
            // An attempt that breaks off, and is given up for another.
            let (header, bytes) = self.primary.make_log(purpose, class, self.clock.now());
            let part = bytes.len() / 2;
            self.site.store.append(PEER, VM, header.number, header.id, 0, &bytes[..part], false).unwrap();
            if self.chance.one_in(2) {
                self.reopen();
                let state = self.site.store.upload_state(PEER, VM, header.number, header.id).unwrap();
                assert!(!state.durable && state.offset <= part as u64);
                if self.chance.one_in(2) {
                    self.site.send(&header, &bytes, 5000).unwrap();
                    return self.primary.shipped(&header);
                }
            }
        }
        self.primary.ship(&self.site, purpose, class);
    }

    fn maintain(&mut self) {
        for _ in 0..=self.chance.below(3) {
            match self.site.store.maintain(VM).unwrap() {
                replica::Step::Compacted { .. } => self.merges += 1,
                replica::Step::Applied { .. } => self.applies += 1,
                _ => {}
            }
        }
    }

    fn open_view(&mut self) {
        let points = self.site.store.points(VM).unwrap();
        if points.is_empty() || self.views.len() > 4 {
            return;
        }
        let point = points[self.chance.below(points.len() as u64) as usize].number;
        if let Ok(view) = self.site.view(VM, point) {
            self.views.push(view);
            self.parents.push(point);
            self.check_view(self.views.len() - 1);
        }
    }

    fn check_view(&mut self, place: usize) {
        let view = &self.views[place];
        check_view(view, &self.primary.truth[&view.point().number]);
        view.still_valid().unwrap();
        for parent in self.parents.iter().filter(|parent| **parent <= view.point().number) {
            assert!(check_changes(view, &self.primary, *parent), "it was read of this chain");
            self.incremental += 1;
        }
    }

    fn hold(&mut self) {
        let Some(point) = self.site.store.hold_point(VM).unwrap() else { return };
        if let Ok(admitted) = self.site.store.admit(VM, Access::Hold, point.number) {
            let lease = Duration::from_secs(60 * (1 + self.chance.below(60)));
            self.holds.push(self.site.store.open_hold(admitted, lease).unwrap().0);
        }
    }

    fn release(&mut self) {
        let Some(hold) = self.holds.pop() else { return };
        let files: Vec<_> = hold.disks.iter().map(|disk| std::fs::read(&disk.path).unwrap()).collect();
        if self.site.store.release(&hold.id).unwrap() {
            let truth = &self.primary.truth[&hold.point.number];
            assert!(files.iter().eq(truth.values()), "the flat files equal the held point");
        } else {
            assert!(hold.expires_at <= self.clock.now());
        }
    }

    fn pin(&mut self) {
        let points = self.site.store.points(VM).unwrap();
        if points.is_empty() {
            return;
        }
        let point = points[self.chance.below(points.len() as u64) as usize];
        let name =
            self.chance.one_in(2).then(|| PointName::new(&format!("name-{}", self.chance.below(4))).unwrap());
        let is_taken = |(number, other): (&LogNumber, &Option<PointName>)| {
            name.is_some() && *other == name && *number != point.number
        };
        let taken = self.pinned.iter().any(is_taken);
        match self.site.store.pin_point(VM, &point.id.into(), name.clone()) {
            Ok(pin) => {
                assert!(!taken && (pin.number, pin.id) == (point.number, point.id));
                let known = self.pinned.entry(point.number).or_default();
                *known = name.or_else(|| known.take());
                assert_eq!(pin.name, *known);
            }
            Err(Error::NameTaken { .. }) => assert!(taken),
            Err(error) => panic!("{error}"),
        }
    }

    fn unpin(&mut self) {
        let place = self.chance.below(self.pinned.len().max(1) as u64) as usize;
        let Some((number, name)) =
            self.pinned.iter().nth(place).map(|(number, name)| (*number, name.clone()))
        else {
            return;
        };
        let wanted = match &name {
            Some(name) => name.to_string().parse().unwrap(),
            None => self.primary.ids[&number].into(),
        };
        assert_eq!(self.site.store.unpin_point(VM, &wanted).unwrap().number, number);
        self.pinned.remove(&number);
        if name.is_some() {
            assert!(self.site.store.find_point(VM, &wanted).is_err(), "its name is gone with the pin");
        }
    }

    /// What is pinned is shown, is called what it was called, and reads as the primary was.
    fn check_pinned(&mut self) {
        let shown = self.site.store.shown_points(VM).unwrap();
        let pinned: BTreeMap<LogNumber, Option<PointName>> = shown
            .iter()
            .filter_map(|shown| shown.pinned.as_ref().map(|pin| (shown.point.number, pin.name.clone())))
            .collect();
        assert_eq!(pinned, self.pinned);
        for number in self.pinned.keys() {
            if let Ok(view) = self.site.view(VM, *number) {
                check_view(&view, &self.primary.truth[number]);
            }
        }
    }

    fn check_digests(&mut self) {
        let Some(newest) = self.primary.truth.get(&self.primary.head.number) else { return };
        for (name, bytes) in newest {
            let len = bytes.len() as u64 + 70_000;
            let digests = self.site.store.digests(PEER, VM, &disk(name), 0, len, 65536).unwrap();
            let mut padded = bytes.clone();
            padded.resize(len as usize, 0);
            let expected = padded.chunks(65536).map(|block| blake3::hash(block).as_bytes()[..16].to_vec());
            assert!(digests.iter().map(|digest| digest.to_vec()).eq(expected), "digests of {name}");
        }
    }

    fn require_resync(&mut self) {
        let phase = Phase::ResyncRequired { why: ResyncReason::Requested };
        self.site.store.report(PEER, VM, phase, None, false).unwrap();
    }

    fn reopen(&mut self) {
        self.views.clear();
        let Self { dir, site, clock, .. } = self;
        let config = config(dir.path(), clock);
        let other = tempfile::tempdir().unwrap();
        // The old store is gone before the new one opens: its place is taken by another, empty one.
        *site = Site::open(other.path(), clock);
        *site = Site::open_with(config, clock);
    }
}

impl Site {
    fn check_changes_of_newest(&self, primary: &Primary, parents: &[LogNumber]) {
        let Some(point) = self.store.points(VM).unwrap().last().copied() else { return };
        let Ok(view) = self.view(VM, point.number) else { return };
        for parent in parents.iter().filter(|parent| **parent <= point.number) {
            assert!(check_changes(&view, primary, *parent));
        }
    }
}

fn live(seed: u64, steps: usize) -> (usize, usize, usize) {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step();
        world.check_pinned();
    }
    for place in 0..world.views.len() {
        world.check_view(place);
    }
    // In the end it is in order: a whole cycle, everything folded in that may be.
    world.views.clear();
    world.clock.pass(Duration::from_secs(48 * 3600));
    world.primary.write_some(&mut world.chance, 100);
    let purpose = match world.site.store.facts(VM).unwrap().phase {
        Phase::InitialReplication { .. } => Purpose::Initial,
        Phase::Replicating => Purpose::Changes,
        _ => Purpose::Resync,
    };
    world.primary.ship(&world.site, purpose, POINT);
    world.site.settle(VM);
    world.site.check_points(&world.primary);
    world.check_pinned();
    world.reopen();
    world.site.check_points(&world.primary);
    world.check_pinned();
    (world.applies, world.merges, world.incremental)
}

#[test]
fn whatever_happens_every_point_and_every_view_reads_as_the_primary_was() {
    let seeds = match std::env::var("AFTERIMAGE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..8).collect::<Vec<u64>>(),
    };
    let (alone, mut sums) = (seeds.len() == 1, (0, 0, 0));
    for seed in seeds {
        println!("seed {seed} (AFTERIMAGE_SEED={seed} runs it alone)");
        let (applies, merges, incremental) = live(seed, 120);
        sums = (sums.0 + applies, sums.1 + merges, sums.2 + incremental);
    }
    println!("{} applies, {} merges, {} looks at changes since a parent", sums.0, sums.1, sums.2);
    assert!(
        alone || sums.0 > 10 && sums.1 > 2 && sums.2 > 20,
        "the histories have all of it in them: {sums:?}"
    );
}
