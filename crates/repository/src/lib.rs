//! Backups in restic format, on rustic_core
