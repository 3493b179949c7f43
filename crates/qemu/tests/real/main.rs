//! Against the real `qemu-storage-daemon` and `qemu-system-x86_64`.

mod agent;
mod capture;
mod discovery;
mod recovery;
mod support;
mod under_load;
