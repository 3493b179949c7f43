//! Each step, where it is, and what is done so that a process comes to it.

use super::drive::Drive::{self, *};
use super::pair::Side::{self, Branch, Command, Head};

/// One line of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// The step.
    pub step: &'static str,
    /// The time at which it dies there.
    pub nth: u32,
    /// Who dies.
    pub side: Side,
    /// What makes it come there.
    pub drive: Drive,
}

impl Case {
    /// As `AFTERIMAGE_FAIL_AT` wants it.
    pub fn fail_at(&self) -> String {
        if self.nth == 1 { self.step.to_owned() } else { format!("{}:{}", self.step, self.nth) }
    }
}

/// By the longest beginning of a step's name. A step that nothing here fits fails the test.
const PLAN: &[(&str, Side, Drive)] = &[
    ("catalog::", Head, Start),
    ("primary::acked::", Branch, Sync),
    ("primary::attempt::", Branch, Sync),
    ("primary::configure::", Branch, Configure),
    ("primary::cycle::", Branch, Sync),
    ("primary::disks::", Branch, Disks),
    ("primary::forget::", Branch, Withdraw),
    ("primary::group::", Branch, MakeGroup),
    ("primary::handover::", Branch, Move),
    ("primary::measured::", Branch, MeasuredThere),
    ("primary::media::", Branch, Media),
    ("primary::offer::", Branch, Sync),
    ("primary::pause::", Branch, Report),
    ("primary::protect::", Branch, Protect),
    ("primary::relocate::", Branch, MoveAway),
    ("primary::resync::", Branch, Resync),
    ("primary::takeover::", Head, Move),
    ("qemu::", Branch, Sync),
    ("replica::apply::", Head, Sync),
    ("replica::apply::failed", Head, ApplyFails),
    ("replica::apply::failing", Head, ApplyFails),
    ("replica::compact::", Head, Hours),
    ("replica::completion::", Head, Move),
    ("replica::failover::", Head, Failover),
    ("replica::failover::cancel", Head, Cancel),
    ("replica::folder::", Head, Start),
    ("replica::folder::gone", Head, Cancel),
    ("replica::folder::removed", Head, Cancel),
    ("replica::forward::chang", Head, ExtendedSync),
    ("replica::forward::mark", Head, Extend),
    ("replica::hold::", Head, Hold),
    ("replica::hold::expir", Head, HoldRunsOut),
    ("replica::hold::releas", Head, Release),
    ("replica::map::", Head, Protect),
    ("replica::measured::", Head, MeasuredHere),
    ("replica::migrate::", Head, Migrate),
    ("replica::migrate::giv", Head, MigrateFails),
    ("replica::moment::", Head, GroupMoment),
    ("replica::offer::", Head, Protect),
    ("replica::offer::described", Head, Grow),
    ("replica::offer::updat", Head, Offer),
    ("replica::parent::", Head, Backup),
    ("replica::pin::", Head, Pin),
    ("replica::receive::", Head, Sync),
    ("replica::receive::pinn", Head, MoveBack),
    ("replica::recover::", Head, Start),
    ("replica::recover::adopt", Head, Adopt),
    ("replica::recover::ended-move", Head, EndMove),
    ("replica::recover::ending-move", Head, EndMove),
    ("replica::recover::los", Head, Lose),
    ("replica::relocate::", Head, MoveAway),
    ("replica::remove::", Head, Remove),
    ("replica::report::", Head, Report),
    ("replica::retention::", Head, Hours),
    ("replica::seed::", Branch, Move),
    ("replica::staging::", Head, Seed),
    ("replica::takeover::", Head, TakeOver),
    ("replica::unpin::", Head, Unpin),
    ("replica::withdraw::", Head, Withdraw),
    ("replica::rewrite::", Head, Rewrite),
    ("repository::backup::", Head, Backup),
    ("repository::convert::", Command, RestoreVhdx),
    ("repository::create::", Command, Init),
    ("repository::file::", Head, Backup),
    ("repository::folder::", Head, BackupToNewFolders),
    ("repository::index::", Head, Backup),
    ("repository::listing::", Head, Backup),
    ("repository::lock::", Head, Backup),
    ("repository::onto::", Command, RestoreOnto),
    ("repository::pack::", Head, Backup),
    ("repository::restore::", Command, Restore),
    ("site::folder::", Command, Init),
    ("site::identity::", Head, UseCa),
    ("site::init::", Command, Init),
    ("site::invite::", Head, Invite),
    ("site::job::", Head, Backup),
    ("site::peer::add", Branch, Accept),
    ("site::peer::admit", Head, Admit),
    ("site::peer::chang", Head, AllowPeer),
    ("site::peer::remov", Head, RemovePeer),
    ("site::policy::", Head, RunPolicy),
    ("wire::identity::", Command, Init),
    ("wire::identity::next-", Head, NewKey),
    ("wire::identity::next-half-adopted", Head, AdoptKey),
    ("wire::identity::next-whole", Head, AdoptKey),
    ("wire::identity::renew", Head, Renew),
];

/// Steps that are other ones when they come again: the lock, packs, the index and the list of a backup are all
/// written as files; a pass has several logs; a set of media has a card, a log and an end.
const AGAIN: &[(&str, &[u32])] = &[
    ("primary::media::renamed", &[2, 3]),
    ("primary::media::saving", &[2]),
    ("primary::media::written", &[2, 3]),
    ("primary::relocate::saved", &[2, 3]),
    ("primary::relocate::saving", &[2, 3]),
    ("qemu::sweep::begin", &[2]),
    ("qemu::sweep::exports", &[2]),
    ("qemu::sweep::files", &[2]),
    ("qemu::sweep::jobs", &[2]),
    ("qemu::sweep::nodes", &[2]),
    ("qemu::transaction::done", &[2]),
    ("qemu::transaction::sending", &[2]),
    ("replica::relocate::writing", &[2]),
    ("replica::relocate::written", &[2]),
    ("repository::file::synced", &[2, 3, 4]),
    ("repository::file::renamed", &[2, 3, 4, 5]),
    ("repository::pack::written", &[2]),
    ("site::job::saved", &[2]),
    ("site::job::saving", &[2]),
    ("catalog::committing", &[2]),
];

/// The whole matrix, from the list of steps.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for step in steps::ALL {
        let fits = PLAN.iter().filter(|(begins, ..)| step.starts_with(begins));
        let Some((_, side, drive)) = fits.max_by_key(|(begins, ..)| begins.len()) else {
            panic!("nothing is planned for step {step}: say in tests/crash/plan.rs how it is reached")
        };
        let again = AGAIN.iter().filter(|(name, _)| name == step).flat_map(|(_, times)| times.iter());
        for &nth in [1].iter().chain(again) {
            cases.push(Case { step, nth, side: *side, drive: *drive });
        }
    }
    for (name, _) in AGAIN {
        assert!(steps::ALL.contains(name), "{name} is no step any more");
    }
    for (begins, ..) in PLAN {
        assert!(steps::ALL.iter().any(|step| step.starts_with(begins)), "{begins} begins no step any more");
    }
    cases
}
