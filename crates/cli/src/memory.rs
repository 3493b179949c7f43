//! How much memory the program keeps that it no longer uses.

/// Packs are filled in buffers of some 18 MiB. glibc maps such a buffer of its own at first, but each time one is
/// freed it takes larger ones from its arenas instead, of which it has eight for each core, and what is freed there
/// goes back to the system seldom. Both are bounded here, once, before anything else runs.
pub fn bound() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use nix::libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, mallopt};
        const OF_ITS_OWN_BYTES: i32 = 4 << 20;
        const ARENAS: i32 = 4;
        // SAFETY: no other thread runs yet; two numbers of the allocator are set, and it may refuse them.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, OF_ITS_OWN_BYTES);
            mallopt(M_ARENA_MAX, ARENAS);
        }
    }
}
