//! The crash matrix: which step is reached how, two sites to crash, and what must hold afterwards.

mod check;
mod drive;
mod hours;
mod moves;
mod pair;
mod plan;

pub use check::Expect;
pub use drive::{Drive, await_death};
pub use hours::Hours;
pub use moves::crash as crash_move;
pub use pair::{Pair, Side};
pub use plan::{Case, cases};
