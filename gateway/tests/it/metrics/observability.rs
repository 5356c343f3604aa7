//! Dashboard and alerts of `compose/observability` use nothing that running nodes do not show.

use std::{collections::BTreeSet, path::Path};

use mcp_shared::metrics::{Kind, Metric, Nodes};
use serde_json::Value;

use super::{
    shown::{Sample, Shown},
    with_all_settings,
};

/// A metric that an expression uses, with what it wants of the labels.
#[derive(Debug)]
struct Use {
    name: String,
    /// Names, and the values that one of them has to have.
    wanted: Vec<(String, Vec<String>)>,
}

/// What an expression of PromQL uses, and the labels by which it groups.
fn uses(expression: &str) -> (Vec<Use>, Vec<String>) {
    let (mut uses, mut groups) = (Vec::new(), Vec::new());
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        if first == '"' {
            rest = rest[1..].split_once('"').unwrap().1;
            continue;
        }
        let end =
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
        if end == 0 {
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (word, after) = rest.split_at(end);
        rest = after;
        if ["by", "without", "on", "ignoring"].contains(&word) {
            let (labels, after) = rest.trim_start().strip_prefix('(').unwrap().split_once(')').unwrap();
            groups.extend(labels.split(',').map(|label| label.trim().to_owned()));
            rest = after;
        } else if word.starts_with("mcp_") || word.starts_with("process_") {
            let mut wanted = Vec::new();
            if let Some(mut inside) = rest.strip_prefix('{') {
                while !inside.starts_with('}') {
                    let (label, value) = inside.split_once('"').unwrap();
                    let (value, after) = value.split_once('"').unwrap();
                    let values = value.split('|').map(str::to_owned).collect();
                    wanted.push((label.trim_end_matches(['=', '~', '!']).to_owned(), values));
                    inside = after.trim_start_matches(',');
                }
                rest = &inside[1..];
            }
            uses.push(Use { name: word.to_owned(), wanted });
        }
    }
    (uses, groups)
}

/// Asserts that an expression uses what is shown.
fn check(expression: &str, shown: &[Shown], used: &mut BTreeSet<String>) {
    // Those that Prometheus adds.
    let added = ["instance", "job"];
    let (uses, groups) = uses(expression);
    let mut labels: BTreeSet<&str> = added.into();
    for Use { name, wanted } in &uses {
        used.insert(name.clone());
        let samples: Vec<_> =
            shown.iter().flat_map(|shown| &shown.samples).filter(|sample| sample.name == *name).collect();
        assert!(!samples.is_empty(), "no node shows {name}: {expression}");
        labels.extend(samples[0].labels.keys().map(String::as_str));
        for (label, values) in wanted.iter().filter(|(label, _)| !added.contains(&label.as_str())) {
            for value in values {
                let is_there = samples.iter().any(|sample| sample.labels.get(label) == Some(value));
                assert!(is_there, "{name} never has {label}={value}: {expression}");
            }
        }
    }
    for group in groups {
        assert!(labels.contains(group.as_str()), "nothing has a label {group}: {expression}");
    }
}

/// Every member of that name, wherever it stands.
fn members<'a>(document: &'a Value, name: &str, found: &mut Vec<&'a str>) {
    match document {
        Value::Array(items) => items.iter().for_each(|item| members(item, name, found)),
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if key == name => found.push(text),
                    value => members(value, name, found),
                }
            }
        }
        _ => {}
    }
}

#[tokio::test]
async fn dashboard_and_alerts_use_what_is_there() {
    let api = with_all_settings().workers(1).start().await;
    let mut shown = Shown::all(&api).await;
    if !crate::CLUSTER {
        // A program alone has no bus. Its name and labels stand in the table.
        for metric in Metric::ALL.iter().filter(|metric| metric.nodes() == Nodes::Cluster) {
            let label = metric.labels().first().copied();
            let values = label.and_then(|label| label.values).map(|values| values()).unwrap_or_default();
            let values = if values.is_empty() { vec![None] } else { values.into_iter().map(Some).collect() };
            for value in values {
                let labels =
                    label.iter().map(|label| (label.name.to_owned(), value.unwrap().to_owned())).collect();
                shown[0].samples.push(Sample { name: metric.name(), labels, value: 0.0 });
            }
        }
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../compose/observability");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();

    let dashboard: Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    let (mut expressions, mut on_dashboard) = (Vec::new(), BTreeSet::new());
    members(&dashboard, "expr", &mut expressions);
    assert!(expressions.len() > 50, "{}", expressions.len());
    for expression in expressions {
        check(expression, &shown, &mut on_dashboard);
    }
    // What is counted can be seen. Limits of one user and of files are lines of no panel.
    let unseen =
        [Metric::UserCallsLimit, Metric::UserRateLimit, Metric::ServerQueueLimit, Metric::ProcessFilesLimit];
    for metric in Metric::ALL.iter().filter(|metric| !unseen.contains(metric)) {
        let seen = metric.series().iter().any(|name| on_dashboard.contains(name));
        assert!(seen, "{} is in no panel", metric.name());
        assert!(metric.kind() != Kind::Histogram || on_dashboard.contains(&metric.series()[0]));
    }

    let rules = read("alerts.yaml");
    let (mut names, mut in_alerts) = (BTreeSet::new(), BTreeSet::new());
    for rule in rules.split("      - alert: ").skip(1) {
        let field = |name: &str| {
            let line = rule.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
            line.unwrap_or_else(|| panic!("an alert has no {name}: {rule}"))
        };
        let name = rule.lines().next().unwrap();
        assert!(names.insert(name), "{name} is there twice");
        for text in ["for", "summary", "description", "runbook"] {
            assert!(!field(text).is_empty());
        }
        assert!(["critical", "warning", "info"].contains(&field("severity")), "{name}");
        let expression = field("expr").trim_matches('\'').replace("''", "'");
        check(&expression, &shown, &mut in_alerts);
    }
    assert!(names.len() >= 15 && in_alerts.len() >= 15, "{names:?}");
    assert!(read("prometheus.yaml").contains("- alerts.yaml"));
}
