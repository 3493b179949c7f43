//! What was acknowledged, what is there, and whether the one is a prefix of the other. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

/// The ledgers: `sqlite` and `pg` are filled by a writer each, the other two by one that commits each number
/// first to PostgreSQL and then to SQLite.
pub const LEDGERS: [&str; 4] = ["sqlite", "pg", "relay-pg", "relay-sqlite"];

/// The newest number that each ledger has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Acked([u64; LEDGERS.len()]);

impl Acked {
    /// From the console's lines, `ack LEDGER NUMBER`; others are passed over.
    pub(crate) fn of<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        let mut acked = Self::default();
        for line in lines {
            let mut words = line.split(' ');
            if words.next() == Some("ack")
                && let Some(at) =
                    words.next().and_then(|word| LEDGERS.iter().position(|ledger| *ledger == word))
                && let Some(number) = words.next().and_then(|word| word.parse().ok())
            {
                acked.0[at] = acked.0[at].max(number);
            }
        }
        acked
    }

    /// Of one ledger; 0 for one that is not known.
    #[must_use]
    pub fn of_ledger(&self, ledger: &str) -> u64 {
        LEDGERS.iter().position(|name| *name == ledger).map_or(0, |at| self.0[at])
    }

    /// Of all ledgers together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The least of all ledgers.
    #[must_use]
    pub fn least(&self) -> u64 {
        self.0.into_iter().min().unwrap_or_default()
    }
}

impl fmt::Display for Acked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> =
            LEDGERS.iter().zip(self.0).map(|(ledger, n)| format!("{ledger} {n}")).collect();
        f.write_str(&shown.join(", "))
    }
}

/// What a boot of disks has found.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Checked {
    /// Whether ext4's journal had something to replay: a crash leaves it so, a freeze through the guest
    /// agent or a clean shutdown does not.
    pub needs_recovery: bool,
    /// The exit status of `e2fsck -fn`, after the journal's replay.
    pub e2fsck: i32,
    /// The exit status of `xfs_repair -n`, the same.
    pub xfs_repair: i32,
    /// SQLite's word on its database: `ok`.
    pub integrity_check: String,
    /// The exit status of PostgreSQL's check of its indexes, rows and checksums.
    pub amcheck: i32,
    /// What the ledgers hold.
    pub ledgers: BTreeMap<String, Found>,
}

/// What a ledger holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct Found {
    /// How many numbers.
    pub count: u64,
    /// The largest, 0 for none. Numbers are unique: 1 to `max` are all there if it equals `count`.
    pub max: u64,
}

impl Checked {
    /// Whether file systems and databases are clean, every ledger holds the numbers from 1 on without a gap,
    /// nothing is missing that was acknowledged before the moment (`before`), nothing is there that was not
    /// begun by now (one more than is acknowledged), and the two disks show the same moment. Else what is
    /// wrong. `now` is none for a guest that was killed: what it had still to say is not known.
    pub fn judge(&self, before: &Acked, now: Option<&Acked>) -> Result<(), String> {
        let mut wrong = Vec::new();
        if self.e2fsck != 0 {
            wrong.push(format!("e2fsck finds damage (status {})", self.e2fsck));
        }
        if self.xfs_repair != 0 {
            wrong.push(format!("xfs_repair finds damage (status {})", self.xfs_repair));
        }
        if self.integrity_check != "ok" {
            wrong.push(format!("SQLite finds damage: {}", self.integrity_check));
        }
        if self.amcheck != 0 {
            wrong.push(format!("PostgreSQL finds damage (status {})", self.amcheck));
        }
        for ledger in LEDGERS {
            let Some(Found { count, max }) = self.ledgers.get(ledger).copied() else {
                wrong.push(format!("ledger {ledger} is missing"));
                continue;
            };
            let (least, most) =
                (before.of_ledger(ledger), now.map_or(u64::MAX, |now| now.of_ledger(ledger) + 1));
            if count != max {
                wrong.push(format!("ledger {ledger} has gaps: {count} numbers up to {max}"));
            }
            if max < least {
                wrong.push(format!(
                    "ledger {ledger} ends with {max}, but {least} was acknowledged before the moment"
                ));
            }
            if max > most {
                wrong.push(format!(
                    "ledger {ledger} ends with {max}, but {most} is the newest that can be there"
                ));
            }
        }
        let found = self.found();
        let (pg, sqlite) = (found.of_ledger("relay-pg"), found.of_ledger("relay-sqlite"));
        if pg != sqlite && pg != sqlite + 1 {
            wrong.push(format!(
                "the disks show different moments: PostgreSQL has the relay's {pg}, SQLite its {sqlite}, but each number went first to PostgreSQL and then to SQLite"
            ));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    /// The newest number of each ledger.
    #[must_use]
    pub fn found(&self) -> Acked {
        Acked(LEDGERS.map(|ledger| self.ledgers.get(ledger).map_or(0, |found| found.max)))
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.found().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acked(numbers: [u64; 4]) -> Acked {
        Acked(numbers)
    }

    fn clean(numbers: [u64; 4]) -> Checked {
        let ledgers = LEDGERS.iter().zip(numbers);
        let ledgers = ledgers.map(|(name, max)| ((*name).to_owned(), Found { count: max, max })).collect();
        Checked {
            needs_recovery: true,
            e2fsck: 0,
            xfs_repair: 0,
            integrity_check: "ok".into(),
            amcheck: 0,
            ledgers,
        }
    }

    #[test]
    fn acknowledgements_are_read_from_the_console() {
        let lines = [
            "ack sqlite 1",
            "running",
            "ack pg 7",
            "ack sqlite 2",
            "ack nobody 9",
            "ack pg x",
            "ack relay-pg 3",
        ];
        let found = Acked::of(lines.into_iter());
        assert_eq!(found, acked([2, 7, 3, 0]));
        assert_eq!((found.total(), found.least(), found.of_ledger("relay-pg")), (12, 0, 3));
        assert_eq!(found.to_string(), "sqlite 2, pg 7, relay-pg 3, relay-sqlite 0");
    }

    #[test]
    fn a_prefix_with_all_that_was_acknowledged_before_the_moment_is_right() {
        let (before, now) = (acked([10, 20, 5, 5]), acked([12, 22, 7, 6]));
        for right in [[10, 20, 5, 5], [13, 23, 7, 6], [11, 21, 6, 6], [11, 21, 6, 5]] {
            clean(right).judge(&before, Some(&now)).unwrap();
        }
        clean([300, 300, 300, 299]).judge(&before, None).unwrap();
    }

    #[test]
    fn what_is_wrong_is_said() {
        let (before, now) = (acked([10, 20, 5, 5]), acked([12, 22, 7, 6]));
        let wrong = |checked: &Checked, word: &str| {
            let said = checked.judge(&before, Some(&now)).unwrap_err();
            assert!(said.contains(word), "{said}");
        };
        wrong(&clean([9, 20, 5, 5]), "10 was acknowledged");
        wrong(&clean([14, 20, 5, 5]), "13 is the newest");
        wrong(&clean([10, 20, 7, 5]), "different moments");
        wrong(&clean([10, 20, 5, 6]), "different moments");
        let mut gap = clean([10, 20, 5, 5]);
        gap.ledgers.insert("pg".into(), Found { count: 20, max: 21 });
        wrong(&gap, "ledger pg has gaps");
        gap.ledgers.remove("pg");
        wrong(&gap, "ledger pg is missing");
        wrong(&Checked { e2fsck: 4, ..clean([10, 20, 5, 5]) }, "e2fsck");
        wrong(&Checked { xfs_repair: 1, ..clean([10, 20, 5, 5]) }, "xfs_repair");
        wrong(&Checked { integrity_check: "row 3 missing".into(), ..clean([10, 20, 5, 5]) }, "row 3");
        wrong(&Checked { amcheck: 1, ..clean([10, 20, 5, 5]) }, "PostgreSQL");
    }
}
