//! Fuzz targets as ordinary tests: each is a function that takes any bytes and asserts what must be true of them.
//!
//! Its corpus is `fuzz/corpus/<target>` in this crate. [`run`] gives the target all of it, and mutations of it
//! that are the same in every run; `cargo fuzz` goes on from there (see `CONTRIBUTING.md`). What that finds becomes a
//! file of the corpus.
//!
//! * `FUZZ_MUTATIONS`: how many mutations (3000).
//! * `FUZZ_SEED`: which ones (1).

#![allow(clippy::print_stdout, reason = "who runs a target has to see with what it fails")]

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
};

mod egress;
mod names;
mod secret;
mod traces;

pub use egress::egress_url;
pub use names::package_names;
pub use secret::sealed_secret;
pub use traces::trace_context;

/// The longest input that mutations make.
const LONGEST: usize = 16 * 1024;
/// Bytes that mean something to one parser or another.
const TELLING: &[u8] = b"\0\n\r\t \"'\\{}[]:;,.*>$@#%/?&=<~!|-_09azAZ\x7f\x80\xc3\xff";

/// Runs a target over its corpus, and over mutations of it.
///
/// # Panics
///
/// When the target does; before that it prints the input.
pub fn run(target: &str, one: fn(&[u8])) {
    let number = |name: &str, default: u64| {
        env::var(name).ok().map_or(default, |text| text.parse().expect("a whole number"))
    };
    let (seed, count) = (number("FUZZ_SEED", 1), number("FUZZ_MUTATIONS", 3_000));
    let corpus = corpus(target);
    assert!(corpus.len() >= 24, "the corpus of {target} has only {} files", corpus.len());
    println!("{target}: {} files, then {count} mutations with FUZZ_SEED={seed}", corpus.len());
    for (path, data) in &corpus {
        watched(&path.display().to_string(), data, one);
    }
    let mut chance = Chance(seed);
    for at in 0..count {
        let data = mutation(&corpus, &mut chance);
        watched(&format!("mutation {at} with FUZZ_SEED={seed}"), &data, one);
    }
}

/// The files of a target's corpus, in the order of their names.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn watched(what: &str, data: &[u8], one: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| one(data))) {
        println!("{what} fails with \"{}\"", data.escape_ascii());
        resume_unwind(panic);
    }
}

/// A small generator of numbers (SplitMix64): the same ones on every machine.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A part of something, that may be empty.
    fn part(&mut self, of: usize) -> std::ops::Range<usize> {
        let (one, other) = (self.below(of + 1), self.below(of + 1));
        one.min(other)..one.max(other)
    }
}

/// A file of the corpus with one to four changes.
fn mutation(corpus: &[(PathBuf, Vec<u8>)], chance: &mut Chance) -> Vec<u8> {
    let mut data = chance.one_of(corpus).1.clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(data.len() + 1);
        match chance.below(9) {
            0 if !data.is_empty() => {
                let at = chance.below(data.len());
                data[at] ^= 1 << chance.below(8);
            }
            1 if !data.is_empty() => {
                let at = chance.below(data.len());
                data[at] = *chance.one_of(TELLING);
            }
            2 => data.insert(at, *chance.one_of(TELLING)),
            3 => data.truncate(at),
            4 => drop(data.drain(chance.part(data.len()))),
            5 => {
                let part = data[chance.part(data.len())].to_vec();
                data.splice(at..at, part);
            }
            6 => {
                let other = &chance.one_of(corpus).1;
                let part = other[chance.part(other.len())].to_vec();
                data.splice(at..at, part);
            }
            7 => {
                let other = &chance.one_of(corpus).1;
                let from = chance.below(other.len() + 1);
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
            _ => {
                let byte = *chance.one_of(TELLING);
                let times = 1 << chance.below(10);
                data.splice(at..at, std::iter::repeat_n(byte, times));
            }
        }
        data.truncate(LONGEST);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_secrets() {
        run("sealed_secret", sealed_secret);
    }

    #[test]
    fn names_of_packages() {
        run("package_names", package_names);
    }

    #[test]
    fn urls_that_requests_may_be_sent_to() {
        run("egress_url", egress_url);
    }

    #[test]
    fn trace_contexts() {
        run("trace_context", trace_context);
    }

    #[test]
    fn mutations_are_many_and_the_same_every_time() {
        let corpus = corpus("package_names");
        let made = || {
            let mut chance = Chance(7);
            (0..1_000).map(|_| mutation(&corpus, &mut chance)).collect::<Vec<_>>()
        };
        let (first, second) = (made(), made());
        assert_eq!(first, second);
        let distinct: std::collections::HashSet<_> = first.into_iter().collect();
        assert!(distinct.len() > 700, "{}", distinct.len());
    }
}
