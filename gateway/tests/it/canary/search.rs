//! Secrets that can be told from anything else wherever they turn up, and the search for them.

use std::path::Path;

/// How a value is made that holds a canary.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Letters and digits, as tokens and headers have them.
    Token,
    /// What JSON and shells write otherwise.
    Quoted,
    /// Several lines.
    Lines,
    /// What addresses write otherwise, and letters beyond ASCII.
    Address,
}

/// Makes values with a mark of this test alone at both ends.
pub struct Canaries {
    mark: String,
    made: usize,
}

impl Canaries {
    /// With a mark that nobody else has.
    pub fn new() -> Self {
        Self { mark: chance(), made: 0 }
    }

    /// What all of its values have in them.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// How many there are.
    pub fn made(&self) -> usize {
        self.made
    }

    /// Another one.
    pub fn value(&mut self, shape: Shape) -> String {
        let (mark, number, random) = (&self.mark, self.made, chance());
        self.made += 1;
        let core = format!("{mark}{number:02}{random}{mark}");
        match shape {
            Shape::Token => core,
            Shape::Quoted => format!("\"{core}\\ 'x' ${{HOME}}\t{core}"),
            Shape::Lines => format!("-----BEGIN KEY-----\n{core}\n{core}\n-----END KEY-----\n"),
            Shape::Address => format!("ä&a=b%20{core}+ß😀/?#{core}"),
        }
    }
}

/// Sixteen digits of chance.
fn chance() -> String {
    let mut random = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut random).unwrap();
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Ways to write a text of letters and digits: as it is (which is how JSON and addresses write it too), in hex, in
/// base64 wherever in a longer text it begins, and backwards.
fn spellings(text: &str) -> Vec<String> {
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let mut spellings = vec![text.to_owned(), hex.to_uppercase(), hex, text.chars().rev().collect()];
    spellings.extend((0..3).map(|skipped| base64(&text.as_bytes()[skipped..])));
    spellings
}

/// Base64 of the whole groups of three bytes.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks_exact(3) {
        let bits = usize::from(group[0]) << 16 | usize::from(group[1]) << 8 | usize::from(group[2]);
        out.extend([18, 12, 6, 0].map(|shift| char::from(DIGITS[bits >> shift & 63])));
    }
    out
}

/// Where something was seen, and what.
pub struct Place {
    name: String,
    text: String,
}

/// Everything that is searched.
#[derive(Default)]
pub struct Places(Vec<Place>);

impl Places {
    /// Adds what was seen somewhere.
    pub fn add(&mut self, name: impl Into<String>, seen: impl AsRef<[u8]>) {
        let text = String::from_utf8_lossy(seen.as_ref()).into_owned();
        self.0.push(Place { name: name.into(), text });
    }

    /// Adds all files of a folder and those below it.
    pub fn add_files(&mut self, when: &str, folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                self.add_files(when, &path);
            } else if let Ok(bytes) = std::fs::read(&path) {
                // What was temporary may be gone by now.
                self.add(format!("{when}: {}", path.display()), bytes);
            }
        }
    }

    /// Adds the command lines of all processes, and the environments of some.
    pub fn add_processes(&mut self, with_environment: &[i32]) {
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let path = process.path();
            if let Ok(words) = std::fs::read(path.join("cmdline")) {
                self.add(format!("{}/cmdline", path.display()), words);
            }
        }
        for pid in with_environment {
            let path = format!("/proc/{pid}/environ");
            // Some hide theirs from everybody, which is as good.
            if let Ok(variables) = std::fs::read(&path) {
                self.add(path, variables);
            }
        }
    }

    /// The places whose names begin so.
    pub fn named<'a>(&'a self, begin: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |place| place.name.starts_with(begin)).map(|place| place.text.as_str())
    }

    /// Where these texts are, however they are written, but for places whose names begin with one of `allowed`.
    pub fn find(&self, texts: &[&str], allowed: &[&str]) -> Vec<String> {
        let needles: Vec<_> = texts.iter().flat_map(|text| spellings(text)).collect();
        let mut found = Vec::new();
        for place in self.0.iter().filter(|place| !allowed.iter().any(|begin| place.name.starts_with(begin)))
        {
            for needle in &needles {
                if let Some(at) = place.text.find(needle.as_str()) {
                    let range = at.saturating_sub(300)..(at + needle.len() + 100).min(place.text.len());
                    let around = String::from_utf8_lossy(&place.text.as_bytes()[range]);
                    found.push(format!("{}: {around}", place.name));
                    break;
                }
            }
        }
        found
    }
}
