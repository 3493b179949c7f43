//! Which connections stay when there are more than a site takes.
//!
//! Nobody is kept waiting at the door: there a thousand idle connections would stand before a peer that has a log
//! to bring. Who comes is let in, and who holds the most loses: first the network from which the most strangers
//! came its oldest connection; where there are only peers, the peer with the most connections its oldest. So a
//! flood from one place costs only that place. A connection is a stranger's until a peer has asked something on it.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use crate::identity::Fingerprint;

/// The connections that there are.
#[derive(Debug)]
pub(crate) struct Doors {
    most: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// Oldest first.
    entries: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    from: IpAddr,
    peer: Option<Fingerprint>,
    task: Option<AbortHandle>,
}

/// A connection's place, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Place {
    doors: Arc<Doors>,
    number: u64,
}

impl Doors {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), open: Mutex::default() })
    }

    /// Lets somebody in, and cuts somebody else off where there are too many.
    pub fn enter(self: &Arc<Self>, from: IpAddr) -> Place {
        let mut open = self.lock();
        while open.entries.len() >= self.most {
            let Some(entry) = open.victim().and_then(|number| open.entries.remove(&number)) else { break };
            tracing::debug!(from = %entry.from, peer = ?entry.peer, "too many connections: one is cut");
            if let Some(task) = entry.task {
                task.abort();
            }
        }
        let number = open.next;
        open.next += 1;
        open.entries.insert(number, Entry { from: network(from), peer: None, task: None });
        Place { doors: self.clone(), number }
    }

    /// Tells what to end when the connection is to be cut.
    pub fn runs(&self, number: u64, task: AbortHandle) {
        // If it has been cut already, or has ended, there is nothing to remember.
        match self.lock().entries.get_mut(&number) {
            Some(entry) => entry.task = Some(task),
            None => task.abort(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub fn number(&self) -> u64 {
        self.number
    }

    /// A peer has asked something here.
    pub fn is_of(&self, peer: Fingerprint) {
        if let Some(entry) = self.doors.lock().entries.get_mut(&self.number) {
            entry.peer = Some(peer);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.doors.lock().entries.remove(&self.number);
    }
}

impl Open {
    fn victim(&self) -> Option<u64> {
        let strangers = self.entries.iter().filter(|(_, entry)| entry.peer.is_none());
        let strangers = strangers.map(|(number, entry)| (*number, entry.from));
        let peers = self.entries.iter().filter_map(|(number, entry)| Some((*number, entry.peer?)));
        oldest_of_the_largest(strangers).or_else(|| oldest_of_the_largest(peers))
    }
}

/// The first member of the group with the most; of groups alike, the one that came first.
fn oldest_of_the_largest<K: Eq + Hash>(members: impl Iterator<Item = (u64, K)>) -> Option<u64> {
    let mut groups: HashMap<K, (usize, u64)> = HashMap::new();
    for (number, key) in members {
        groups.entry(key).or_insert((0, number)).0 += 1;
    }
    groups
        .into_values()
        .max_by_key(|&(count, first)| (count, std::cmp::Reverse(first)))
        .map(|(_, first)| first)
}

/// What one household can be given: an IPv4 address, or the first half of an IPv6 address.
pub(crate) fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn numbers(doors: &Doors) -> Vec<u64> {
        doors.lock().entries.keys().copied().collect()
    }

    #[test]
    fn a_flood_costs_those_who_flood() {
        let doors = Doors::new(4);
        let mut places = vec![doors.enter(ip(1)), doors.enter(ip(2))];
        places.extend((0..100).map(|_| doors.enter(ip(9))));
        assert_eq!(numbers(&doors), [0, 1, 100, 101], "the newest two of the flood, and everybody else");
        places.clear();
        assert!(numbers(&doors).is_empty());
    }

    #[test]
    fn a_peer_is_not_cut_off_for_a_stranger() {
        let doors = Doors::new(3);
        let peer = |byte| Fingerprint::from_bytes([byte; 32]);
        let known = doors.enter(ip(1));
        known.is_of(peer(1));
        let _flood: Vec<_> = (0..10).map(|last| doors.enter(ip(last))).collect();
        assert_eq!(numbers(&doors), [0, 9, 10]);
        // Among peers, the one with the most loses.
        let doors = Doors::new(3);
        let of = |byte| {
            let place = doors.enter(ip(1));
            place.is_of(peer(byte));
            place
        };
        let _places = [of(1), of(2), of(2), of(3)];
        assert_eq!(numbers(&doors), [0, 2, 3]);
    }

    #[test]
    fn one_household_is_one_network() {
        let net = |text: &str| network(text.parse().unwrap());
        assert_eq!(net("2001:db8:1:2:3::4"), net("2001:db8:1:2::9"));
        assert_ne!(net("2001:db8:1:2::9"), net("2001:db8:1:3::9"));
        assert_eq!(net("::ffff:10.0.0.1"), ip(1));
    }
}
