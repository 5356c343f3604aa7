//! What micro-benchmarks measure of a connection over standard input and output.

use bytes::Bytes;

use super::{
    lines::{Line, Lines},
    message::{Message, Meta, tool_call},
};

/// Cuts what a server wrote into lines, reads the envelope of each, and says how many were answers.
pub async fn answers(mut output: &[u8]) -> usize {
    let mut lines = Lines::new(&mut output);
    let mut answers = 0;
    while let Ok(Some(line)) = lines.next().await {
        let Line::Whole(line) = line else { continue };
        answers += usize::from(matches!(Message::parse(&line), Message::Response { body: Some(Ok(_)), .. }));
    }
    answers
}

/// The line that asks a server to run a tool.
pub fn line(id: u64, tool: &str, arguments: &Bytes) -> Vec<u8> {
    tool_call(id, tool, arguments, &Meta { members: "", progress: false, trace: None })
}
