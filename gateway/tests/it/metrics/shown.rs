//! What nodes show, read as Prometheus reads it.

use std::collections::BTreeMap;

use crate::deployment::{Deployment, Node, client, eventually};

/// One line of an exposition.
pub struct Sample {
    /// The name, with what its kind appends.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The number.
    pub value: f64,
}

/// What one node shows.
pub struct Shown {
    /// By family, as the lines `# TYPE` have it.
    pub kinds: BTreeMap<String, String>,
    /// All lines.
    pub samples: Vec<Sample>,
    /// The whole.
    pub text: String,
}

impl Shown {
    /// Asks a node.
    pub async fn by(api: &Deployment, node: &Node) -> Self {
        let answer = api.send(client().get(format!("{}/metrics", node.base))).await.ok();
        let (mut kinds, mut samples) = (BTreeMap::new(), Vec::new());
        assert!(answer.text.ends_with("# EOF\n"), "{}", answer.text);
        for line in answer.text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} is there twice");
            }
            if line.starts_with('#') {
                continue;
            }
            let (head, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = match head.split_once('{') {
                None => (head, ""),
                Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
            };
            let labels = labels.split_terminator("\",").map(|label| {
                let (name, value) = label.trim_end_matches('"').split_once("=\"").unwrap();
                (name.to_owned(), value.to_owned())
            });
            let (name, labels) = (name.to_owned(), labels.collect());
            samples.push(Sample { name, labels, value: value.parse().unwrap() });
        }
        Self { kinds, samples, text: answer.text }
    }

    /// Asks all of them.
    pub async fn all(api: &Deployment) -> Vec<Self> {
        let mut all = Vec::new();
        for node in api.gateways().into_iter().chain(api.workers()) {
            all.push(Self::by(api, node).await);
        }
        all
    }

    /// Asserts that each histogram's buckets hold those below them, and that the last one holds all.
    pub fn buckets_are_whole(&self) {
        let mut last = BTreeMap::new();
        for Sample { name, labels, value } in &self.samples {
            let Some(family) = name.strip_suffix("_bucket") else { continue };
            let end = match labels["le"].as_str() {
                "+Inf" => f64::INFINITY,
                end => end.parse().unwrap(),
            };
            let others = labels.iter().filter(|(name, _)| *name != "le");
            let others: BTreeMap<&str, &str> =
                others.map(|(name, value)| (name.as_str(), value.as_str())).collect();
            if let Some((below, held)) = last.insert((family, others), (end, *value)) {
                assert!(below < end && held <= *value, "{name} {labels:?}");
            }
        }
        assert!(last.len() > 10, "{}", last.len());
        for ((family, labels), (end, held)) in last {
            assert_eq!(end, f64::INFINITY, "{family} {labels:?}");
            let is_count = |sample: &&Sample| {
                sample.name.strip_suffix("_count") == Some(family)
                    && labels
                        .iter()
                        .all(|(name, value)| sample.labels.get(*name).is_some_and(|own| own == value))
            };
            assert_eq!(self.samples.iter().find(is_count).unwrap().value, held, "{family} {labels:?}");
        }
    }

    /// Which time series there are.
    pub fn series(&self) -> Vec<(&str, &BTreeMap<String, String>)> {
        self.samples.iter().map(|sample| (sample.name.as_str(), &sample.labels)).collect()
    }
}

/// Everything that all nodes show, added up; by name and labels.
pub struct Sums(BTreeMap<String, f64>);

impl Sums {
    /// Asks all nodes.
    pub async fn of(api: &Deployment) -> Self {
        let mut sums = BTreeMap::new();
        for sample in Shown::all(api).await.into_iter().flat_map(|shown| shown.samples) {
            let labels: Vec<_> =
                sample.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
            *sums.entry(format!("{}{{{}}}", sample.name, labels.join(","))).or_insert(0.0) += sample.value;
        }
        Self(sums)
    }

    /// A sum, by a name and labels in order: `name{a=b}`.
    pub fn get(&self, series: &str) -> f64 {
        let whole = if series.contains('{') { series.to_owned() } else { format!("{series}{{}}") };
        *self.0.get(&whole).unwrap_or_else(|| panic!("{whole} is not shown"))
    }

    /// By how much it has become more since then.
    pub fn since(&self, before: &Sums, series: &str) -> f64 {
        self.get(series) - before.get(series)
    }
}

/// Waits until a sum has become more by exactly so many.
pub async fn moves(api: &Deployment, before: &Sums, series: &str, by: usize) {
    eventually(&format!("{series} is {by} more"), async || {
        let since = Sums::of(api).await.since(before, series);
        assert!(since <= by as f64, "{series} is {since} more, and not {by}");
        since == by as f64
    })
    .await;
}
