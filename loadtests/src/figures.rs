//! What a scenario has found: tables, plots and budgets, as they are printed, kept as JSON and rendered again.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A run of some or all scenarios.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Run {
    /// What ran and where, line by line.
    pub machine: Vec<String>,
    /// In the order in which they ran.
    pub outcomes: Vec<Outcome>,
}

/// What one scenario has found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// A word for the command line and for file names, with the language of the server where it is not Rust.
    pub name: String,
    /// What it is about.
    pub title: String,
    /// What was done, in a few sentences.
    pub text: String,
    /// The figures.
    pub tables: Vec<Table>,
    /// Pictures of them.
    pub plots: Vec<Plot>,
    /// What must be true of them.
    pub budgets: Vec<Budget>,
    /// Why there are no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Seconds that it took.
    pub seconds: f64,
    /// The load average of the machine before and after.
    pub load: [String; 2],
}

/// A table.
#[derive(Debug, Serialize, Deserialize)]
pub struct Table {
    /// What is in it.
    pub title: String,
    /// Names of columns, with units, and digits behind the point of what is in them.
    pub columns: Vec<(String, usize)>,
    /// The rows.
    pub rows: Vec<Vec<Cell>>,
}

/// What stands in a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Cell {
    /// A word.
    Text(String),
    /// A figure, where there is one.
    Number(Option<f64>),
}

/// A picture.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plot {
    /// The file's name without its ending.
    pub file: String,
    /// What is seen.
    pub title: String,
    /// Lines with points, or bars beside each other.
    pub shape: Shape,
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// What is drawn.
    pub series: Vec<Series>,
    /// Heights that matter, with what they mean.
    pub marks: Vec<(String, f64)>,
}

/// How a picture is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Lines through points.
    Lines,
    /// Groups of bars.
    Bars,
}

/// An axis.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Axis {
    /// What it is, with its unit.
    pub label: String,
    /// Powers of ten are equally far from each other.
    pub log: bool,
    /// Names of the places 0, 1, ..., if it has no numbers.
    pub names: Vec<String>,
}

/// Points that belong together.
#[derive(Debug, Serialize, Deserialize)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, Figure)>,
}

/// A number, or not a number, which JSON does not have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure(pub f64);

/// What must be true of a figure.
#[derive(Debug, Serialize, Deserialize)]
pub struct Budget {
    /// What the figure is.
    pub what: String,
    /// How large it is.
    pub figure: Figure,
    /// How large it may or must be.
    pub limit: f64,
    /// Whether it must be at least that large; otherwise at most.
    pub at_least: bool,
    /// The unit, if it has one.
    pub unit: String,
    /// Whether the run fails with it. Times that depend on the machine alone are only shown.
    pub decides: bool,
}

impl Axis {
    /// An axis of numbers.
    pub fn linear(label: &str) -> Self {
        Self { label: label.to_owned(), ..Self::default() }
    }

    /// An axis of numbers that differ by orders of magnitude.
    pub fn log(label: &str) -> Self {
        Self { log: true, ..Self::linear(label) }
    }

    /// An axis of names.
    pub fn names(label: &str, names: impl IntoIterator<Item = impl ToString>) -> Self {
        Self { names: names.into_iter().map(|name| name.to_string()).collect(), ..Self::linear(label) }
    }
}

impl Series {
    /// Points that belong together.
    pub fn new(name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let points = points.into_iter().map(|(x, y)| (x, Figure(y))).collect();
        Self { name: name.to_owned(), points }
    }

    /// Heights of bars, from the first name of the axis on.
    pub fn heights(name: &str, heights: impl IntoIterator<Item = f64>) -> Self {
        Self::new(name, heights.into_iter().enumerate().map(|(at, height)| (at as f64, height)))
    }
}

impl Budget {
    /// It must be at least this.
    pub fn at_least(what: &str, figure: f64, limit: f64) -> Self {
        Self { at_least: true, ..Self::at_most(what, figure, limit) }
    }

    /// It may be at most this.
    pub fn at_most(what: &str, figure: f64, limit: f64) -> Self {
        let (what, figure) = (what.to_owned(), Figure(figure));
        Self { what, figure, limit, at_least: false, unit: String::new(), decides: true }
    }

    /// With a unit.
    pub fn unit(mut self, unit: &str) -> Self {
        unit.clone_into(&mut self.unit);
        self
    }

    /// The run does not fail with it.
    pub fn shown(mut self) -> Self {
        self.decides = false;
        self
    }

    /// Whether it is kept. What was not measured is not.
    pub fn met(&self) -> bool {
        if self.at_least { self.figure.0 >= self.limit } else { self.figure.0 <= self.limit }
    }

    /// One line.
    pub fn line(&self) -> String {
        let Self { what, figure, limit, unit, .. } = self;
        let verdict = match (self.met(), self.decides) {
            (true, _) => "met",
            (false, true) => "MISSED",
            (false, false) => "missed (only shown)",
        };
        let (rule, space) = (if self.at_least { "≥" } else { "≤" }, if unit.is_empty() { "" } else { " " });
        format!("{what}: {:.3}{space}{unit} {rule} {limit}{space}{unit}: {verdict}", figure.0)
    }
}

impl Table {
    /// An empty table; columns are names, with units, and digits behind the point.
    pub fn new(title: &str, columns: &[(&str, usize)]) -> Self {
        let columns = columns.iter().map(|(name, digits)| ((*name).to_owned(), *digits)).collect();
        Self { title: title.to_owned(), columns, rows: vec![] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// As it is printed: columns under each other, or a table of Markdown.
    pub fn render(&self, markdown: bool) -> String {
        let head = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let shown = |row: &Vec<Cell>| {
            let cells = row.iter().zip(&self.columns).map(|(cell, (_, digits))| cell.show(*digits));
            cells.collect::<Vec<_>>()
        };
        let rows: Vec<Vec<String>> = std::iter::once(head).chain(self.rows.iter().map(shown)).collect();
        let is_text =
            |column: usize| self.rows.iter().all(|row| matches!(row.get(column), Some(Cell::Text(_)) | None));
        let width = |column: usize| {
            let widths = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            widths.max().unwrap_or_default().max(3)
        };
        let columns: Vec<_> =
            (0..self.columns.len()).map(|column| (is_text(column), width(column))).collect();
        let mut out = String::new();
        for (at, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(&columns).map(|(cell, (text, width))| {
                if *text { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            let cells: Vec<_> = cells.collect();
            if markdown {
                out.push_str(&format!("| {} |\n", cells.join(" | ")));
                if at == 0 {
                    let rule = |(text, width): &(bool, usize)| {
                        let rule = "-".repeat(width - 1);
                        if *text { format!("{rule}-") } else { format!("{rule}:") }
                    };
                    out.push_str(&format!(
                        "| {} |\n",
                        columns.iter().map(rule).collect::<Vec<_>>().join(" | ")
                    ));
                }
            } else {
                out.push_str(&format!("  {}\n", cells.join("  ").trim_end()));
            }
        }
        out
    }
}

impl Cell {
    fn show(&self, digits: usize) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(Some(number)) => format!("{number:.digits$}"),
            Self::Number(None) => "-".to_owned(),
        }
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number.is_finite().then_some(number))
    }
}

impl From<Option<f64>> for Cell {
    fn from(number: Option<f64>) -> Self {
        number.unwrap_or(f64::NAN).into()
    }
}

impl From<usize> for Cell {
    fn from(number: usize) -> Self {
        Self::Number(Some(number as f64))
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl Serialize for Figure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.is_finite().then_some(self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Figure {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Option::deserialize(deserializer)?.unwrap_or(f64::NAN)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_hold_at_their_limit_and_not_without_a_figure() {
        assert!(Budget::at_least("x", 0.6, 0.6).met() && !Budget::at_least("x", 0.59, 0.6).met());
        assert!(Budget::at_most("x", 0.6, 0.6).met() && !Budget::at_most("x", 0.61, 0.6).met());
        assert!(!Budget::at_most("x", f64::NAN, 1.0).met() && !Budget::at_least("x", f64::NAN, 1.0).met());
        assert_eq!(Budget::at_most("size", 41.0, 40.0).unit("MB").line(), "size: 41.000 MB ≤ 40 MB: MISSED");
        assert!(Budget::at_most("x", 2.0, 1.0).shown().line().ends_with("missed (only shown)"));
    }

    #[test]
    fn tables_line_up() {
        let mut table = Table::new("t", &[("path", 0), ("calls/s", 1)]);
        table.row(["direct".into(), 12.34.into()]);
        table.row(["none".into(), f64::NAN.into()]);
        assert_eq!(table.render(false), "  path    calls/s\n  direct     12.3\n  none          -\n");
        assert_eq!(
            table.render(true),
            "| path   | calls/s |\n| ------ | ------: |\n| direct |    12.3 |\n| none   |       - |\n"
        );
    }

    #[test]
    fn what_is_kept_can_be_read_again() {
        let mut table = Table::new("t", &[("a", 0), ("b", 0)]);
        table.row(["x".into(), Cell::from(f64::NAN)]);
        let plot = Plot {
            file: "f".to_owned(),
            title: "p".to_owned(),
            shape: Shape::Bars,
            x: Axis::names("n", ["one", "two"]),
            y: Axis::log("y"),
            series: vec![Series::heights("s", [1.0, f64::NAN])],
            marks: vec![("m".to_owned(), 2.0)],
        };
        let outcome = Outcome {
            name: "n".to_owned(),
            title: String::new(),
            text: String::new(),
            tables: vec![table],
            plots: vec![plot],
            budgets: vec![Budget::at_least("b", f64::NAN, 1.0)],
            failed: None,
            seconds: 1.5,
            load: Default::default(),
        };
        let run = Run { machine: vec![], outcomes: vec![outcome] };
        let text = serde_json::to_string(&run).unwrap();
        let again: Run = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
        assert!(!again.outcomes[0].budgets[0].met());
    }
}
