//! Against the real `qemu-storage-daemon` and `qemu-system-x86_64`.

#![expect(clippy::single_range_in_vec_init, reason = "lists of dirty ranges, some with one")]

mod agent;
mod capture;
mod discovery;
mod recovery;
mod support;
mod under_load;
