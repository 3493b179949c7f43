//! What the story is told with: lines for steps that are done, a spinner for the one that runs.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Arguments;

/// Tells the story on standard output, and what goes on just now on a terminal.
pub struct Teller {
    silent: bool,
    terminal: bool,
    started: Instant,
}

impl Teller {
    pub fn new(arguments: &Arguments) -> Self {
        let silent = arguments.json || arguments.quiet;
        Self { silent, terminal: !silent && std::io::stderr().is_terminal(), started: Instant::now() }
    }

    /// A line of the story.
    pub fn say(&self, line: &str) {
        if !self.silent {
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    /// A step: `what` is shown while it runs, the outcome when it is done.
    pub fn step<T>(&self, what: &str, run: impl FnOnce(&Now) -> rig::Result<(T, String)>) -> rig::Result<T> {
        let now = Now(self.terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("        {spinner:.cyan} {prefix}  {msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        }));
        let outcome = run(&now);
        if let Some(bar) = now.0 {
            bar.finish_and_clear();
        }
        let (value, done) = outcome?;
        let at = self.started.elapsed().as_secs_f64();
        for (line, text) in done.lines().enumerate() {
            let (at, what) = if line == 0 { (format!("{at:5.1} s"), what) } else { (String::new(), "") };
            self.say(&format!("{at:>7}  {what:<24}  {text}"));
        }
        Ok(value)
    }
}

/// The step that runs.
pub struct Now(Option<ProgressBar>);

impl Now {
    pub fn say(&self, text: impl Into<String>) {
        if let Some(bar) = &self.0 {
            bar.set_message(text.into());
        }
    }
}
