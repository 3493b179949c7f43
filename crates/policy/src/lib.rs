//! What a backup policy says, and what follows from it.
//!
//! ```text
//!  nightly.toml ─▶ Policy ─┬─ Selection: is this VM meant?
//!                          ├─ Schedule + what ran last + now ─▶ Due: a run with its window, or when to look again
//!                          ├─ Retention + the backups there are ─▶ a plan: what is kept, by which rule, and what is forgotten
//!                          └─ promise + the newest backup ─▶ Standing: kept, at risk, broken
//! ```
//!
//! What holds:
//! * a start that was missed is caught up once, however many were;
//! * no attempt begins in a blackout, or after the window's end;
//! * a plan never forgets the newest backup of a VM, nor one that a person has asked for.
//!
//! It is pure: moments come in as arguments, and a time zone as what the caller has looked up. What it does not do: make
//! jobs, ask the gate, or delete anything (that is `site` and `repository`).

mod blackout;
mod calendar;
mod due;
mod error;
mod places;
mod policy;
mod promise;
mod retention;
mod schedule;
mod select;
mod text;

pub use blackout::Blackout;
pub use due::{Due, Window, due};
pub use error::PolicyError;
pub use places::{Limits, Place, pick};
pub use policy::{Policy, RetryChanges};
pub use promise::{Standing, standing, time_left};
pub use retention::{Candidate, Reason, Retention, Verdict, plan};
pub use schedule::Schedule;
pub use select::Selection;
