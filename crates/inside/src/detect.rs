//! What a volume holds, by what is written at its beginning.

use std::fmt;

use crate::source::{ReadAt, bytes_at};

/// What a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// NTFS.
    Ntfs,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT of any kind.
    Fat,
    /// Encrypted with LUKS.
    Luks,
    /// A part of a volume group of LVM.
    Lvm,
    /// Linux's swap.
    Swap,
    /// Nothing that is known.
    Unknown,
}

impl Content {
    /// In one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext => "ext4",
            Self::Ntfs => "ntfs",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Fat => "fat",
            Self::Luks => "luks",
            Self::Lvm => "lvm",
            Self::Swap => "swap",
            Self::Unknown => "unknown",
        }
    }

    /// Whether its files can be read here.
    #[must_use]
    pub const fn is_read(self) -> bool {
        matches!(self, Self::Ext | Self::Ntfs)
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Ntfs => "NTFS",
            Self::Xfs => "XFS",
            Self::Btrfs => "Btrfs",
            Self::Fat => "FAT",
            Self::Luks => "an encrypted volume (LUKS)",
            Self::Lvm => "a physical volume of LVM",
            Self::Swap => "swap",
            Self::Unknown => "what is on this volume",
        })
    }
}

/// Where, what, and what that says.
const MAGICS: [(u64, &[u8], Content); 8] = [
    (1024 + 56, &[0x53, 0xef], Content::Ext),
    (3, b"NTFS    ", Content::Ntfs),
    (0, b"XFSB", Content::Xfs),
    (65_536 + 64, b"_BHRfS_M", Content::Btrfs),
    (0, b"LUKS\xba\xbe", Content::Luks),
    (4086, b"SWAPSPACE2", Content::Swap),
    (54, b"FAT", Content::Fat),
    (82, b"FAT32", Content::Fat),
];

/// What a volume holds.
pub(crate) fn detect(source: &dyn ReadAt) -> Content {
    // First: a volume that became a part of LVM may have the rest of a file system behind its label.
    if crate::lvm::label(source).is_some() {
        return Content::Lvm;
    }
    let is_there = |(at, magic, _): &&(u64, &[u8], Content)| {
        bytes_at::<16>(source, *at).is_some_and(|bytes| bytes.starts_with(magic))
    };
    MAGICS.iter().find(is_there).map_or(Content::Unknown, |(_, _, content)| *content)
}
