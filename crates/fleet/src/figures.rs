//! The figures of docs/fleet.md.

use plot::{Axis, BLUE, Canvas, GREEN, ORANGE, PURPLE, Panel, SKY, Series, Style, THEORY, VERMILION, ticks};

use crate::clock::SECOND;
use crate::histogram::Histogram;
use crate::scenario::Strategy;
use crate::studies::{ALL_AT_ONCE, FAST, Fleet, Results, SLOW, closed_form_done};
use crate::tally::{RATE_CLASSES, Tally};

/// All figures: the file's name and what is in it.
#[must_use]
pub fn all(results: &Results) -> Vec<(&'static str, String)> {
    vec![
        ("starvation.svg", starvation(results)),
        ("workers.svg", workers(results)),
        ("collisions.svg", collisions(results)),
        ("strategies.svg", strategies(results)),
    ]
}

const fn style(strategy: Strategy) -> Style {
    match strategy {
        Strategy::Strict => VERMILION,
        Strategy::Hold => ORANGE,
        Strategy::StrictBarrier => BLUE,
        Strategy::HoldBarrier => SKY,
        Strategy::Pause => PURPLE,
        Strategy::Pinned => GREEN,
    }
}

fn percent(value: f64) -> String {
    format!("{} %", value * 100.0)
}

/// What retry alone does to a VM whose applies take long, and what helps.
fn starvation(results: &Results) -> String {
    let mut canvas = Canvas::new(
        960.0,
        730.0,
        "Retry alone starves before applies fill the interval",
        "One VM, a cycle every 30 s, the product's retry policy (16 attempts); apply utilisation = apply time / interval",
    );
    let utilisations = ticks(&[0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5], percent);
    let panel = |column: f64, row: f64, y: Axis| Panel {
        left: 64.0 + 476.0 * column,
        top: 108.0 + 306.0 * row,
        width: 270.0,
        height: 220.0,
        x: Axis::linear("apply utilisation", utilisations.clone()),
        y,
    };
    let made = panel(0.0, 0.0, Axis::linear("backups made", ticks(&[0.0, 0.25, 0.5, 0.75, 1.0], percent)));
    let theory = (0..=150).map(|n| f64::from(n) / 100.0).map(|u| (u, closed_form_done(u, 16))).collect();
    let mut lines = curves(results, &Tally::done_share);
    lines.push(Series { name: "1 \u{2212} u\u{b9}\u{2076}".into(), style: THEORY, points: theory });
    made.frame(&mut canvas);
    made.lines(&mut canvas, &lines);
    let most = ticks(&[0.0, 4.0, 8.0, 12.0, 16.0], |n| n.to_string());
    let attempts = panel(1.0, 0.0, Axis::linear("attempts per backup, mean", most));
    attempts.frame(&mut canvas);
    attempts.lines(&mut canvas, &curves(results, &|tally| tally.attempts.mean()));
    let times = ticks(&[1.0, 10.0, 60.0, 600.0, 3600.0], time);
    let seconds = |histogram: &Histogram| histogram.quantile(0.99) as f64 / 1000.0;
    let waiting = panel(0.0, 1.0, Axis::log("from due to admitted, 99 of 100 backups made", times.clone()));
    waiting.frame(&mut canvas);
    let mut waits = curves(results, &|tally| seconds(&tally.wait_ms));
    // Where retry alone makes nothing, there is nothing to wait for.
    waits.iter_mut().filter(|line| line.style.colour == VERMILION.colour).for_each(|line| {
        line.points.retain(|(utilisation, _)| *utilisation < 1.0);
    });
    waiting.lines(&mut canvas, &waits);
    let exposed = panel(1.0, 1.0, Axis::log("age of the newest recovery point meanwhile, 99 of 100", times));
    exposed.frame(&mut canvas);
    exposed.lines(&mut canvas, &curves(results, &|tally| seconds(&tally.exposed_ms)));
    canvas.note("Each point: independent VMs, each asked once at a random moment. Dotted: attempts that meet applies independently of each other.");
    canvas.finish()
}

/// One line for each policy of the starvation study.
fn curves(results: &Results, value: &dyn Fn(&Tally) -> f64) -> Vec<Series> {
    let named = [
        (Strategy::Strict, "retry alone"),
        (Strategy::StrictBarrier, "retry + barrier"),
        (Strategy::Pause, "pause"),
        (Strategy::Pinned, "pinned view"),
    ];
    let line = |(strategy, name): (Strategy, &str)| {
        let of = results.starvation.iter().filter(|point| point.strategy == strategy);
        let points = of.map(|point| (point.utilisation, value(&point.tally))).collect();
        Series { name: name.into(), style: style(strategy), points }
    };
    named.map(line).into()
}

/// Many applies at once keep every VM busy longer.
fn workers(results: &Results) -> String {
    let mut canvas = Canvas::new(
        860.0,
        460.0,
        "Few apply workers keep collisions rare, whatever the load",
        "100 VMs on one disk, a cycle every 30 s: share of backups whose first attempt meets a running apply",
    );
    let panel = Panel {
        left: 70.0,
        top: 108.0,
        width: 560.0,
        height: 260.0,
        x: Axis::log(
            "VMs of a site whose logs are applied at the same time (apply-workers)",
            ticks(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 100.0], |n| n.to_string()),
        ),
        y: Axis::log("first attempts that collide", ticks(&[0.001, 0.01, 0.1, 1.0], percent)),
    };
    panel.frame(&mut canvas);
    panel.mark(&mut canvas, 2.0, "default");
    let looks = [(0.3, GREEN), (0.6, BLUE), (0.9, PURPLE), (1.2, VERMILION)];
    let mut lines: Vec<Series> = looks
        .into_iter()
        .map(|(load, style)| {
            let of = results.workers.iter().filter(|point| (point.load - load).abs() < 1e-9);
            let points = of.map(|point| (f64::from(point.workers), point.tally.collision_share())).collect();
            Series { name: format!("disk {:.0} % loaded", load * 100.0), style, points }
        })
        .collect();
    let at_most = |workers: f64| workers / 100.0;
    let points = [1.0, 100.0].map(|workers| (workers, at_most(workers))).into();
    lines.push(Series { name: "workers / VMs".into(), style: THEORY, points });
    panel.lines(&mut canvas, &lines);
    canvas.note("Dotted: no more applies run than there are workers, so no larger share of VMs can be busy.");
    canvas.finish()
}

/// Which VMs collide.
fn collisions(results: &Results) -> String {
    let mut canvas = Canvas::new(
        900.0,
        460.0,
        "Which VMs collide: those that change much, on slow disks",
        "First attempts that meet a running apply, by the VM's rate of change; strict views, default settings",
    );
    let kib = |value: f64| match value {
        value if value < 1024.0 => format!("{value} KiB/s"),
        value => format!("{} MiB/s", value / 1024.0),
    };
    let panel = Panel {
        left: 76.0,
        top: 108.0,
        width: 560.0,
        height: 260.0,
        x: Axis::log("changed data of the VM", ticks(&[1.0, 8.0, 64.0, 512.0, 4096.0, 32768.0], kib)),
        y: Axis::log("first attempts that collide", ticks(&[0.0001, 0.001, 0.01, 0.1, 1.0], percent)),
    };
    panel.frame(&mut canvas);
    let looks = [
        (FAST, 30, "fast disk, 30 s", GREEN),
        (FAST, 5, "fast disk, 5 s", BLUE),
        (SLOW, 30, "slow disk, 30 s", ORANGE),
        (SLOW, 5, "slow disk, 5 s", PURPLE),
        (ALL_AT_ONCE, 5, "slow, 5 s, 100 workers", VERMILION),
    ];
    let lines: Vec<Series> = looks
        .into_iter()
        .filter_map(|(disk, seconds, name, style)| {
            let fleet = largest(results, disk, seconds, 0, Strategy::Strict)?;
            Some(Series { name: name.into(), style, points: by_rate(&fleet.tally) })
        })
        .collect();
    panel.lines(&mut canvas, &lines);
    canvas.note("Each point: all VMs of a class twice as wide as the one before; classes with fewer than 10 collisions are left out.");
    canvas.finish()
}

/// The share of collisions in each class with enough of them to tell.
fn by_rate(tally: &Tally) -> Vec<(f64, f64)> {
    let told = (0..RATE_CLASSES).filter(|class| tally.by_rate[*class].1 >= 10);
    told.map(|class| {
        let (tried, collided) = tally.by_rate[class];
        // The middle of a class that ends at 2^class KiB/s.
        ((class as f64 - 0.5).exp2(), collided as f64 / tried as f64)
    })
    .collect()
}

/// What each strategy costs: waiting, and exposure.
fn strategies(results: &Results) -> String {
    let mut canvas = Canvas::new(
        1060.0,
        640.0,
        "What each strategy costs, on a slow site and on an overloaded one",
        "Filled mark: half of all backups stay below; next: 99 of 100; last: 999 of 1000 (not drawn: backups never made)",
    );
    let sites = [
        (
            0.0,
            SLOW,
            30,
            ["slow disks, every 30 s: from due to admitted", "age of the newest recovery point meanwhile"],
        ),
        (
            1.0,
            ALL_AT_ONCE,
            5,
            ["overloaded, every 5 s: from due to admitted", "age of the newest recovery point meanwhile"],
        ),
    ];
    for (row, disk, seconds, [wait, age]) in sites {
        let fleets: Vec<&Fleet> = Strategy::ALL
            .into_iter()
            .filter_map(|strategy| largest(results, disk, seconds, 0, strategy))
            .collect();
        let rows = |of: &dyn Fn(&Tally) -> &Histogram, named: bool| -> Vec<(String, Style, Vec<f64>)> {
            let row = |fleet: &&Fleet| {
                let strategy = fleet.scenario.strategy;
                let name = if named { strategy.name().to_owned() } else { String::new() };
                (name, style(strategy), range(of(&fleet.tally)))
            };
            fleets.iter().map(row).collect()
        };
        let panel = |left, title| Panel {
            left,
            top: 116.0 + 260.0 * row,
            width: 330.0,
            height: 168.0,
            x: Axis::log("", ticks(&[0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 28_800.0], time)),
            y: Axis::linear(title, ticks(&[0.0, 1.0], |n| n.to_string())),
        };
        panel(230.0, wait).ranges(&mut canvas, &rows(&|tally| &tally.wait_ms, true));
        panel(660.0, age).ranges(&mut canvas, &rows(&|tally| &tally.exposed_ms, false));
    }
    canvas.note("Overloaded: all 100 VMs of a site apply at the same time, and the disk has twice the work that it can do. There strict view and hold with retry alone make next to no backup.");
    canvas.finish()
}

/// Half, 99 of 100, and 999 of 1000, in seconds.
fn range(histogram: &Histogram) -> Vec<f64> {
    [0.5, 0.99, 0.999].map(|share| histogram.quantile(share) as f64 / 1000.0).into()
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("\u{2264} {s} s"),
        s if s < 60.0 => format!("{s} s"),
        s if s < 3600.0 => format!("{} min", s / 60.0),
        s => format!("{} h", s / 3600.0),
    }
}

/// The fleet with the most VMs of those that were simulated like this.
pub(crate) fn largest<'a>(
    results: &'a Results,
    disk: &str,
    interval_seconds: i64,
    points: u8,
    strategy: Strategy,
) -> Option<&'a Fleet> {
    let like = |fleet: &&Fleet| {
        let scenario = &fleet.scenario;
        fleet.disk == disk
            && scenario.interval == interval_seconds * SECOND
            && scenario.points == points
            && scenario.strategy == strategy
    };
    results.fleets.iter().filter(like).max_by_key(|fleet| fleet.scenario.vms())
}
