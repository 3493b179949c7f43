//! `afterimage demo`: the whole story on this machine in about a minute, with real processes: two sites, a
//! VM's block layer under a writer, a backup that collides with an apply and comes home, a kill, a restore,
//! and the proof that what came back is a moment that the VM went through.

mod stage;
mod story;

use std::time::Instant;

use serde_json::json;
use site::{Code, Failure};

use crate::Said;
use crate::args::Arguments;

/// Runs the demo.
pub async fn run(arguments: &Arguments, keep: bool) -> Result<Said, Failure> {
    let (teller, started) = (stage::Teller::new(arguments), Instant::now());
    let told = tokio::task::spawn_blocking(move || story::tell(&teller, keep)).await;
    let story = told
        .map_err(|error| Failure::new(Code::Internal, format!("the demo stopped: {error}")))?
        .map_err(|trouble| Failure::new(Code::Internal, format!("the demo failed: {trouble}")))?;
    let seconds = (started.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    let mut text = story.table();
    text.push_str(&format!("\nAll of it took {seconds} s.{}", story.farewell));
    Ok(Said::new(json!({ "steps": story.steps, "seconds": seconds, "kept_in": story.kept_in }), text))
}
