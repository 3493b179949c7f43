//! Several VMs come to one moment: each has a seat, and waits at doors for the others while its moment is fixed.
//!
//! Which door opens when is [`model::group::Gathering`]'s to say; here is the clock, and who waits. Whoever leaves its seat,
//! also by dropping it, holds nobody up.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use model::group::{Door, Gathering, Go, GroupMoment, Missing, Outcome, PATIENCE};
use model::{GroupName, MomentId, Timestamp, VmName};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// A moment that is to be fixed over several VMs.
#[derive(Debug)]
pub struct Meeting {
    hall: Arc<Hall>,
}

/// The place of one VM in it. The last clone that is dropped leaves it.
#[derive(Debug, Clone)]
pub struct Seat(Arc<Place>);

struct Place {
    hall: Arc<Hall>,
    member: usize,
}

struct Hall {
    id: MomentId,
    group: GroupName,
    coming: Vec<VmName>,
    absent: Vec<Missing>,
    /// Guests are to be frozen, where that can be.
    freezes: bool,
    opened: Instant,
    opened_at: Timestamp,
    gathering: Mutex<Gathering>,
    /// Told when a door opens.
    doors: watch::Sender<usize>,
}

impl Meeting {
    /// Opens one, and gives each of those that come its seat, in their order. Who is `absent` was not asked.
    #[must_use]
    pub fn open(
        id: MomentId,
        group: GroupName,
        coming: Vec<VmName>,
        absent: Vec<Missing>,
        freezes: bool,
    ) -> (Self, Vec<Seat>) {
        let hall = Arc::new(Hall {
            id,
            group,
            gathering: Mutex::new(Gathering::new(coming.len(), PATIENCE)),
            coming,
            absent,
            freezes,
            opened: Instant::now(),
            opened_at: Timestamp::from(SystemTime::now()),
            doors: watch::Sender::new(0),
        });
        let seat = |member| Seat(Arc::new(Place { hall: hall.clone(), member }));
        let seats = (0..hall.coming.len()).map(seat).collect();
        (Self { hall }, seats)
    }

    /// What it comes to. Waits until nobody is awaited any more, which is never long.
    pub async fn outcome(&self) -> GroupMoment {
        let hall = &self.hall;
        hall.wait(|gathering| gathering.outcome().map(|outcome| hall.moment(&outcome))).await
    }
}

impl Seat {
    /// Whether the guest is to be frozen for the moment, if it can be.
    #[must_use]
    pub fn freezes(&self) -> bool {
        self.0.hall.freezes
    }

    /// Leaves, and says why.
    pub fn leave(&self, why: &str) {
        self.0.hall.change(|gathering, now| gathering.leave(self.0.member, why, now));
    }

    /// Waits at a door. Open or not, what is behind it is to be done: with the others, or without them.
    pub async fn pass(&self, door: Door) {
        let Place { hall, member } = &*self.0;
        hall.change(|gathering, now| gathering.come(*member, door, now));
        hall.wait(|gathering| (gathering.standing(*member, door) != Go::Wait).then_some(())).await;
    }

    /// This VM's moment lies between the two. Gives the one that it shares with others; none if they have gone without it.
    pub async fn fixed(&self, start: Instant, end: Instant) -> Option<GroupMoment> {
        let Place { hall, member } = &*self.0;
        let since = |at: Instant| at.saturating_duration_since(hall.opened);
        let span = model::group::Span { start: since(start), end: since(end) };
        hall.change(|gathering, now| gathering.fixed(*member, span, now));
        let outcome = hall.wait(Gathering::outcome).await;
        outcome.fixed.contains(member).then(|| hall.moment(&outcome))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.hall.change(|gathering, now| gathering.leave(self.member, "its cycle was given up", now));
    }
}

impl Hall {
    fn lock(&self) -> MutexGuard<'_, Gathering> {
        self.gathering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.opened.elapsed()
    }

    fn change(&self, change: impl FnOnce(&mut Gathering, Duration)) {
        let open = {
            let mut gathering = self.lock();
            change(&mut gathering, self.now());
            gathering.open_doors()
        };
        self.doors.send_if_modified(|doors| std::mem::replace(doors, open) != open);
    }

    /// Waits until the gathering gives an answer; doors whose patience ends are opened meanwhile.
    async fn wait<T>(&self, answer: impl Fn(&Gathering) -> Option<T>) -> T {
        let mut doors = self.doors.subscribe();
        loop {
            self.change(|gathering, now| gathering.advance(now));
            doors.mark_unchanged();
            let deadline = {
                let gathering = self.lock();
                if let Some(answer) = answer(&gathering) {
                    return answer;
                }
                gathering.deadline().unwrap_or_default()
            };
            tokio::select! {
                _ = doors.changed() => {}
                () = sleep_until(self.opened + deadline) => {}
            }
        }
    }

    fn moment(&self, outcome: &Outcome) -> GroupMoment {
        let missing = outcome.missing.iter().map(|(place, why)| Missing::new(&self.coming[*place], why));
        GroupMoment {
            id: self.id,
            group: self.group.clone(),
            at: self.opened_at.plus(outcome.start),
            skew_us: u64::try_from(outcome.skew.as_micros()).unwrap_or(u64::MAX),
            members: outcome.fixed.iter().map(|&place| self.coming[place].clone()).collect(),
            missing: self.absent.iter().cloned().chain(missing).collect(),
        }
    }
}

impl fmt::Debug for Hall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hall").field("group", &self.group).field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("hall", &self.hall).field("member", &self.member).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(coming: &[&str]) -> (Meeting, Vec<Seat>) {
        let names = coming.iter().map(|name| name.parse().unwrap()).collect();
        let absent = vec![Missing::new(&"old".parse().unwrap(), "it is paused")];
        Meeting::open(MomentId::from_bytes([7; 16]), "shop".parse().unwrap(), names, absent, false)
    }

    /// A VM whose way to each door takes so long.
    async fn come(seat: Seat, ways: [u64; 3]) -> Option<GroupMoment> {
        tokio::time::sleep(Duration::from_millis(ways[0])).await;
        seat.pass(Door::Prepare).await;
        tokio::time::sleep(Duration::from_millis(ways[1])).await;
        seat.pass(Door::Freeze).await;
        let start = Instant::now();
        tokio::time::sleep(Duration::from_millis(ways[2])).await;
        seat.fixed(start, Instant::now()).await
    }

    #[tokio::test(start_paused = true)]
    async fn all_get_the_same_moment_and_it_is_when_the_slowest_was_ready() {
        let (meeting, seats) = open(&["db", "web"]);
        let [db, web] = seats.try_into().unwrap();
        let (one, other, seen) =
            tokio::join!(come(db, [100, 20, 3]), come(web, [5, 200, 7]), meeting.outcome());
        assert_eq!((one.as_ref(), other.as_ref()), (Some(&seen), Some(&seen)));
        assert_eq!(seen.at, meeting.hall.opened_at.plus(Duration::from_millis(300)));
        assert_eq!((seen.skew_us, seen.members.len()), (7000, 2));
        assert_eq!(seen.missing[0].vm.as_str(), "old");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_late_or_gone_is_missing_and_the_others_have_their_moment() {
        let (meeting, seats) = open(&["db", "web", "gone"]);
        let [db, web, gone] = seats.try_into().unwrap();
        let began = Instant::now();
        let leave = async { gone.leave("QEMU is gone") };
        let (one, late, (), seen) =
            tokio::join!(come(db, [1, 1, 1]), come(web, [1, 60_000, 1]), leave, async {
                let seen = meeting.outcome().await;
                (seen, began.elapsed())
            });
        let (seen, took) = seen;
        assert!(took <= PATIENCE.iter().sum(), "{took:?}");
        assert_eq!((one, late), (Some(seen.clone()), None));
        let missing: Vec<_> = seen.missing.iter().map(|m| (m.vm.as_str(), m.why.as_str())).collect();
        let expected = [
            ("old", "it is paused"),
            ("web", "its guest did not come to rest in time"),
            ("gone", "QEMU is gone"),
        ];
        assert_eq!(missing, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_seat_that_is_dropped_is_left() {
        let (meeting, seats) = open(&["db"]);
        let again = seats[0].clone();
        drop(seats);
        assert!(
            tokio::time::timeout(Duration::from_secs(1), meeting.outcome()).await.is_err(),
            "a clone is there"
        );
        drop(again);
        let seen = meeting.outcome().await;
        assert!(seen.members.is_empty() && seen.missing.len() == 2, "{seen:?}");
    }
}
