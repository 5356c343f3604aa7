//! Pictures as SVG: axes with units, a grid, a legend, and values that can be read at a glance.

use crate::figures::{Axis, Plot, Series, Shape};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 440.0;
/// What lies around the area that is drawn into: left, right (with the legend), above, below.
const MARGINS: (f64, f64, f64, f64) = (78.0, 196.0, 48.0, 62.0);
/// Colours that are told apart with any kind of eyes, and in print.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8c6bb1"];
/// How a value stands on a bar, whatever is behind it.
const VALUE: &str =
    "text-anchor=\"middle\" font-size=\"10\" paint-order=\"stroke\" stroke=\"#fff\" stroke-width=\"3\"";
/// Characters of a name in the legend.
const NAME: usize = 26;

/// A direction: what is at which end, and how long it is.
struct Scale {
    least: f64,
    most: f64,
    log: bool,
    /// Pixels of the two ends.
    from: f64,
    to: f64,
}

impl Scale {
    fn new(figures: impl Iterator<Item = f64>, log: bool, (from, to): (f64, f64)) -> Self {
        let figures: Vec<f64> = figures.filter(|one| one.is_finite() && (!log || *one > 0.0)).collect();
        let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let most = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (least, most) = match (least <= most, log) {
            (false, _) => (if log { 1.0 } else { 0.0 }, 10.0),
            (true, true) => (nice(least, false), nice(most * 1.05, true)),
            (true, false) => (least.min(0.0), if most > 0.0 { most * 1.08 } else { 1.0 }),
        };
        // Something to divide by.
        let most = if most > least {
            most
        } else if log {
            least * 10.0
        } else {
            least + 1.0
        };
        Self { least, most, log, from, to }
    }

    fn at(&self, figure: f64) -> f64 {
        let (least, most, figure) = if self.log {
            (self.least.log10(), self.most.log10(), figure.max(self.least).log10())
        } else {
            (self.least, self.most, figure)
        };
        self.from + (figure - least) / (most - least) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = self.most.log10() - self.least.log10();
            let steps: &[f64] = if decades <= 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let powers = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
            let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
            return all.filter(|tick| *tick >= self.least * 0.999 && *tick <= self.most * 1.001).collect();
        }
        let rough = (self.most - self.least) / 5.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|one| one * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        let first = (self.least / step).ceil() as i64;
        (first..first + 20).map(|number| number as f64 * step).take_while(|tick| *tick <= self.most).collect()
    }
}

/// The next number that begins with 1, 2 or 5, up or down.
fn nice(figure: f64, up: bool) -> f64 {
    let power = 10_f64.powf(figure.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    if up {
        steps.into_iter().find(|step| *step >= figure * 0.999).unwrap_or(figure)
    } else {
        steps.into_iter().rev().find(|step| *step <= figure * 1.001).unwrap_or(figure)
    }
}

/// A number as it stands at an axis or on a bar.
fn number(figure: f64) -> String {
    let magnitude = figure.abs();
    match magnitude {
        _ if magnitude >= 1e6 => format!("{}M", trimmed(figure / 1e6, 1)),
        _ if magnitude >= 1e4 => format!("{}k", trimmed(figure / 1e3, 1)),
        _ if magnitude >= 100.0 => trimmed(figure, 0),
        _ if magnitude >= 10.0 => trimmed(figure, 1),
        _ if magnitude >= 1.0 => trimmed(figure, 2),
        _ => trimmed(figure, 3),
    }
}

fn trimmed(figure: f64, digits: usize) -> String {
    let text = format!("{figure:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn text(out: &mut String, (x, y): (f64, f64), more: &str, words: &str) {
    out.push_str(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\" {more}>{}</text>\n", escaped(words)));
}

fn line(out: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64), more: &str) {
    out.push_str(&format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {more}/>\n"));
}

/// The whole file.
pub fn svg(plot: &Plot) -> String {
    let (left, right, above, below) = MARGINS;
    let (end, bottom) = (WIDTH - right, HEIGHT - below);
    let heights = plot.series.iter().flat_map(|series| series.points.iter().map(|(_, y)| y.0));
    let vertical = heights.chain(plot.marks.iter().map(|(_, height)| *height));
    let y = Scale::new(vertical, plot.y.log, (bottom, above));
    let places = plot.series.iter().flat_map(|series| series.points.iter().map(|(x, _)| *x));
    let mut x = Scale::new(places.clone(), plot.x.log, (left, end));
    // To the right there is nothing to round: the ends are what was measured.
    let most = places.fold(f64::NEG_INFINITY, f64::max);
    if most > x.least {
        x.most = most;
    }
    if !plot.x.names.is_empty() {
        (x.least, x.most) = (-0.5, plot.x.names.len() as f64 - 0.5);
    }
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    text(&mut out, (left, 26.0), "font-size=\"16\" font-weight=\"600\"", &plot.title);
    axes(&mut out, plot, &x, &y);
    for (name, height) in &plot.marks {
        let at = y.at(*height);
        line(
            &mut out,
            (left, at),
            (end, at),
            "stroke=\"#b00020\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"",
        );
        text(&mut out, (end + 6.0, at + 4.0), "fill=\"#b00020\" font-size=\"11\"", name);
    }
    match plot.shape {
        Shape::Lines => lines(&mut out, &plot.series, &x, &y),
        Shape::Bars => bars(&mut out, &plot.series, &x, &y),
    }
    legend(&mut out, plot, &y);
    out.push_str("</svg>\n");
    out
}

fn axes(out: &mut String, plot: &Plot, x: &Scale, y: &Scale) {
    let (left, end, bottom, top) = (x.from, x.to, y.from, y.to);
    for tick in y.ticks() {
        let at = y.at(tick);
        line(out, (left, at), (end, at), "stroke=\"#e3e3e3\"");
        text(out, (left - 8.0, at + 4.5), "text-anchor=\"end\"", &number(tick));
    }
    let named = |Axis { names, .. }: &Axis| {
        names.iter().enumerate().map(|(at, name)| (at as f64, name.clone())).collect::<Vec<_>>()
    };
    let ticks = if plot.x.names.is_empty() {
        let own = |tick: f64| (tick, number(tick));
        if plot.x.log {
            measured(&plot.series).into_iter().map(own).collect()
        } else {
            x.ticks().into_iter().map(own).collect()
        }
    } else {
        named(&plot.x)
    };
    for (tick, name) in ticks {
        let at = x.at(tick);
        line(out, (at, bottom), (at, bottom + 5.0), "stroke=\"#666\"");
        text(out, (at, bottom + 20.0), "text-anchor=\"middle\"", &name);
    }
    line(out, (left, bottom), (end, bottom), "stroke=\"#666\"");
    line(out, (left, bottom), (left, top), "stroke=\"#666\"");
    text(out, ((left + end) / 2.0, HEIGHT - 16.0), "text-anchor=\"middle\"", &plot.x.label);
    let (at, middle) = (18.0, (bottom + top) / 2.0);
    let turned = format!("text-anchor=\"middle\" transform=\"rotate(-90 {at} {middle:.1})\"");
    text(out, (at, middle), &turned, &plot.y.label);
}

/// On a logarithmic axis to the right what was measured is named, and nothing between.
fn measured(series: &[Series]) -> Vec<f64> {
    let mut all: Vec<f64> = series.iter().flat_map(|one| one.points.iter().map(|(x, _)| *x)).collect();
    all.sort_unstable_by(f64::total_cmp);
    all.dedup();
    all
}

fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

fn lines(out: &mut String, series: &[Series], x: &Scale, y: &Scale) {
    for (at, one) in series.iter().enumerate() {
        let points = one.points.iter().filter(|(_, height)| height.0.is_finite());
        let points: Vec<_> = points.map(|(place, height)| (x.at(*place), y.at(height.0))).collect();
        let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        // More than eight are told apart by their strokes.
        let dashes = if at >= COLOURS.len() { " stroke-dasharray=\"5 3\"" } else { "" };
        let colour = colour(at);
        out.push_str(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.2\"{dashes}/>\n",
            path.join(" ")
        ));
        if points.len() <= 40 {
            for (x, y) in points {
                out.push_str(&format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\"/>\n"));
            }
        }
    }
}

fn bars(out: &mut String, series: &[Series], x: &Scale, y: &Scale) {
    let group = (x.at(1.0) - x.at(0.0)).abs() * 0.8;
    let width = (group / series.len().max(1) as f64).min(64.0);
    let begin = -width * series.len() as f64 / 2.0;
    for (at, one) in series.iter().enumerate() {
        for (place, height) in one.points.iter().filter(|(_, height)| height.0.is_finite()) {
            let (left, top) = (x.at(*place) + begin + width * at as f64, y.at(height.0));
            let tall = (y.from - top).max(1.0);
            out.push_str(&format!(
                "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{tall:.1}\" fill=\"{}\"/>\n",
                width - 2.0,
                colour(at)
            ));
            let middle = left + width / 2.0 - 1.0;
            if width >= 26.0 {
                text(out, (middle, top - 4.0), VALUE, &number(height.0));
            }
        }
    }
}

/// Names, from above in the order of the lines' right ends, so that the eye finds them.
fn legend(out: &mut String, plot: &Plot, y: &Scale) {
    let mut order: Vec<usize> = (0..plot.series.len()).collect();
    if plot.shape == Shape::Lines {
        let last = |at: &usize| plot.series[*at].points.last().map_or(f64::NAN, |(_, height)| height.0);
        order.sort_by(|one, other| last(other).total_cmp(&last(one)));
    }
    // Marks stand at their own height; the legend does not stand on them.
    let taken: Vec<f64> = plot.marks.iter().map(|(_, height)| y.at(*height)).collect();
    let mut at = MARGINS.2 + 6.0;
    for series in order {
        while taken.iter().any(|mark| (mark - at).abs() < 16.0) {
            at += 8.0;
        }
        let left = WIDTH - MARGINS.1 + 16.0;
        out.push_str(&format!(
            "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"14\" height=\"10\" fill=\"{}\"/>\n",
            at - 5.0,
            colour(series)
        ));
        let name: String = plot.series[series].name.chars().take(NAME).collect();
        text(out, (left + 20.0, at + 4.5), "font-size=\"12\"", &name);
        at += 20.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(shape: Shape, x: Axis, y: Axis, series: Vec<Series>) -> Plot {
        let marks = vec![("budget <1>".to_owned(), 3.0)];
        Plot { file: "f".to_owned(), title: "A & B".to_owned(), shape, x, y, series, marks }
    }

    #[test]
    fn says_what_is_seen() {
        let series = vec![Series::new("single", [(1.0, 10.0), (64.0, 1_000.0)])];
        let drawn = svg(&plot(Shape::Lines, Axis::log("callers"), Axis::log("calls/s"), series));
        for word in
            ["A &amp; B", ">callers<", ">calls/s<", ">single<", "budget &lt;1&gt;", ">64<", "polyline"]
        {
            assert!(drawn.contains(word), "{word} is not in\n{drawn}");
        }
    }

    #[test]
    fn larger_is_higher_and_inside() {
        for log in [false, true] {
            let scale = Scale::new([3.0, 70.0, 900.0].into_iter(), log, (400.0, 40.0));
            let at = [3.0, 70.0, 900.0].map(|figure| scale.at(figure));
            assert!(at[0] > at[1] && at[1] > at[2] && at[0] <= 400.0 && at[2] >= 40.0, "{at:?}");
            let ticks = scale.ticks();
            assert!((3..=12).contains(&ticks.len()), "{ticks:?}");
        }
    }

    #[test]
    fn draws_nothing_without_failing() {
        for series in [vec![], vec![Series::heights("none", [f64::NAN, 0.0])]] {
            for shape in [Shape::Lines, Shape::Bars] {
                let drawn = svg(&plot(shape, Axis::names("", ["a", "b"]), Axis::log("y"), vec![]));
                assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
            }
            let drawn = svg(&plot(Shape::Bars, Axis::names("", ["a"]), Axis::linear("y"), series));
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 0.05, 1.013, 2.5, 64.0, 1_234.0, 34_500.0, 2e6].map(number);
        assert_eq!(numbers, ["0", "0.05", "1.01", "2.5", "64", "1234", "34.5k", "2M"]);
        assert_eq!([nice(3.2, true), nice(3.2, false), nice(0.07, true)], [5.0, 2.0, 0.1]);
    }
}
