//! Seeded worlds over the production code.
//!
//! A world has VMs, a primary's site, a replica's site, the line between them and a repository. The cycle is
//! `primary`'s own, over ports; the store of chains is `replica`'s own, on a disk that loses, tears, reorders and
//! rots; the gate, retries, bitmaps, retention and the order in which a backup is listed are the pure crates'. What
//! is simulated is what they stand on: QEMU, the link, disks, power, clocks, and people at the worst time.
//!
//! ```text
//!   seed ─▶ plan and schedule ─▶ world ─▶ events, one by one ─▶ all faults end ─▶ promises
//!                                            │ after each                            │
//!                                            └──────▶ checkers, which know what every guest wrote, write by write
//! ```
//!
//! Invariants:
//! * a seed means the same world and the same events, on every machine, every time;
//! * a schedule is a plain list, and what an event means does not hang on the others: so it can be shrunk;
//! * checkers know the guests' histories and what the replica has called durable, nothing else.
//!
//! What it does not do: take time, open sockets or files, or show what only real processes show (`e2e` kills those).

pub mod chance;
pub mod clock;
pub mod coverage;
pub mod disk;
pub mod event;
pub mod guest;
pub mod history;
pub mod plan;
pub mod ports;
pub mod power;
pub mod repository;
pub mod run;
pub mod truth;
pub mod turns;
pub mod world;
