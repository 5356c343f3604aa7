//! Where the decisions of a schedule come from: drawn from a seed, or listed one by one.

use std::time::Duration;

/// A small generator of its own, so that a seed means the same schedule wherever it runs.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x6d63_702d_6170_6921)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// An index into something that has `n` entries.
    pub fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap_or(0)
    }

    /// Whether something happens that happens so many times in a thousand.
    pub fn happens(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.below(1_000) < per_mille
    }

    /// Some milliseconds, drawn from a range, with parts of them.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.below((to - from) * 1_000 + 1) + from * 1_000)
    }
}

/// A schedule as the list of what was chosen where there was a choice. 0 is always the quiet way; what
/// is beyond the list is quiet.
#[derive(Debug, Default)]
pub struct Listed {
    choices: Vec<u8>,
    /// How many ways each choice had that was met.
    pub ways: Vec<u8>,
    /// Whether something befell a node, and not only a message.
    pub mishaps: bool,
}

impl Listed {
    /// Follows this list.
    pub fn new(choices: Vec<u8>) -> Self {
        Self { choices, ways: Vec::new(), mishaps: false }
    }

    /// The way that is taken at the next choice, of `ways`.
    pub fn choose(&mut self, ways: u8) -> u8 {
        let way = self.choices.get(self.ways.len()).copied().unwrap_or(0);
        self.ways.push(ways);
        way.min(ways - 1)
    }

    /// As [`Listed::choose`], for what befalls a node.
    pub fn befall(&mut self, ways: u8) -> u8 {
        let way = self.choose(ways);
        self.mishaps |= way > 0;
        way
    }

    /// How many choices were met.
    pub fn met(&self) -> usize {
        self.ways.len()
    }
}
