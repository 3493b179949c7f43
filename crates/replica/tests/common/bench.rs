//! A primary and a site on a real disk, with a clock of their own.

use std::time::Duration;

use model::gate::{Access, Condition};
use model::{LogNumber, Purpose};
use replica::Error;

use super::{Chance, PEER, POINT, Primary, Site, TestClock, VM};

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub clock: TestClock,
    pub site: Site,
    pub primary: Primary,
    pub chance: Chance,
}

pub fn bench(points: u8) -> Bench {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 300 * 1024), ("vdb", 64 * 1024)]);
    primary.points = points;
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.write("vda", 0..200_000, |at| at as u8 | 1);
    Bench { dir, clock, site, primary, chance: Chance(3) }
}

impl Bench {
    pub fn cycle(&mut self) -> LogNumber {
        self.primary.write_some(&mut self.chance, 100);
        self.clock.pass(Duration::from_secs(30));
        let first = self.primary.head.number == LogNumber::ZERO;
        self.primary.ship(&self.site, if first { Purpose::Initial } else { Purpose::Changes }, POINT)
    }

    /// Closes the store; another one is open meanwhile.
    fn close(&mut self) {
        let other = tempfile::tempdir().unwrap();
        self.site = Site::open(other.path(), &self.clock);
    }

    pub fn reopen(&mut self) {
        self.close();
        self.site = Site::open(self.dir.path(), &self.clock);
    }

    /// The catalog is gone; what the folders tell is all there is.
    pub fn lose_catalog(&mut self) {
        self.close();
        for name in ["catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"] {
            let _ = std::fs::remove_file(self.dir.path().join(name));
        }
        let config = super::config(self.dir.path(), &self.clock);
        let catalog = catalog::Catalog::open(self.dir.path().join("catalog.sqlite")).unwrap();
        replica::rebuild(&catalog, &config).unwrap();
        drop(catalog);
        self.site = Site::open(self.dir.path(), &self.clock);
    }

    /// Every access is refused with this condition.
    #[track_caller]
    pub fn refused(&self, condition: Condition) {
        let point = self.site.store.points(VM).unwrap().last().map_or(LogNumber(1), |point| point.number);
        for access in [Access::Pinned, Access::Strict, Access::Hold] {
            match self.site.store.admit(VM, access, point) {
                Err(Error::Gate(refusal)) => assert_eq!(refusal.condition, condition),
                other => panic!("{condition} was expected: {other:?}"),
            }
        }
    }
}
