//! What the parts say, line by line and each with the name of its part.

use std::{
    io::{self, BufRead, BufReader, IsTerminal, Read, Write},
    sync::Arc,
};

/// Bytes of a line that are shown in one piece. Longer ones go on in the next.
const LINE: u64 = 64 * 1024;
/// Colours that can be read on a dark and on a light ground.
const COLOURS: [u8; 6] = [36, 33, 32, 35, 34, 31];
/// What this command calls itself beside its parts.
const OWN: &str = "cluster";

/// The standard error, shared by the threads that read what the parts say. Cloning it is cheap.
#[derive(Clone)]
pub struct Output(Arc<Style>);

struct Style {
    colours: bool,
    width: usize,
}

impl Output {
    /// For parts whose names have at most `width` characters.
    pub fn new(width: usize) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colours = io::stderr().is_terminal() && !plain;
        Self(Arc::new(Style { colours, width: width.max(OWN.len()) }))
    }

    /// Says something in the name of the command.
    pub fn say(&self, text: &str) {
        self.line(OWN, None, text.as_bytes());
    }

    fn line(&self, name: &str, colour: Option<u8>, line: &[u8]) {
        let width = self.0.width;
        let mut text = match colour.filter(|_| self.0.colours) {
            Some(colour) => format!("\x1b[{colour}m{name:<width$} |\x1b[0m "),
            None => format!("{name:<width$} | "),
        }
        .into_bytes();
        text.extend_from_slice(line);
        text.push(b'\n');
        // In one piece, so that lines of two parts do not mix. With nobody left to read there is nothing to do.
        let _ = io::stderr().lock().write_all(&text);
    }

    /// Shows what a part says until it says nothing more. `heard` is told of each line as well.
    pub fn follow(&self, name: &str, number: usize, stream: impl Read, mut heard: impl FnMut(&str)) {
        let colour = COLOURS[number % COLOURS.len()];
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut stream).take(LINE).read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            }
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            let text = text.strip_suffix(b"\r").unwrap_or(text);
            self.line(name, Some(colour), text);
            heard(&String::from_utf8_lossy(text));
        }
    }
}
