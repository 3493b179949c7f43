//! Policies at work: who is selected, what is due, and what is promised. What follows from a policy at one moment,
//! `policy` decides; here are the clock, the files and the catalog.

mod files;
mod look;
mod report;
mod shown;
mod upkeep;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use files::Policies;
pub use files::template;

use crate::config::Config;
use crate::failure::Failure;

/// The policies as they were at the last look.
pub(crate) struct Known {
    dir: PathBuf,
    config: Arc<Config>,
    last: Mutex<Arc<Policies>>,
}

impl Known {
    pub fn new(dir: PathBuf, config: Arc<Config>) -> Self {
        Self { dir, config, last: Mutex::default() }
    }

    /// Reads the files anew. Blocks.
    pub fn look(&self) -> Result<Arc<Policies>, Failure> {
        let policies = Arc::new(Policies::load(&self.dir, &self.config)?);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = policies.clone();
        Ok(policies)
    }

    /// As they were at the last look.
    pub fn last(&self) -> Arc<Policies> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
