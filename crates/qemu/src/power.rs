//! A VM that is to run elsewhere: whether it stands still, and how it is brought to.

use serde_json::json;

use crate::error::Error;
use crate::qmp::Command;
use crate::vm::{Vm, optional};

/// States in which no processor of a guest runs and none will by itself.
const QUIET: &[&str] =
    &["shutdown", "paused", "prelaunch", "postmigrate", "finish-migrate", "guest-panicked"];

impl Vm {
    /// Whether its processors stand still: it was shut down, paused, or not started yet. A storage daemon has none.
    pub async fn is_quiet(&self) -> Result<bool, Error> {
        let status = optional(self.qmp().run(Command::bare("query-status")).await)?;
        let Some(status) = status else { return Ok(true) };
        Ok(status["status"].as_str().is_some_and(|status| QUIET.contains(&status)))
    }

    /// Presses the power button, and has QEMU stay, paused, when the guest has shut down: what QEMU knows of changed
    /// blocks would go with it.
    pub async fn power_down(&self) -> Result<(), Error> {
        self.qmp().run(Command::new("set-action", json!({"shutdown": "pause"}))).await?;
        self.qmp().run(Command::bare("system_powerdown")).await.map(drop)
    }

    /// Ends QEMU. A connection that ends before the answer is one.
    pub async fn quit(&self) -> Result<(), Error> {
        match self.qmp().run(Command::bare("quit")).await {
            Err(error) if error.is_gone() => Ok(()),
            answer => answer.map(drop),
        }
    }
}
