//! What is inside a guest's disks: partition tables, logical volumes, and the files of ext2, ext3, ext4 and NTFS.
//!
//! A guest writes its disks as it likes, so all that is read here may have been made to harm whoever reads it. So no
//! kernel mounts it, no C reads it, and nothing needs rights: this crate and the two that it stands on have no
//! `unsafe`. What holds beside:
//! * nothing is read outside a volume, and no loop follows what a disk says without a bound;
//! * memory is bounded by constants, not by what a disk says of itself;
//! * a disk that makes no sense is an error, or a volume that is named and not opened; never a panic of ours.
//!
//! What it does not do: write, decrypt, know XFS, Btrfs, or volumes in more than one piece per stretch (stripes, mirrors,
//! thin pools); say how names are safely used on this machine (that is its caller's).

mod detect;
mod ext;
mod filesystem;
mod lvm;
mod lvm_text;
mod ntfs_files;
mod partitions;
mod source;
mod volumes;

use std::io;

pub use detect::Content;
pub use filesystem::{Entry, FileSystem, Kind, Visit, Walk, matches, open};
pub use source::{ReadAt, Window};
pub use volumes::{Volume, volumes};

/// The most entries of one folder, and folders below one another: what is beyond is an error.
pub const ENTRIES_MAX: usize = 1_000_000;
/// How deep folders are followed.
pub const DEPTH_MAX: usize = 256;

/// What can go wrong with a guest's disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk could not be read.
    #[error("the disk cannot be read: {0}")]
    Read(#[from] io::Error),
    /// There is no such file.
    #[error("there is no {0:?}")]
    NotFound(String),
    /// It is of another kind.
    #[error("{path:?} is no {wanted}")]
    WrongKind {
        /// What was named.
        path: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// The file system contradicts itself, or has what we do not know.
    #[error("the file system cannot be read: {0}")]
    FileSystem(String),
    /// It is of a kind that is not read here.
    #[error(
        "{0} is not read by Afterimage; export the disk ('afterimage export') and mount it in a VM that is made for that"
    )]
    Unsupported(Content),
    /// More than is read.
    #[error("{0}")]
    TooMuch(&'static str),
}
