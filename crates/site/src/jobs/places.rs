//! Who of the jobs that wait runs next. `policy::pick` decides; this waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use policy::{Limits, Place, pick};
use tokio::sync::oneshot;

/// The places of a site.
pub(crate) struct Places(Arc<Inner>);

struct Inner {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: Vec<Place>,
    waiting: Vec<Waiting>,
}

struct Waiting {
    place: Place,
    time_left: Duration,
    give: oneshot::Sender<Taken>,
}

/// A place that is taken; free again when this is dropped.
pub(crate) struct Taken {
    places: Option<Arc<Inner>>,
    place: Place,
}

impl Places {
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { limits, state: Mutex::default() }))
    }

    /// Waits for a place. Of all that wait the one with the least time left gets the next one that it fits.
    pub async fn take(&self, place: Place, time_left: Duration) -> Taken {
        let (give, given) = oneshot::channel();
        {
            let mut state = self.0.lock();
            state.waiting.push(Waiting { place, time_left, give });
            self.0.give(&mut state);
        }
        given.await.expect("who waits stays in the list until a place is given")
    }
}

impl Inner {
    fn give(self: &Arc<Self>, state: &mut State) {
        loop {
            // Who has gone away waits no more.
            state.waiting.retain(|waiting| !waiting.give.is_closed());
            let waiting = state.waiting.iter().map(|waiting| (waiting.time_left, &waiting.place));
            let Some(next) = pick(waiting, &state.running, self.limits) else { return };
            let Waiting { place, give, .. } = state.waiting.remove(next);
            match give.send(Taken { places: Some(self.clone()), place: place.clone() }) {
                Ok(()) => state.running.push(place),
                // Gone just now: its place was never taken, and must not be given back.
                Err(mut taken) => taken.places = None,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(places) = self.places.take() else { return };
        let mut state = places.lock();
        if let Some(at) = state.running.iter().position(|place| *place == self.place) {
            state.running.swap_remove(at);
        }
        places.give(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(storage: &str) -> Place {
        Place { repository: "r".into(), storage: storage.into() }
    }

    #[tokio::test]
    async fn the_most_urgent_comes_next_and_who_goes_away_keeps_no_place() {
        let places = Arc::new(Places::new(Limits { site: 1, repository: 9, storage: 9 }));
        let first = places.take(place("a"), Duration::ZERO).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let take = |left: u64| {
            let (places, order) = (places.clone(), order.clone());
            tokio::spawn(async move {
                let _place = places.take(place("b"), Duration::from_secs(left)).await;
                order.lock().unwrap().push(left);
            })
        };
        let (late, gone, soon) = (take(9), take(1), take(5));
        while places.0.lock().waiting.len() < 3 {
            tokio::task::yield_now().await;
        }
        gone.abort();
        let _ = gone.await;
        drop(first);
        late.await.unwrap();
        soon.await.unwrap();
        assert_eq!(*order.lock().unwrap(), [5, 9]);
        assert!(places.0.lock().running.is_empty());
    }
}
