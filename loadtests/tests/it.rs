//! The load generator's own parts, as processes: what it compares with must answer as mcp-api does.
#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mcp-loadtests");

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_floor_answers_as_a_gateway_does() {
    let mut command = Command::new(PROGRAM);
    command.args(["floor-http", "--", PROGRAM, "echo-server"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut floor = Process(command.spawn().unwrap());
    let mut line = String::new();
    BufReader::new(floor.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("http://").unwrap();
    let body = r#"{"serverName":"echo","methodName":"echo","args":{"text":"ä \"quoted\""}}"#;
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST /mcp/tool/call HTTP/1.1\r\nhost: {address}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, answer) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let expected = r#"{"success":true,"data":{"content":[{"type":"text","text":"ä \"quoted\""}],"contentType":"text/plain"}}"#;
    assert_eq!(answer, expected);
    // It goes with whoever started it.
    drop(floor.0.stdin.take());
    assert!(floor.0.wait().unwrap().success());
}

#[test]
fn a_report_is_rendered_again_from_what_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept.json");
    let run = include_str!("run.json");
    std::fs::write(&kept, run).unwrap();
    let report = |from: &std::path::Path| {
        let mut command = Command::new(PROGRAM);
        command.arg("report").arg("--from").arg(from).arg("--out").arg(folder.path());
        command.output().unwrap()
    };
    let missed = report(&kept);
    let said = String::from_utf8_lossy(&missed.stdout).into_owned();
    // One of the two budgets in the file is not kept, and that is what the exit status says.
    assert!(!missed.status.success() && said.contains("1 of 2 budgets missed"), "{said}");
    let text = std::fs::read_to_string(folder.path().join("REPORT.md")).unwrap();
    assert!(text.contains("Budgets: 1 of 2 met") && text.contains("| single node |"), "{text}");
    let picture = std::fs::read_to_string(folder.path().join("report/closed.svg")).unwrap();
    assert!(picture.contains("calls/s") && picture.contains("single node"), "{picture}");
    std::fs::write(&kept, run.replace("\"figure\": 0.5", "\"figure\": 0.7")).unwrap();
    let met = report(&kept);
    assert!(met.status.success(), "{}", String::from_utf8_lossy(&met.stdout));
}
