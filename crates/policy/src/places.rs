//! Who may run: so many backups of a site at once, so many into one repository, so many from one storage.

/// What a backup keeps busy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The repository that it writes to.
    pub repository: String,
    /// The storage that it reads from.
    pub storage: String,
}

/// How many run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub site: usize,
    /// Into one repository.
    pub repository: usize,
    /// From one storage.
    pub storage: usize,
}

/// Which of those that wait runs next, beside those that run: of those that fit, the one with the least `urgency` value
/// (time left, rank), the first of equals. None if none fits.
pub fn pick<'a, U: Ord>(
    waiting: impl IntoIterator<Item = (U, &'a Place)>,
    running: &[Place],
    limits: Limits,
) -> Option<usize> {
    if running.len() >= limits.site {
        return None;
    }
    let fits = |place: &Place| {
        let busy = |same: &dyn Fn(&Place) -> bool| running.iter().filter(|other| same(other)).count();
        busy(&|other| other.repository == place.repository) < limits.repository
            && busy(&|other| other.storage == place.storage) < limits.storage
    };
    let fitting = waiting.into_iter().enumerate().filter(|(_, (_, place))| fits(place));
    // `min_by` gives the first of equals.
    fitting.min_by(|(_, (a, _)), (_, (b, _))| a.cmp(b)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(repository: &str, storage: &str) -> Place {
        Place { repository: repository.into(), storage: storage.into() }
    }

    const LIMITS: Limits = Limits { site: 3, repository: 2, storage: 1 };

    #[test]
    fn the_most_urgent_that_fits_runs_next() {
        let (a, b, c) = (place("r", "a"), place("r", "b"), place("s", "c"));
        let waiting = || [(5, &a), (3, &b), (3, &c)];
        assert_eq!(pick(waiting(), &[], LIMITS), Some(1));
        assert_eq!(pick(waiting(), &[place("s", "b")], LIMITS), Some(2), "its storage is busy");
        assert_eq!(
            pick(waiting(), &[place("r", "x"), place("r", "y")], LIMITS),
            Some(2),
            "its repository is busy"
        );
        assert_eq!(pick(waiting(), &[place("x", "x"), place("y", "y"), place("z", "z")], LIMITS), None);
        assert_eq!(pick(waiting(), &[place("r", "b"), place("s", "c")], LIMITS), Some(0));
        assert_eq!(pick(<[(u8, &Place); 0]>::default(), &[], LIMITS), None);
    }
}
