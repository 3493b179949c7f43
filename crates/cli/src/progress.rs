//! Progress, for a person at a terminal and nobody else.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use site::Progress;

use crate::args::Arguments;

/// A bar on standard error; nothing where that is no terminal, or with `--quiet`.
pub struct Bar(Option<ProgressBar>);

impl Bar {
    pub fn new(arguments: &Arguments) -> Self {
        let wanted = !arguments.quiet && std::io::stderr().is_terminal();
        Self(wanted.then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        }))
    }

    pub fn show(&self, progress: &Progress) {
        let Some(bar) = &self.0 else { return };
        let known = progress.total_bytes > 0;
        let template = if known {
            "{spinner} {msg} {wide_bar:.cyan} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}"
        } else {
            "{spinner} {msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        if known {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        }
        bar.set_message(progress.message.clone());
    }

    pub fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
