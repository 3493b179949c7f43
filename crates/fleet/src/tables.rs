//! The tables of docs/fleet/results.md.

use std::fmt::{self, Write as _};

use model::gate::Condition;

use crate::clock::SECOND;
use crate::histogram::Histogram;
use crate::studies::{Fleet, Results, closed_form_done};
use crate::tally::Tally;

/// Everything as tables.
#[must_use]
pub fn markdown(results: &Results, seed: u64) -> String {
    let mut text = String::new();
    write(&mut text, results, seed).expect("writing to a String does not fail");
    text
}

fn write(out: &mut String, results: &Results, seed: u64) -> fmt::Result {
    writeln!(out, "# Results of the fleet simulation\n")?;
    writeln!(out, "Made by `make fleet` with seed {seed}; [the page](../fleet.md) says what they mean.\n")?;
    let mut done: Vec<(&str, i64, u8, u32)> = Vec::new();
    for fleet in &results.fleets {
        let scenario = &fleet.scenario;
        let like = (fleet.disk, scenario.interval / SECOND, scenario.points, scenario.vms());
        if !done.contains(&like) {
            done.push(like);
            let same: Vec<&Fleet> = results.fleets.iter().filter(|other| same_fleet(fleet, other)).collect();
            fleet_table(out, &same)?;
        }
    }
    starvation_table(out, results)?;
    workers_table(out, results)
}

fn same_fleet(one: &Fleet, other: &Fleet) -> bool {
    let key = |fleet: &Fleet| (fleet.scenario.interval, fleet.scenario.points, fleet.scenario.vms());
    one.disk == other.disk && key(one) == key(other)
}

fn fleet_table(out: &mut String, fleets: &[&Fleet]) -> fmt::Result {
    let Some(first) = fleets.first() else { return Ok(()) };
    let scenario = &first.scenario;
    let points = match scenario.points {
        0 => "the latest point only".to_owned(),
        hours => format!("{hours} hourly points"),
    };
    writeln!(
        out,
        "## {} VMs, a cycle every {} s, {}, {points}\n",
        thousands(scenario.vms().into()),
        scenario.interval / SECOND,
        first.disk
    )?;
    writeln!(
        out,
        "{} sites of {} VMs, {} apply workers each; a VM's apply runs {} of the time (strict view).\n",
        scenario.sites,
        scenario.vms_per_site,
        scenario.apply_workers,
        percent(first.tally.busy_share()),
    )?;
    writeln!(
        out,
        "| strategy | first attempts that collide | attempts mean / p99 / max | made in the window | starved | due to admitted p50 / p99 | due to done p50 / p99 | age of the newest point meanwhile p50 / p99 / max | age of what was read p50 / p99 | flat files behind afterwards p50 / p99 |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|---|---|")?;
    for fleet in fleets {
        row(out, fleet.scenario.strategy.name(), &fleet.tally)?;
    }
    let (vain, orphans) = fleets.iter().fold((0, 0), |(vain, orphans), fleet| {
        (vain + fleet.tally.barrier_in_vain, orphans + fleet.tally.orphaned_holds)
    });
    writeln!(
        out,
        "\nRefusals: {}. Barriers in vain: {vain}; holds left behind by a site that died: {orphans}.\n",
        refusals(fleets)
    )
}

fn row(out: &mut String, name: &str, tally: &Tally) -> fmt::Result {
    let attempts = &tally.attempts;
    writeln!(
        out,
        "| {name} | {} | {:.3} / {} / {} | {} | {} | {} | {} | {} | {} | {} |",
        percent(tally.collision_share()),
        attempts.mean(),
        attempts.quantile(0.99),
        attempts.max(),
        percent(tally.window_share()),
        thousands(tally.starved),
        quantiles(&tally.wait_ms, &[0.5, 0.99]),
        quantiles(&tally.done_ms, &[0.5, 0.99]),
        quantiles(&tally.exposed_ms, &[0.5, 0.99, 1.0]),
        quantiles(&tally.point_age_ms, &[0.5, 0.99]),
        quantiles(&tally.behind_ms, &[0.5, 0.99]),
    )
}

/// Which conditions refused, over all strategies of a fleet.
fn refusals(fleets: &[&Fleet]) -> String {
    let counted = Condition::ALL.iter().enumerate().filter_map(|(place, condition)| {
        let count: u64 = fleets.iter().map(|fleet| fleet.tally.refusals[place]).sum();
        (count > 0).then(|| format!("{condition} {}", thousands(count)))
    });
    let all: Vec<String> = counted.collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

fn starvation_table(out: &mut String, results: &Results) -> fmt::Result {
    writeln!(out, "## One VM by itself, a cycle every 30 s, by apply utilisation\n")?;
    writeln!(
        out,
        "| utilisation | strategy | first attempts that collide | attempts mean / p99 | backups made | by 1 \u{2212} u\u{b9}\u{2076} | due to admitted p50 / p99 | age of the newest point meanwhile p99 |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|")?;
    for point in &results.starvation {
        let tally = &point.tally;
        writeln!(
            out,
            "| {} | {} | {} | {:.2} / {} | {} | {} | {} | {} |",
            percent(point.utilisation),
            point.strategy.name(),
            percent(tally.collision_share()),
            tally.attempts.mean(),
            tally.attempts.quantile(0.99),
            percent(tally.done_share()),
            percent(closed_form_done(point.utilisation, 16)),
            quantiles(&tally.wait_ms, &[0.5, 0.99]),
            quantiles(&tally.exposed_ms, &[0.99]),
        )?;
    }
    writeln!(out)
}

fn workers_table(out: &mut String, results: &Results) -> fmt::Result {
    writeln!(out, "## A hundred VMs on one disk, a cycle every 30 s, by apply workers\n")?;
    writeln!(
        out,
        "| load of the disk | workers | first attempts that collide | attempts mean / p99 | backups made |"
    )?;
    writeln!(out, "|---|---|---|---|---|")?;
    for point in &results.workers {
        let tally = &point.tally;
        writeln!(
            out,
            "| {} | {} | {} | {:.2} / {} | {} |",
            percent(point.load),
            point.workers,
            percent(tally.collision_share()),
            tally.attempts.mean(),
            tally.attempts.quantile(0.99),
            percent(tally.done_share()),
        )?;
    }
    Ok(())
}

/// A share with as many digits as say something.
pub(crate) fn percent(share: f64) -> String {
    let value = share * 100.0;
    match value {
        0.0 => "0".into(),
        v if v < 0.095 => format!("{v:.3} %"),
        v if v < 0.95 => format!("{v:.2} %"),
        v if v < 9.95 => format!("{v:.1} %"),
        v if !(99.5..100.0).contains(&v) => format!("{v:.0} %"),
        v if v < 99.99 => format!("{v:.2} %"),
        _ => "> 99.99 %".into(),
    }
}

fn quantiles(histogram: &Histogram, shares: &[f64]) -> String {
    let shown: Vec<String> = shares.iter().map(|share| time(histogram.quantile(*share))).collect();
    shown.join(" / ")
}

/// Milliseconds for people.
pub(crate) fn time(millis: u64) -> String {
    let seconds = millis as f64 / 1000.0;
    match seconds {
        0.0 => "0".into(),
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(
            [0.0, 0.0004, 0.034, 0.5, 0.9987, 0.999_999, 1.0, 1.5].map(percent),
            ["0", "0.040 %", "3.4 %", "50 %", "99.87 %", "> 99.99 %", "100 %", "150 %"]
        );
        assert_eq!(
            [0, 1500, 95_000, 600_000, 9_000_000].map(time),
            ["0", "1.5 s", "95 s", "10 min", "2.5 h"]
        );
    }
}
