//! Small SVG plots: panels with axes, lines that carry their names, and ranges. No fonts, no scripts, one file.
//!
//! What it does not do: choose ticks, or fit text to its place; whoever draws knows what is drawn.
//!
//! Colours are Okabe and Ito's, which colour-blind people tell apart; lines differ in dashes and markers too.

use std::fmt::Write as _;

const FONT: &str = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif";
const INK: &str = "#1f2933";
const FAINT: &str = "#5f6b7a";
const GRID: &str = "#e4e7eb";

/// How something is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// As SVG writes it.
    pub colour: &'static str,
    /// Lengths of dashes and gaps; empty is a whole line.
    pub dash: &'static str,
    /// What stands at each point.
    pub marker: Marker,
}

/// The shape of a line's points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// Nothing.
    None,
    /// A circle.
    Circle,
    /// A square.
    Square,
    /// A triangle.
    Triangle,
    /// A diamond.
    Diamond,
}

/// Blue with circles.
pub const BLUE: Style = Style { colour: "#0072b2", dash: "", marker: Marker::Circle };
/// Vermilion with squares.
pub const VERMILION: Style = Style { colour: "#d55e00", dash: "", marker: Marker::Square };
/// Green with triangles.
pub const GREEN: Style = Style { colour: "#009e73", dash: "", marker: Marker::Triangle };
/// Purple with diamonds.
pub const PURPLE: Style = Style { colour: "#b0568c", dash: "", marker: Marker::Diamond };
/// Sky blue, dashed.
pub const SKY: Style = Style { colour: "#3b9dd8", dash: "7 4", marker: Marker::Circle };
/// Orange, dashed.
pub const ORANGE: Style = Style { colour: "#c98500", dash: "7 4", marker: Marker::Square };
/// For what is calculated, not simulated.
pub const THEORY: Style = Style { colour: "#5f6b7a", dash: "2 4", marker: Marker::None };

/// Where text is anchored.
#[derive(Debug, Clone, Copy)]
pub enum Anchor {
    /// At its first letter.
    Start,
    /// At its middle.
    Middle,
    /// At its last letter.
    End,
}

/// An SVG file in the making.
pub struct Canvas {
    width: f64,
    height: f64,
    body: String,
}

impl Canvas {
    /// An empty one, in pixels.
    pub fn new(width: f64, height: f64, title: &str, subtitle: &str) -> Self {
        let mut canvas = Self { width, height, body: String::new() };
        canvas.text(24.0, 34.0, Anchor::Start, 18.0, "600", INK, title);
        canvas.text(24.0, 56.0, Anchor::Start, 13.0, "400", FAINT, subtitle);
        canvas
    }

    /// A sentence at its foot.
    pub fn note(&mut self, text: &str) {
        self.text(24.0, self.height - 16.0, Anchor::Start, 11.5, "400", FAINT, text);
    }

    #[allow(clippy::too_many_arguments, reason = "a place, a look and a text")]
    fn text(&mut self, x: f64, y: f64, anchor: Anchor, size: f64, weight: &str, colour: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        self.add(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{colour}">{text}</text>"#
        ));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64, dash: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format_args!(
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>"#
        ));
    }

    fn path(&mut self, points: &[(f64, f64)], style: Style) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.add(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="2.2" stroke-linejoin="round" stroke-dasharray="{}"/>"#,
            points.join(" "),
            style.colour,
            style.dash
        ));
    }

    fn marker(&mut self, (x, y): (f64, f64), style: Style, filled: bool) {
        let (colour, fill) = (style.colour, if filled { style.colour } else { "#ffffff" });
        let shape = |corners: [(f64, f64); 4]| {
            corners.map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).join(" ")
        };
        let points = match style.marker {
            Marker::None => return,
            Marker::Circle => {
                return self.add(format_args!(
                    r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.8"/>"#
                ));
            }
            Marker::Square => shape([(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)]),
            Marker::Triangle => shape([(0.0, -4.8), (4.4, 3.4), (-4.4, 3.4), (0.0, -4.8)]),
            Marker::Diamond => shape([(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)]),
        };
        self.add(format_args!(
            r#"<polygon points="{points}" fill="{fill}" stroke="{colour}" stroke-width="1.8"/>"#
        ));
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{element}"); // writing to a String does not fail
    }

    /// The file.
    #[must_use]
    pub fn finish(self) -> String {
        let Self { width, height, body } = self;
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="{FONT}">
<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>
{body}</svg>
"##
        )
    }
}

/// How values become places.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What is counted, and its unit.
    pub title: &'static str,
    /// The value at its beginning.
    pub from: f64,
    /// The value at its end.
    pub to: f64,
    /// Whether equal ratios have equal lengths.
    pub log: bool,
    /// The values that are named, with their names.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From the first tick to the last.
    #[must_use]
    pub fn linear(title: &'static str, ticks: Vec<(f64, String)>) -> Self {
        Self { title, from: ticks[0].0, to: ticks[ticks.len() - 1].0, log: false, ticks }
    }

    /// The same, with equal ratios at equal distances.
    #[must_use]
    pub fn log(title: &'static str, ticks: Vec<(f64, String)>) -> Self {
        Self { log: true, ..Self::linear(title, ticks) }
    }

    /// Where a value lies between the ends, 0 to 1; what lies beyond them lies at them.
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.max(1e-12).ln() } else { value };
        ((scale(value) - scale(self.from)) / (scale(self.to) - scale(self.from))).clamp(0.0, 1.0)
    }
}

/// A line and its name.
pub struct Series {
    /// What stands at its end.
    pub name: String,
    /// Its look.
    pub style: Style,
    /// Values on both axes, in ascending order of the first.
    pub points: Vec<(f64, f64)>,
}

/// A part of a canvas with axes of its own.
pub struct Panel {
    /// Pixels from the canvas's left to its axes.
    pub left: f64,
    /// Pixels from the canvas's top.
    pub top: f64,
    /// Pixels between its axes' ends.
    pub width: f64,
    /// The same of the other axis.
    pub height: f64,
    /// The axis below.
    pub x: Axis,
    /// The axis at the left.
    pub y: Axis,
}

impl Panel {
    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.left + self.width * self.x.place(x), self.top + self.height * (1.0 - self.y.place(y)))
    }

    fn x_axis(&self, canvas: &mut Canvas) {
        let bottom = self.top + self.height;
        for (value, name) in &self.x.ticks {
            let x = self.left + self.width * self.x.place(*value);
            canvas.line((x, self.top), (x, bottom), GRID, 1.0, "");
            canvas.text(x, bottom + 18.0, Anchor::Middle, 12.0, "400", FAINT, name);
        }
        let middle = self.left + self.width / 2.0;
        canvas.text(middle, bottom + 38.0, Anchor::Middle, 12.5, "500", INK, self.x.title);
    }

    /// Draws the axes.
    pub fn frame(&self, canvas: &mut Canvas) {
        self.x_axis(canvas);
        for (value, name) in &self.y.ticks {
            let y = self.top + self.height * (1.0 - self.y.place(*value));
            canvas.line((self.left, y), (self.left + self.width, y), GRID, 1.0, "");
            canvas.text(self.left - 8.0, y + 4.0, Anchor::End, 12.0, "400", FAINT, name);
        }
        canvas.text(self.left, self.top - 12.0, Anchor::Start, 12.5, "500", INK, self.y.title);
        let bottom = self.top + self.height;
        canvas.line((self.left, bottom), (self.left + self.width, bottom), FAINT, 1.2, "");
    }

    /// Marks a value of the x axis.
    pub fn mark(&self, canvas: &mut Canvas, x: f64, name: &str) {
        let x = self.left + self.width * self.x.place(x);
        canvas.line((x, self.top), (x, self.top + self.height), FAINT, 1.0, "3 3");
        canvas.text(x + 5.0, self.top + 13.0, Anchor::Start, 11.5, "400", FAINT, name);
    }

    /// Draws lines, and their names at their right ends, moved apart where they would overlap.
    pub fn lines(&self, canvas: &mut Canvas, series: &[Series]) {
        let mut names: Vec<(f64, &Series)> = Vec::new();
        for line in series {
            let points: Vec<_> = line.points.iter().map(|point| self.at(*point)).collect();
            canvas.path(&points, line.style);
            for point in &points {
                canvas.marker(*point, line.style, false);
            }
            if let Some((_, y)) = points.last() {
                names.push((*y, line));
            }
        }
        names.sort_by(|a, b| a.0.total_cmp(&b.0));
        let places = spread(&names.iter().map(|(y, _)| *y).collect::<Vec<_>>(), 16.0, self.top + self.height);
        for ((_, line), y) in names.iter().zip(places) {
            let x = self.left + self.width + 22.0;
            canvas.marker((x - 9.0, y), line.style, false);
            canvas.text(x, y + 4.0, Anchor::Start, 12.5, "500", line.style.colour, &line.name);
        }
    }

    /// Draws one row per name, each with ranges: from the first to the last value, a mark at each.
    pub fn ranges(&self, canvas: &mut Canvas, rows: &[(String, Style, Vec<f64>)]) {
        self.x_axis(canvas);
        canvas.text(self.left, self.top - 12.0, Anchor::Start, 12.5, "600", INK, self.y.title);
        let step = self.height / rows.len() as f64;
        for (place, (name, style, values)) in rows.iter().enumerate() {
            let y = self.top + step * (place as f64 + 0.5);
            let at = |value: f64| (self.left + self.width * self.x.place(value), y);
            canvas.text(self.left - 12.0, y + 4.0, Anchor::End, 12.5, "500", style.colour, name);
            let (Some(first), Some(last)) = (values.first(), values.last()) else { continue };
            canvas.line(at(*first), at(*last), style.colour, 2.4, "");
            for (nth, value) in values.iter().enumerate() {
                canvas.marker(at(*value), *style, nth == 0);
            }
        }
    }
}

/// Moves ascending places apart to at least `gap`, no further than needed, and not beyond `end`.
fn spread(places: &[f64], gap: f64, end: f64) -> Vec<f64> {
    let mut moved = places.to_vec();
    for nth in 1..moved.len() {
        moved[nth] = moved[nth].max(moved[nth - 1] + gap);
    }
    let mut limit = end;
    for place in moved.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - gap;
    }
    moved
}

/// Ticks at these values, named by a function.
#[must_use]
pub fn ticks(values: &[f64], name: impl Fn(f64) -> String) -> Vec<(f64, String)> {
    values.iter().map(|value| (*value, name(*value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_overlap_and_stay_on_the_panel() {
        let moved = spread(&[10.0, 11.0, 95.0, 96.0], 16.0, 100.0);
        assert_eq!(moved, [10.0, 26.0, 84.0, 100.0]);
    }

    #[test]
    fn a_log_axis_puts_equal_ratios_at_equal_distances() {
        let axis = Axis::log("", ticks(&[1.0, 10.0, 100.0], |v| v.to_string()));
        assert!((axis.place(10.0) - 0.5).abs() < 1e-12);
        assert_eq!((axis.place(0.0), axis.place(1e9)), (0.0, 1.0));
    }

    #[test]
    fn text_is_escaped() {
        let svg = Canvas::new(10.0, 10.0, "a < b & c", "").finish();
        assert!(svg.contains("a &lt; b &amp; c"));
    }
}
