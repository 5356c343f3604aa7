//! What callers were told, held against what was executed.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    time::Duration,
};

use mcp_shared::error::{ErrorCode, Outcome};
use serde_json::Value;

/// What a caller was told about one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// The tool's answer.
    Answer,
    /// An error: its status (0 where there is none), its code, and whether the tool may have run.
    Error(u16, String, Outcome),
    /// Nothing, because whoever should have told it was killed.
    Nothing,
    /// What must not be told.
    Nonsense(String),
}

/// One call: the same request once, or, where it had an `Idempotency-Key`, several times.
#[derive(Debug, Clone)]
pub struct Call {
    /// What the tool writes.
    pub id: String,
    /// The secret that the tool has to be given.
    pub key: String,
    /// What was called how, for people.
    pub what: String,
    /// When it was made.
    #[allow(dead_code, reason = "it is shown with the call")]
    pub begun: Duration,
    /// What its caller was told, in order.
    pub told: Vec<Told>,
    /// How much longer than it may it took to tell.
    pub late: Option<Duration>,
}

impl Call {
    /// A call that was made once and answered in time.
    pub fn new(id: String, key: &str, what: &str, told: Told) -> Self {
        let (key, what) = (key.to_owned(), what.to_owned());
        Self { id, key, what, begun: Duration::ZERO, told: vec![told], late: None }
    }

    /// What is known of the call: the best of what was told.
    fn outcome(&self) -> Outcome {
        let outcomes = || {
            self.told.iter().map(|told| match told {
                Told::Answer => Outcome::Completed,
                Told::Error(_, _, outcome) => *outcome,
                Told::Nothing | Told::Nonsense(_) => Outcome::Unknown,
            })
        };
        if outcomes().any(|outcome| outcome == Outcome::Completed) {
            Outcome::Completed
        } else if outcomes().all(|outcome| outcome == Outcome::NotStarted) {
            Outcome::NotStarted
        } else {
            Outcome::Unknown
        }
    }
}

/// Everything that must not be in a history. `executed` is what the tools wrote, a line for each time that
/// one ran: `run ID PID KEY`, or `clash ID PID KEY` if what may run in one process only ran in two.
pub fn violations(calls: &[Call], executed: &str) -> Vec<String> {
    let mut violations = Vec::new();
    let mut runs: HashMap<&str, Vec<&str>> = HashMap::new();
    for line in executed.lines() {
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            [what @ ("run" | "clash"), id, _pid, key] => {
                runs.entry(*id).or_default().push(key);
                if *what == "clash" {
                    violations.push(format!("two processes ran at once: {line}"));
                }
            }
            _ => violations.push(format!("a line that no tool writes: {line}")),
        }
    }
    for call in calls {
        let runs = runs.remove(call.id.as_str()).unwrap_or_default();
        let mut violated =
            |rule: &str| violations.push(format!("{rule}, run {} times: {call:?}", runs.len()));
        if runs.len() > 1 {
            violated("a call was executed again");
        }
        match call.outcome() {
            Outcome::NotStarted if !runs.is_empty() => violated("a call was executed that was not started"),
            Outcome::Completed if runs.len() != 1 => violated("a completed call was not executed once"),
            _ => {}
        }
        if runs.iter().any(|key| *key != call.key) {
            violated("a call had another secret than its user's");
        }
        if call.told.is_empty() || call.late.is_some() {
            violated("a caller was kept waiting");
        }
        if call.told.iter().any(|told| matches!(told, Told::Nonsense(_))) {
            violated("a caller was told nonsense");
        }
    }
    violations.extend(runs.keys().map(|id| format!("something was executed that nobody called: {id}")));
    violations
}

/// What an answer says: a result, or an error with a code that is known and fits its outcome.
pub fn told(status: u16, answer: &Value) -> Told {
    if status == 200 {
        let text = &answer["data"]["content"][0]["text"];
        return if text == "recorded" { Told::Answer } else { Told::Nonsense(answer.to_string()) };
    }
    let code = answer["code"].as_str().unwrap_or_default();
    let outcome: Result<Outcome, _> = serde_json::from_value(answer["outcome"].clone());
    match outcome {
        Ok(outcome)
            if ErrorCode::ALL.iter().any(|known| known.as_str() == code)
                && code != ErrorCode::Internal.as_str() =>
        {
            Told::Error(status, code.to_owned(), outcome)
        }
        // The call with this name is under way: that is all that can be said.
        _ if code == ErrorCode::IdempotencyInProgress.as_str() => {
            Told::Error(status, code.to_owned(), Outcome::Unknown)
        }
        _ => Told::Nonsense(format!("{status} {answer}")),
    }
}

/// How often what was told.
pub fn table(calls: &[Call]) -> String {
    let mut rows: BTreeMap<(String, &str), usize> = BTreeMap::new();
    for told in calls.iter().flat_map(|call| &call.told) {
        let row = match told {
            Told::Answer => ("200".to_owned(), "completed"),
            Told::Error(status, code, outcome) => (format!("{status} {code}"), name(*outcome)),
            Told::Nothing => ("no answer".to_owned(), "unknown"),
            Told::Nonsense(text) => (text.clone(), "nonsense"),
        };
        *rows.entry(row).or_default() += 1;
    }
    let mut table = String::new();
    for ((what, outcome), times) in rows {
        writeln!(table, "{times:>7}  {outcome:<12} {what}").unwrap();
    }
    table
}

fn name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotStarted => "not_started",
        Outcome::Unknown => "unknown",
        Outcome::Completed => "completed",
    }
}

fn call(id: &str, told: &[Told]) -> Call {
    Call { told: told.to_vec(), ..Call::new(id.to_owned(), "-", "", Told::Nothing) }
}

fn error(outcome: Outcome) -> Told {
    Told::Error(502, "worker_lost".to_owned(), outcome)
}

#[test]
fn an_honest_history_is_passed() {
    let calls = [
        call("a", &[Told::Answer]),
        call("b", &[error(Outcome::NotStarted)]),
        call("c", &[error(Outcome::Unknown)]),
        call("d", &[Told::Nothing]),
        call("e", &[error(Outcome::NotStarted), Told::Nothing, Told::Answer]),
        call("f", &[error(Outcome::Completed)]),
    ];
    let executed = "run a 1 -\nrun d 2 -\nrun e 2 -\nrun f 1 -\n";
    assert_eq!(violations(&calls, executed), [""; 0]);
    let table = table(&calls);
    assert_eq!(table.lines().count(), 5, "{table}");
    assert!(
        table.contains("2  not_started  502 worker_lost") && table.contains("2  completed    200"),
        "{table}"
    );
}

#[test]
fn every_lie_is_found() {
    let found = |call: Call, executed: &str, rule: &str| {
        let violations = violations(&[call], executed);
        assert!(violations.iter().any(|found| found.starts_with(rule)), "{rule}: {violations:?}");
    };
    let twice = "run a 1 -\nrun a 2 -\n";
    found(call("a", &[Told::Answer]), twice, "a call was executed again");
    found(call("a", &[error(Outcome::Unknown)]), twice, "a call was executed again");
    found(call("a", &[Told::Nothing, Told::Answer]), twice, "a call was executed again");
    let lie = "a call was executed that was not started";
    found(call("a", &[error(Outcome::NotStarted)]), "run a 1 -\n", lie);
    found(call("a", &[error(Outcome::NotStarted), error(Outcome::NotStarted)]), "run a 1 -\n", lie);
    found(call("a", &[Told::Answer]), "", "a completed call was not executed once");
    found(call("a", &[error(Outcome::Completed)]), "", "a completed call was not executed once");
    found(call("a", &[Told::Answer]), "clash a 1 -\n", "two processes ran at once");
    found(call("a", &[Told::Answer]), "run a 1 key\n", "a call had another secret");
    found(call("a", &[Told::Answer]), "run a 1 -\nrun b 1 -\n", "something was executed that nobody called");
    found(call("a", &[Told::Answer]), "run a 1 -\nrun a\n", "a line that no tool writes");
    found(call("a", &[]), "", "a caller was kept waiting");
    let late = Call { late: Some(Duration::from_secs(1)), ..call("a", &[Told::Answer]) };
    found(late, "run a 1 -\n", "a caller was kept waiting");
    found(call("a", &[Told::Nonsense("500".to_owned())]), "", "a caller was told nonsense");
}
