//! What a backup may build on, and what must have happened before it is listed.

use crate::{LogId, PointInfo};

/// A backup on its way into the list of its repository.
pub trait Closing: Sized {
    /// What can go wrong.
    type Error;
    /// The backup, listed.
    type Listed;

    /// Reads what is to be backed up, until every chunk of it, and what names the chunks, is in a durable pack.
    fn store(&mut self) -> Result<(), Self::Error>;
    /// Makes the index of these packs durable.
    fn index(&mut self) -> Result<(), Self::Error>;
    /// Whether everything that was read was right to be read: the pin or the hold was in force all the while.
    fn check_source(&mut self) -> Result<(), Self::Error>;
    /// Whether this run may still write: nobody has stopped it, or taken its lock away.
    fn check_run(&mut self) -> Result<(), Self::Error>;
    /// Lists it, durably: from here on it is a backup.
    fn list(self) -> Result<Self::Listed, Self::Error>;
}

/// Brings a backup into the list, in the one order in which it is restorable from the moment it is there. A run
/// that is cut off anywhere leaves no backup, only packs that nothing refers to.
pub fn close<C: Closing>(mut backup: C) -> Result<C::Listed, C::Error> {
    backup.store()?;
    backup.index()?;
    backup.check_source()?;
    backup.check_run()?;
    backup.list()
}

/// The newest of these backups that an incremental one can build on: of a point since which the view that is
/// read `knows` what has changed.
pub fn choose_parent<B, E>(
    backups: impl IntoIterator<Item = B>,
    point: impl Fn(&B) -> PointInfo,
    mut knows: impl FnMut(LogId) -> Result<bool, E>,
) -> Result<Option<B>, E> {
    let mut newest: Option<B> = None;
    for backup in backups {
        let newer = newest.as_ref().is_none_or(|best| point(&backup).number >= point(best).number);
        if newer && knows(point(&backup).id)? {
            newest = Some(backup);
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Consistency, LogNumber, Timestamp};

    /// Notes what was done, and fails at one of its steps.
    struct Noted<'a> {
        done: &'a mut Vec<&'static str>,
        fails_at: &'static str,
    }

    impl Noted<'_> {
        fn step(&mut self, name: &'static str) -> Result<(), &'static str> {
            if name == self.fails_at {
                return Err(name);
            }
            self.done.push(name);
            Ok(())
        }
    }

    impl Closing for Noted<'_> {
        type Error = &'static str;
        type Listed = ();
        fn store(&mut self) -> Result<(), Self::Error> {
            self.step("store")
        }
        fn index(&mut self) -> Result<(), Self::Error> {
            self.step("index")
        }
        fn check_source(&mut self) -> Result<(), Self::Error> {
            self.step("source")
        }
        fn check_run(&mut self) -> Result<(), Self::Error> {
            self.step("run")
        }
        fn list(mut self) -> Result<(), Self::Error> {
            self.step("list")
        }
    }

    #[test]
    fn listing_is_the_last_thing_and_whatever_fails_before_it_prevents_it() {
        let steps = ["store", "index", "source", "run", "list"];
        for (place, fails_at) in steps.into_iter().enumerate() {
            let mut done = Vec::new();
            assert_eq!(close(Noted { done: &mut done, fails_at }), Err(fails_at));
            assert_eq!(done, steps[..place]);
        }
        let mut done = Vec::new();
        assert_eq!(close(Noted { done: &mut done, fails_at: "" }), Ok(()));
        assert_eq!(done, steps);
    }

    #[test]
    fn the_newest_point_that_is_known_is_built_on() {
        let point = |number: u8| PointInfo {
            id: LogId::from_bytes([number; 16]),
            number: LogNumber(number.into()),
            taken_at: Timestamp(0),
            consistency: Consistency::Crash,
        };
        let choose = |known: &[u8]| {
            let known: Vec<_> = known.iter().map(|number| point(*number).id).collect();
            let knows = |id| Ok::<_, ()>(known.contains(&id));
            choose_parent([2, 5, 3, 4], |number| point(*number), knows).unwrap()
        };
        assert_eq!(choose(&[2, 3, 4]), Some(4));
        assert_eq!(choose(&[2, 5]), Some(5));
        assert_eq!(choose(&[]), None);
    }
}
