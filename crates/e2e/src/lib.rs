//! End to end: real processes, real disks, real kills. The tests are in `tests/`; what they are made of is `rig`.
