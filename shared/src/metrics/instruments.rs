//! What is counted with: fixed arrays of atomics. Counting takes no lock, hashes nothing and allocates nothing.
//!
//! A histogram of the client library takes a mutex for each observation. One of these costs two additions to memory that
//! is rarely written by two threads at once.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::table::Closed;

/// One number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Nothing was counted yet.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts so many.
    pub fn add(&self, many: u64) {
        self.0.fetch_add(many, Relaxed);
    }

    /// What was counted so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// One number for each value of a closed label.
pub struct Counts<L, const N: usize>([Count; N], PhantomData<fn(L)>);

impl<L: Closed, const N: usize> Counts<L, N> {
    /// Nothing was counted yet.
    pub const fn new() -> Self {
        Self([const { Count::new() }; N], PhantomData)
    }

    /// Counts one.
    pub fn one(&self, label: L) {
        self.add(label, 1);
    }

    /// Counts several at once.
    pub fn add(&self, label: L, many: u64) {
        self.0[label.index()].add(many);
    }

    /// What was counted so far.
    pub fn get(&self, label: L) -> u64 {
        self.0[label.index()].get()
    }
}

impl<L: Closed, const N: usize> Default for Counts<L, N> {
    fn default() -> Self {
        Self::new()
    }
}

/// The upper ends of a histogram's buckets, in nanoseconds or bytes; there is one more bucket above the last.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The ends, each above the one before.
    pub ends: &'static [u64],
    /// How many of what is observed are one of the unit that is shown.
    pub per_unit: f64,
}

/// The most buckets that a histogram has.
const BUCKETS: usize = 20;
const MICRO: u64 = 1_000;
const MILLI: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
const PER_SECOND: f64 = 1e9;

/// Of calls, their stages, and requests: from 100 µs to 5 minutes.
pub const CALLS: Bounds = Bounds {
    ends: &[
        100 * MICRO,
        250 * MICRO,
        500 * MICRO,
        MILLI,
        2_500 * MICRO,
        5 * MILLI,
        10 * MILLI,
        25 * MILLI,
        50 * MILLI,
        100 * MILLI,
        250 * MILLI,
        500 * MILLI,
        SECOND,
        2_500 * MILLI,
        5 * SECOND,
        10 * SECOND,
        30 * SECOND,
        60 * SECOND,
        300 * SECOND,
    ],
    per_unit: PER_SECOND,
};

/// Of routes, of which there are many, and of operations of the store: from 500 µs to 30 s.
pub const REQUESTS: Bounds = Bounds {
    ends: &[
        500 * MICRO,
        MILLI,
        2_500 * MICRO,
        5 * MILLI,
        10 * MILLI,
        25 * MILLI,
        50 * MILLI,
        100 * MILLI,
        250 * MILLI,
        SECOND,
        5 * SECOND,
        30 * SECOND,
    ],
    per_unit: PER_SECOND,
};

/// Of what takes its time, such as starts and installations: from 10 ms to 20 minutes.
pub const SLOW: Bounds = Bounds {
    ends: &[
        10 * MILLI,
        50 * MILLI,
        100 * MILLI,
        250 * MILLI,
        500 * MILLI,
        SECOND,
        2_500 * MILLI,
        5 * SECOND,
        10 * SECOND,
        30 * SECOND,
        60 * SECOND,
        120 * SECOND,
        300 * SECOND,
        600 * SECOND,
        1_200 * SECOND,
    ],
    per_unit: PER_SECOND,
};

/// Of bodies: from 256 bytes to 16 MiB.
pub const BODIES: Bounds = Bounds {
    ends: &[256, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24],
    per_unit: 1.0,
};

/// How often something was how large.
#[repr(align(64))]
pub struct Histogram {
    bounds: Bounds,
    sum: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Histogram {
    /// Nothing was observed yet.
    pub const fn new(bounds: Bounds) -> Self {
        assert!(bounds.ends.len() < BUCKETS, "a histogram has too many buckets");
        Self { bounds, sum: AtomicU64::new(0), buckets: [const { AtomicU64::new(0) }; BUCKETS] }
    }

    /// Takes in a time.
    pub fn time(&self, took: Duration) {
        self.observe(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Takes in a size.
    pub fn size(&self, bytes: usize) {
        self.observe(bytes as u64);
    }

    fn observe(&self, value: u64) {
        let ends = self.bounds.ends;
        let bucket = ends.iter().position(|end| value <= *end).unwrap_or(ends.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        // In nanoseconds it is full after 584 years.
        self.sum.fetch_add(value, Relaxed);
    }

    /// The sum of all, and for each bucket its upper end and how many are in it, not in those below.
    pub(super) fn read(&self) -> (f64, Vec<(f64, u64)>) {
        let per_unit = self.bounds.per_unit;
        let ends = self.bounds.ends.iter().map(|end| *end as f64 / per_unit);
        let counts = self.buckets.iter().map(|bucket| bucket.load(Relaxed));
        (self.sum.load(Relaxed) as f64 / per_unit, ends.chain([f64::INFINITY]).zip(counts).collect())
    }
}

/// A histogram for each value of a closed label.
pub struct Histograms<L, const N: usize>([Histogram; N], PhantomData<fn(L)>);

impl<L: Closed, const N: usize> Histograms<L, N> {
    /// Nothing was observed yet.
    pub const fn new(bounds: Bounds) -> Self {
        Self([const { Histogram::new(CALLS) }; N], PhantomData).with(bounds)
    }

    const fn with(mut self, bounds: Bounds) -> Self {
        let mut at = 0;
        while at < N {
            self.0[at].bounds = bounds;
            at += 1;
        }
        self
    }

    /// That of one value.
    pub fn of(&self, label: L) -> &Histogram {
        &self.0[label.index()]
    }
}

/// Measures from when it is made to when it is dropped, however that comes about: what was given up has taken its time,
/// too.
#[must_use = "it measures as long as it is held"]
pub struct Timer<'a> {
    histogram: &'a Histogram,
    begun: Instant,
}

impl Histogram {
    /// Begins to measure.
    pub fn timer(&self) -> Timer<'_> {
        Timer { histogram: self, begun: Instant::now() }
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.histogram.time(self.begun.elapsed());
    }
}

/// Counts something for as long as it is held.
pub struct Running<'a>(&'a AtomicU64);

impl<'a> Running<'a> {
    /// One more.
    pub fn begin(gauge: &'a AtomicU64) -> Self {
        gauge.fetch_add(1, Relaxed);
        Self(gauge)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_is_in_one_bucket() {
        let histogram = Histogram::new(CALLS);
        for micros in [0, 100, 101, 1_000, 400_000_000] {
            histogram.time(Duration::from_micros(micros));
        }
        let (sum, buckets) = histogram.read();
        assert!((sum - 400.001_201).abs() < 1e-9, "{sum}");
        assert_eq!(buckets.len(), CALLS.ends.len() + 1);
        let full: Vec<_> = buckets.iter().copied().filter(|(_, count)| *count > 0).collect();
        assert_eq!(full, [(0.0001, 2), (0.00025, 1), (0.001, 1), (f64::INFINITY, 1)]);
    }

    #[test]
    fn all_bounds_rise() {
        for bounds in [CALLS, REQUESTS, SLOW, BODIES] {
            assert!(bounds.ends.is_sorted_by(|one, next| one < next));
            assert!(bounds.ends.len() < BUCKETS);
        }
    }

    #[test]
    fn a_timer_measures_what_was_given_up() {
        let histogram = Histogram::new(SLOW);
        let timer = histogram.timer();
        drop(timer);
        assert_eq!(histogram.read().1.iter().map(|(_, count)| count).sum::<u64>(), 1);
    }
}
