//! The result: one row per figure, with its ratio to the peer's and what is wanted of it.

use std::fmt::{self, Write as _};

/// A figure beside another one.
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Ours.
    pub ours: f64,
    /// The peer and its figure, measured in the same run.
    pub peer: Option<(String, f64)>,
    /// The unit of both.
    pub unit: &'static str,
    /// What is wanted of the ratio (or of our figure, without a peer).
    pub wanted: Option<Wanted>,
    /// What this machine could do at most, in the same unit.
    pub limit: Option<f64>,
}

/// A bound. It is held against the figure as it is printed.
#[derive(Clone, Copy)]
pub enum Wanted {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

/// All rows, and what has to be said about them.
#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
    notes: Vec<String>,
    plots: Vec<(&'static str, String)>,
}

impl Table {
    /// Adds a row and shows it at once.
    pub fn add(&mut self, row: Row) {
        eprintln!("{row}");
        self.rows.push(row);
    }

    /// Adds a figure without a peer.
    pub fn figure(&mut self, what: impl Into<String>, ours: f64, unit: &'static str, wanted: Option<Wanted>) {
        self.add(Row { what: what.into(), ours, peer: None, unit, wanted, limit: None });
    }

    /// Adds a sentence below the table.
    pub fn note(&mut self, note: &str) {
        eprintln!("note: {note}");
        self.notes.push(note.to_owned());
    }

    /// Adds an SVG file.
    pub fn plot(&mut self, name: &'static str, svg: String) {
        self.plots.push((name, svg));
    }

    /// All SVG files, and one of the ratios to peers if there are any.
    pub fn plots(&self) -> Vec<(&'static str, String)> {
        let mut plots = self.plots.clone();
        plots.extend(self.ratios().map(|svg| ("ratios.svg", svg)));
        plots
    }

    /// Every ratio that has a bound, and the bound: a row for each.
    fn ratios(&self) -> Option<String> {
        let of = |row: &Row| {
            let (ratio, (peer, _)) = (row.ratio()?, row.peer.as_ref()?);
            let bound = match row.wanted? {
                Wanted::AtMost(bound) | Wanted::AtLeast(bound) => bound,
            };
            let style = if row.mark() == Some("met") { plot::GREEN } else { plot::VERMILION };
            Some((format!("{} / {peer}", row.what), style, vec![ratio, bound]))
        };
        let rows: Vec<_> = self.rows.iter().filter_map(of).collect();
        if rows.is_empty() {
            return None;
        }
        let height = 26.0 * rows.len() as f64;
        let (title, foot) =
            ("Beside the peers", "Filled: what was measured; hollow: the bound. Logarithmic.");
        let mut canvas =
            plot::Canvas::new(1040.0, height + 200.0, title, "Our figure as a ratio to theirs, one run");
        let values = plot::ticks(&[0.001, 0.01, 0.1, 1.0, 10.0], |value| value.to_string());
        let panel = plot::Panel {
            left: 560.0,
            top: 96.0,
            width: 430.0,
            height,
            x: plot::Axis::log("ratio", values),
            y: plot::Axis::linear("", plot::ticks(&[0.0, 1.0], |value| value.to_string())),
        };
        panel.ranges(&mut canvas, &rows);
        canvas.note(foot);
        Some(canvas.finish())
    }

    /// As a table in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| measured | ours | peer | ratio | wanted | | share of the limit |\n|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let peer = row.peer.as_ref().map(|(name, figure)| format!("{name} {figure:.2} {}", row.unit));
            let ratio = row.ratio().map(|ratio| format!("{ratio:.3}"));
            let wanted = row.wanted.map(|wanted| wanted.to_string());
            let mark = row.mark().unwrap_or_default();
            let share = row.share().map(|share| format!("{:.0} %", share * 100.0)).unwrap_or_default();
            let _ = writeln!(
                text,
                "| {} | {:.2} {} | {} | {} | {} | {mark} | {share} |",
                row.what,
                row.ours,
                row.unit,
                peer.unwrap_or_default(),
                ratio.unwrap_or_default(),
                wanted.unwrap_or_default()
            );
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        self.notes.iter().for_each(|note| text.push_str(&format!("- {note}\n")));
        text
    }
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().map(|(_, theirs)| self.ours / theirs)
    }

    /// How much of what the machine can do is reached: of a rate the rate's part, of a time the limit's.
    fn share(&self) -> Option<f64> {
        let limit = self.limit?;
        Some(if self.unit.ends_with("/s") { self.ours / limit } else { limit / self.ours })
    }

    /// Whether it is as wanted, if anything is wanted.
    fn mark(&self) -> Option<&'static str> {
        let printed = match self.ratio() {
            Some(ratio) => (ratio * 1000.0).round() / 1000.0,
            None => (self.ours * 100.0).round() / 100.0,
        };
        let met = match self.wanted? {
            Wanted::AtMost(bound) => printed <= bound,
            Wanted::AtLeast(bound) => printed >= bound,
        };
        Some(if met { "met" } else { "MISSED" })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(f, "<= {bound}"),
            Self::AtLeast(bound) => write!(f, ">= {bound}"),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<60} {:>10.2} {:<5}", self.what, self.ours, self.unit)?;
        match (&self.peer, self.ratio()) {
            (Some((peer, theirs)), Some(ratio)) => {
                write!(f, " {peer:<12} {theirs:>10.2}  ratio {ratio:>7.3}")?
            }
            _ => write!(f, " {:<38}", "")?,
        }
        if let (Some(wanted), Some(mark)) = (self.wanted, self.mark()) {
            write!(f, "  wanted {:<8} {mark}", wanted.to_string())?;
        }
        match self.share() {
            Some(share) => write!(f, "  {:.0} % of the limit", share * 100.0),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:-<140}", "")?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{}", row.to_string().trim_end()))?;
        write!(f, "{:-<140}", "")?;
        self.notes.iter().try_for_each(|note| write!(f, "\n* {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: f64, peer: Option<f64>, wanted: Option<Wanted>) -> Row {
        Row {
            what: "full".into(),
            ours,
            peer: peer.map(|figure| ("restic".into(), figure)),
            unit: "s",
            wanted,
            limit: None,
        }
    }

    #[test]
    fn with_a_peer_the_ratio_is_held_against_the_bound() {
        assert_eq!(row(5.0, Some(10.0), Some(Wanted::AtMost(0.5))).mark(), Some("met"));
        assert_eq!(row(5.1, Some(10.0), Some(Wanted::AtMost(0.5))).mark(), Some("MISSED"));
        assert_eq!(row(8.0, Some(10.0), Some(Wanted::AtLeast(0.8))).mark(), Some("met"));
        assert_eq!(row(7.9, Some(10.0), Some(Wanted::AtLeast(0.8))).mark(), Some("MISSED"));
    }

    #[test]
    fn without_one_the_figure_is_as_it_is_printed() {
        assert_eq!(row(200.0, None, Some(Wanted::AtMost(200.0))).mark(), Some("met"));
        assert_eq!(row(2.004, None, Some(Wanted::AtMost(2.0))).mark(), Some("met"));
        assert_eq!(row(2.006, None, Some(Wanted::AtMost(2.0))).mark(), Some("MISSED"));
        assert_eq!(row(1.0, None, None).mark(), None);
        assert_eq!(row(f64::NAN, None, Some(Wanted::AtMost(2.0))).mark(), Some("MISSED"));
    }

    #[test]
    fn a_share_of_the_limit_is_of_a_rate_or_of_a_time() {
        let time = Row { limit: Some(2.0), ..row(5.0, None, None) };
        assert_eq!(time.share(), Some(0.4));
        let rate = Row { unit: "MB/s", limit: Some(10.0), ..row(5.0, None, None) };
        assert_eq!(rate.share(), Some(0.5));
        assert!(rate.to_string().ends_with("50 % of the limit"));
    }

    #[test]
    fn markdown_has_every_row_and_note() {
        let mut table = Table::default();
        table.add(row(5.0, Some(10.0), Some(Wanted::AtMost(0.5))));
        table.figure("memory", 150.0, "MB", None);
        table.note("warm");
        let text = table.markdown();
        assert!(text.contains("| full | 5.00 s | restic 10.00 s | 0.500 | <= 0.5 | met |  |"), "{text}");
        assert!(text.contains("| memory | 150.00 MB |  |  |  |  |  |"), "{text}");
        assert!(text.ends_with("\n\n- warm\n"), "{text}");
    }

    #[test]
    fn ratios_with_a_bound_are_drawn() {
        let mut table = Table::default();
        table.add(row(5.0, None, Some(Wanted::AtMost(0.5))));
        assert!(table.plots().is_empty());
        table.plot("a.svg", "<svg/>".into());
        table.add(row(5.0, Some(10.0), Some(Wanted::AtMost(0.5))));
        let plots = table.plots();
        assert_eq!(plots.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["a.svg", "ratios.svg"]);
        assert!(plots[1].1.contains("full / restic"), "{}", plots[1].1);
    }
}
