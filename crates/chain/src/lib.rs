//! Which bytes a recovery point has.
//!
//! A replica is a *base* (flat images) and the *logs* after it. From the logs' indexes alone this
//! crate decides where each byte of a point is ([`Overlay`]), what to write to fold logs into the
//! base ([`ApplyPlan`]), which points to keep and what that lets go ([`plan_retention`]), when
//! neighbouring logs are worth merging ([`CompactPlan`]), what a backup has to read ([`changed_since`])
//! and whether a log continues a chain ([`check_next`]). Everything is a value or a pure function.
//!
//! Invariants kept here, each with a property test against disks that are plain byte arrays:
//! * a newer log outranks an older one and every log outranks the base, in whatever order they are given;
//!   so folding a log into the base changes no byte of a view that has it;
//! * survivors are disjoint: writing them in any order, twice, or again after a part of them, ends the same;
//! * the base is never taken past the oldest point that is kept or pinned, and nothing at or below a pin is
//!   rewritten;
//! * each changed byte is written at most twice on the replica ([`CompactPlan::worthwhile`] says why), and once more
//!   for each doubling of the log that it is in while a point pinned by hand keeps it from the base ([`CompactRule::Few`]);
//! * a log that stays a point in name stays one in its bytes: merging drops only what the merged logs
//!   themselves overwrite.
//!
//! What it does not do: read a payload, open a file, keep state. A damaged index is an [`IndexError`],
//! not a panic.
//!
//! A log names disks by their place in its own header, the chain by their place in the caller's list;
//! [`match_disks`] makes the mapping by name.

mod apply;
mod changes;
mod compact;
mod forward;
mod layer;
mod next;
mod overlay;
mod packed;
mod retention;

pub use apply::{ApplyPlan, RecordPiece, RecordWork, apply_batches};
pub use changes::{CHANGE_CHUNK_BYTES, changed_since, touched_chunks, union};
pub use compact::{CompactPlan, CompactRule, FEW_LOGS, merged_header};
pub use forward::{FORWARD_KEEP_BYTES_MIN, marks_kept, next_to_forward, next_to_move};
pub use layer::{IndexError, IndexFault, Layer, LayerDisk, match_disks};
pub use next::{ChainError, Continues, Tip, check_next};
pub use overlay::{Overlay, OverlayBuilder, Piece, Pieces, Source, Surviving, Survivor};
pub use packed::Content;
pub use retention::{Kept, KeptFor, RetentionInput, RetentionPlan, plan_retention};
