use std::{io::Write, os::unix::fs::PermissionsExt, path::Path};

use super::*;
use crate::{config::AuditSettings, ids::ServerName};

fn settings(file: &Path) -> AuditSettings {
    AuditSettings { file: file.to_owned(), rotate_bytes: u64::MAX, calls: AuditCalls::None }
}

fn entry(name: &str) -> Entry {
    let who = UserId::parse("alice").unwrap();
    let server = ServerName::from_stored(name);
    Entry::new(Event::Allowed, Action::ServerCreate, Object::server(server)).by("key:k1", &who)
}

fn whole(path: &Path) -> Verified {
    let mut chains = chains(&[], path).unwrap();
    assert_eq!(chains.len(), 1, "{chains:?}");
    verify(&chains.remove(0)).unwrap()
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What verifying says of a file with this content.
fn fault(folder: &Path, content: &[u8]) -> String {
    let file = folder.join("changed.jsonl");
    std::fs::write(&file, content).unwrap();
    verify(&Chain { files: vec![file] }).unwrap_err().to_string()
}

#[tokio::test]
async fn any_change_of_any_line_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit").join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    for number in 0..5 {
        let recorded = audit.begin(entry(&format!("s{number}"))).await.unwrap();
        recorded.answered(200, None);
    }
    drop(audit.begin(entry("left")).await.unwrap());
    audit.close().await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let found = whole(&path);
    // Opened, six that were let in, six that are over, closed.
    assert_eq!((found.lines, found.first, found.last), (14, 1, 14));
    let read = lines(&path);
    assert_eq!(read[0]["action"], "audit.opened");
    assert_eq!((&read[1]["event"], &read[1]["credential"]), (&"allowed".into(), &"key:k1".into()));
    assert_eq!((&read[1]["user"], &read[1]["object"]["server"]), (&"alice".into(), &"s0".into()));
    let done: Vec<_> = read.iter().filter(|line| line["event"] == "done").collect();
    assert_eq!((&done[0]["of"], &done[0]["status"]), (&2.into(), &200.into()));
    assert_eq!(done[5]["status"], serde_json::Value::Null);

    let content = std::fs::read(&path).unwrap();
    let ends: Vec<_> =
        content.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
    for at in 0..content.len() {
        let mut changed = content.clone();
        changed[at] ^= 1;
        let line = ends.iter().filter(|end| **end < at).count() + 1;
        // A line without its end is one with the next, or is not whole.
        let file = folder.path().join("changed.jsonl");
        std::fs::write(&file, &changed).unwrap();
        match verify(&Chain { files: vec![file] }) {
            Err(Fault::Line { line: found, .. }) => assert_eq!(found, line as u64, "byte {at}"),
            Err(other) => panic!("{other}"),
            Ok(found) => assert!(at == content.len() - 1 && found.unfinished > 0, "byte {at}"),
        }
    }
    // A line that is gone, and two that changed places.
    let mut text: Vec<_> = content.split_inclusive(|byte| *byte == b'\n').collect();
    text.swap(3, 4);
    assert!(
        fault(folder.path(), &text.concat()).contains("line 4: it is number 5 and does not follow number 3")
    );
    text.swap(3, 4);
    text.remove(6);
    assert!(fault(folder.path(), &text.concat()).contains("line 7: it is number 8"));
    // One that somebody made anew, with a hash of its own, does not fit what follows.
    let mut tip = chain::read(text[0].trim_ascii_end()).unwrap().1;
    let forged = tip.extend(&entry("forged"), None, Timestamp::now()).unwrap();
    text[1] = forged.as_bytes();
    assert!(fault(folder.path(), &text.concat()).contains("line 3:"));
}

#[tokio::test]
async fn many_at_once_are_in_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    let all = (0..500).map(|number| {
        let audit = audit.clone();
        tokio::spawn(async move { audit.record(entry(&format!("s{number}"))).await.unwrap() })
    });
    let mut seqs = Vec::new();
    for one in all.collect::<Vec<_>>() {
        seqs.push(one.await.unwrap());
    }
    // What was answered stands there.
    let read = lines(&path);
    for (number, seq) in seqs.into_iter().enumerate() {
        let line = &read[usize::try_from(seq).unwrap() - 1];
        assert_eq!((&line["seq"], &line["object"]["server"]), (&seq.into(), &format!("s{number}").into()));
    }
    assert_eq!(whole(&path).lines, 501);
}

#[tokio::test]
async fn a_torn_line_is_cut_off_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.record(entry("one")).await.unwrap();
    audit.close().await;
    let torn = br#"{"seq":4,"time":"2026-"#;
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(torn).unwrap();
    assert_eq!(whole(&path).unfinished, torn.len() as u64);

    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.record(entry("two")).await.unwrap();
    let read = lines(&path);
    assert_eq!((&read[3]["seq"], &read[3]["action"]), (&4.into(), &"audit.recovered".into()));
    assert_eq!((&read[3]["bytes"], &read[3]["fragment"]), (&torn.len().into(), &chain::hash(torn).into()));
    assert_eq!(whole(&path).lines, 6);
    audit.close().await;

    // A file of nothing else, too.
    std::fs::write(&path, torn).unwrap();
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.close().await;
    assert_eq!(whole(&path).lines, 3);
    // Whole lines are nobody's to remove: that they are wrong has to be seen.
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"nonsense\n").unwrap();
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.record(entry("three")).await.unwrap();
    let fault = verify(&chains(&[], &path).unwrap()[0]).unwrap_err().to_string();
    assert!(fault.contains("line 4: it is not a line of an audit log"), "{fault}");
    // And what is something else is not written to.
    let other = folder.path().join("notes.txt");
    std::fs::write(&other, "milk\n").unwrap();
    assert!(Audit::open(&settings(&other), "test").is_err());
    assert_eq!(std::fs::read(&other).unwrap(), b"milk\n");
}

#[tokio::test]
async fn a_file_that_is_large_is_put_aside_and_the_chain_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let small = AuditSettings { rotate_bytes: 1_024, ..settings(&path) };
    for _ in 0..3 {
        let audit = Audit::open(&small, "test").unwrap();
        for number in 0..20 {
            audit.record(entry(&format!("s{number}"))).await.unwrap();
        }
        audit.close().await;
    }
    let chain = chains(&[], &path).unwrap().remove(0);
    assert!(chain.files.len() > 10, "{chain:?}");
    assert_eq!(chain.files[0].file_name().unwrap(), "audit.000000000001.jsonl");
    let found = verify(&chain).unwrap();
    assert_eq!((found.lines, found.first, found.last), (66, 1, 66));
    // In whatever order they are named.
    let mut files = chain.files.clone();
    files.reverse();
    assert_eq!(chains(&files, Path::new("")).unwrap(), [chain]);
}

#[tokio::test]
async fn a_chain_goes_on_where_its_last_file_was_put_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.record(entry("one")).await.unwrap();
    audit.close().await;
    std::fs::rename(&path, folder.path().join("audit.000000000001.jsonl")).unwrap();
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.close().await;
    assert_eq!(lines(&path)[0]["seq"], 4);
    assert_eq!(whole(&path).lines, 5);
    // A file that is missing in between is noticed.
    let files = [folder.path().join("audit.000000000001.jsonl"), path.clone()];
    std::fs::write(
        &files[0],
        std::fs::read_to_string(&files[0]).unwrap().lines().next().unwrap().to_owned() + "\n",
    )
    .unwrap();
    let fault = verify(&chains(&files, Path::new("")).unwrap()[0]).unwrap_err().to_string();
    assert!(fault.contains("audit.jsonl: line 1: it is number 4 and does not follow number 1"), "{fault}");
}

#[tokio::test]
async fn two_processes_never_share_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let (one, two) =
        (Audit::open(&settings(&path), "one").unwrap(), Audit::open(&settings(&path), "two").unwrap());
    one.record(entry("one")).await.unwrap();
    two.record(entry("two")).await.unwrap();
    let second = folder.path().join("audit-2.jsonl");
    assert_eq!(lines(&second)[1]["object"]["server"], "two");
    let chains = chains(&[], &path).unwrap();
    assert_eq!(chains.len(), 2);
    assert!(chains.iter().all(|chain| verify(chain).unwrap().lines == 2));
}

#[tokio::test]
async fn what_cannot_be_written_is_refused_and_what_can_again_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (inside, away) = (folder.path().join("audit"), folder.path().join("away"));
    let path = inside.join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    audit.record(entry("one")).await.unwrap();
    std::fs::rename(&inside, &away).unwrap();
    assert_eq!(audit.record(entry("refused")).await, Err(Unavailable::Broken));
    audit.note(entry("lost"));
    assert_eq!(audit.record(entry("refused")).await, Err(Unavailable::Broken));
    assert!(!inside.exists());
    std::fs::rename(&away, &inside).unwrap();
    assert_eq!(audit.record(entry("two")).await, Ok(3));
    let read = lines(&path);
    assert_eq!((&read[2]["object"]["server"], &read[2]["dropped"]), (&"two".into(), &1.into()));
    // Somebody moves the file alone: its chain goes on in a new one.
    std::fs::rename(&path, inside.join("audit.000000000001.jsonl")).unwrap();
    assert_eq!(audit.record(entry("three")).await, Ok(4));
    assert_eq!(whole(&path).lines, 4);
}

#[tokio::test]
async fn refused_requests_cannot_flood_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = Audit::open(&settings(&path), "test").unwrap();
    let many = 50 * limits::AUDIT_DENIALS;
    for _ in 0..many {
        audit.deny(Entry::new(Event::Denied, Action::Request, Object::route("GET", "/mcp/servers")));
    }
    audit.close().await;
    let read = lines(&path);
    let dropped: u64 = read.iter().filter_map(|line| line["dropped"].as_u64()).sum();
    let denied = read.iter().filter(|line| line["event"] == "denied").count() as u64;
    assert_eq!(denied + dropped, u64::from(many));
    assert!(dropped > 0);
}

#[test]
fn what_is_long_or_wild_is_made_tame() {
    let wild = format!("\u{1b}[2J{}\r\nPUB", "x".repeat(10_000));
    let entry =
        Entry::new(Event::Noted, Action::ToolsChanged, Object::server(&wild).with_tools(vec![&wild; 1_000]));
    let mut tip = chain::Tip::default();
    let line = tip.extend(&entry, Some(3), Timestamp::now()).unwrap();
    assert!(line.len() < 40_000 && !line.trim_end().contains(['\n', '\r', '\u{1b}']));
    assert_eq!(chain::read(line.trim_ascii_end().as_bytes()).unwrap().1, tip);
}

#[test]
fn actions_are_written_as_they_are_named() {
    let mut seen = std::collections::HashSet::new();
    for action in Action::ALL {
        assert!(seen.insert(action.as_str()));
        assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
    }
}
