//! Measurements. In a closed loop every caller makes its next call when the last one is answered; in an open one
//! calls come at a fixed rate whatever becomes of those before them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::callers::Caller;

/// How long the calls around those that are counted may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Calls of each caller that are not counted.
const WARM_UP: usize = 20;

/// Latencies, in tenths of microseconds, which go up to seven minutes: there are millions of them.
#[derive(Debug, Default, Clone)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// Adds one.
    pub fn push(&mut self, latency: Duration) {
        self.0.push(u32::try_from(latency.as_nanos() / 100).unwrap_or(u32::MAX));
    }

    /// Adds others.
    pub fn extend(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Sorts them, for [`Sorted::at`].
    pub fn sorted(&self) -> Sorted {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        Sorted(sorted)
    }
}

/// Latencies in their order.
pub struct Sorted(Vec<u32>);

impl Sorted {
    /// Milliseconds below which this share of them is: the nearest rank. None are not a number.
    pub fn at(&self, share: f64) -> f64 {
        let rank = (self.0.len() as f64 * share).ceil() as usize;
        let index = rank.clamp(1, self.0.len().max(1)) - 1;
        self.0.get(index).map_or(f64::NAN, |ticks| f64::from(*ticks) / 10_000.0)
    }
}

/// One measurement.
pub struct Sample {
    latencies: Latencies,
    time: Duration,
    /// All calls, those that are not counted among them.
    pub made: usize,
}

/// What is printed of one or more measurements.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Calls answered in a second.
    pub per_second: f64,
    /// The same for the slowest and the fastest measurement.
    pub range: (f64, f64),
    /// Half of the calls were faster.
    pub p50_ms: f64,
    /// All but one in a hundred were faster.
    pub p99_ms: f64,
    /// All but one in a thousand were faster.
    pub p999_ms: f64,
}

impl Sample {
    /// Its figures.
    pub fn summary(&self) -> Summary {
        let sorted = self.latencies.sorted();
        let per_second = self.latencies.count() as f64 / self.time.as_secs_f64();
        Summary {
            per_second,
            range: (per_second, per_second),
            p50_ms: sorted.at(0.5),
            p99_ms: sorted.at(0.99),
            p999_ms: sorted.at(0.999),
        }
    }
}

impl Summary {
    /// The median of each figure.
    pub fn median(all: &[Self]) -> Self {
        let median = |figure: fn(&Summary) -> f64| median(all.iter().map(figure));
        let per_second = all.iter().map(|one| one.per_second);
        Self {
            per_second: median(|one| one.per_second),
            range: (
                per_second.clone().fold(f64::INFINITY, f64::min),
                per_second.fold(f64::NEG_INFINITY, f64::max),
            ),
            p50_ms: median(|one| one.p50_ms),
            p99_ms: median(|one| one.p99_ms),
            p999_ms: median(|one| one.p999_ms),
        }
    }
}

/// The figure in the middle.
pub fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs one task for each caller until the time is over. The first calls of each are not counted.
pub async fn closed_loop(callers: Vec<Caller>, time: Duration) -> Result<Sample> {
    let number = callers.len();
    let mut tasks = JoinSet::new();
    for mut caller in callers {
        tasks.spawn(async move {
            for _ in 0..WARM_UP {
                caller.call().await?;
            }
            let start = Instant::now();
            let mut latencies = Latencies::default();
            while start.elapsed() < time {
                let begin = Instant::now();
                caller.call().await?;
                latencies.push(begin.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Latencies::default();
    let all = async {
        while let Some(one) = tasks.join_next().await {
            latencies.extend(&one??);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(time + PATIENCE, all).await.context("calls were not answered in time")??;
    let made = latencies.count() + number * WARM_UP;
    Ok(Sample { latencies, time, made })
}

/// Calls that came at a fixed rate.
pub struct Open {
    /// From the moment at which a call was to be made, to its answer.
    pub latencies: Latencies,
    /// From the moment at which it was made, which hides that it was made late.
    pub service: Latencies,
    /// Calls a second that were answered.
    pub per_second: f64,
}

/// When which call is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Calls in a second.
    pub rate: f64,
    /// For how long.
    pub time: Duration,
}

impl Schedule {
    /// How many calls there are.
    pub fn calls(self) -> u64 {
        (self.rate * self.time.as_secs_f64()).floor() as u64
    }

    /// When a call is to be made, after the first one, which has the number 0.
    pub fn offset(self, number: u64) -> Duration {
        Duration::from_secs_f64(number as f64 / self.rate)
    }

    /// How many calls are to be made by now.
    pub fn due(self, elapsed: Duration) -> u64 {
        ((elapsed.as_secs_f64() * self.rate).floor() as u64 + 1).min(self.calls())
    }
}

/// Makes calls at a fixed rate. One for which no caller is free waits for one, and that counts: its time runs from the
/// moment at which it was to be made (coordinated omission). Calls that have not begun when the schedule has been over
/// for half of its time are not made.
pub async fn open_loop(callers: Vec<Caller>, schedule: Schedule) -> Result<Open> {
    let calls = schedule.calls();
    let end = schedule.time + schedule.time / 2;
    let (due, next) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    let mut warm = Vec::with_capacity(callers.len());
    for mut caller in callers {
        caller.call().await?;
        warm.push(caller);
    }
    let start = Instant::now();
    for mut caller in warm {
        let (due, next) = (Arc::clone(&due), Arc::clone(&next));
        tasks.spawn(async move {
            let (mut latencies, mut service) = (Latencies::default(), Latencies::default());
            while let Ok(permit) = due.acquire().await {
                permit.forget();
                let intended = schedule.offset(next.fetch_add(1, Ordering::Relaxed));
                let begin = start.elapsed();
                if begin > end {
                    break;
                }
                caller.call().await?;
                let answered = start.elapsed();
                latencies.push(answered.saturating_sub(intended));
                service.push(answered - begin);
            }
            anyhow::Ok((latencies, service))
        });
    }
    let pace = Arc::clone(&due);
    // The runtime's clock counts milliseconds, which is too coarse for thousands of calls a second.
    let pacer = tokio::task::spawn_blocking(move || {
        let mut released = 0;
        while released < calls {
            let wanted = schedule.due(start.elapsed());
            pace.add_permits(usize::try_from(wanted - released).unwrap_or_default());
            released = wanted;
            std::thread::sleep(schedule.offset(released).saturating_sub(start.elapsed()));
        }
        // Those who wait get what is left, and then leave.
        pace
    });
    let mut open = Open { latencies: Latencies::default(), service: Latencies::default(), per_second: 0.0 };
    let all = async {
        let pace = pacer.await?;
        while pace.available_permits() > 0 && start.elapsed() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pace.close();
        while let Some(one) = tasks.join_next().await {
            let (latencies, service) = one??;
            open.latencies.extend(&latencies);
            open.service.extend(&service);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(end + PATIENCE, all).await.context("calls were not answered in time")??;
    let time = start.elapsed().max(schedule.time);
    open.per_second = open.latencies.count() as f64 / time.as_secs_f64();
    Ok(open)
}

/// Makes so many calls, shared out among the callers as they are free.
pub async fn exactly(callers: Vec<Caller>, calls: u64) -> Result<Sample> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    for mut caller in callers {
        let next = Arc::clone(&next);
        tasks.spawn(async move {
            let mut latencies = Latencies::default();
            while next.fetch_add(1, Ordering::Relaxed) < calls {
                let begin = Instant::now();
                caller.call().await?;
                latencies.push(begin.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Latencies::default();
    while let Some(one) = tasks.join_next().await {
        latencies.extend(&one??);
    }
    let made = latencies.count();
    Ok(Sample { latencies, time: start.elapsed(), made })
}

/// Calls a second that are answered between two moments, for calls that take a good part of that time.
pub async fn window(callers: Vec<Caller>, before: Duration, time: Duration) -> Result<f64> {
    let answered = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for caller in callers {
        tasks.spawn(forever(caller, Arc::clone(&answered)));
    }
    let count = async {
        tokio::time::sleep(before).await;
        let (begun, first) = (Instant::now(), answered.load(Ordering::Relaxed));
        tokio::time::sleep(time).await;
        (answered.load(Ordering::Relaxed) - first) as f64 / begun.elapsed().as_secs_f64()
    };
    tokio::select! {
        rate = count => Ok(rate),
        failed = tasks.join_next() => {
            failed.context("nobody calls")???;
            anyhow::bail!("a caller has ended")
        }
    }
}

/// Calls until it is dropped or a call fails, and counts.
async fn forever(mut caller: Caller, answered: Arc<AtomicU64>) -> Result<()> {
    loop {
        caller.call().await?;
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes one call of each caller, all at once: how long until the last one is answered.
pub async fn burst(callers: Vec<Caller>) -> Result<Duration> {
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    for mut caller in callers {
        tasks.spawn(async move { caller.call().await });
    }
    let all = async {
        while let Some(one) = tasks.join_next().await {
            one??;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, all).await.context("calls were not answered in time")??;
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(ms: impl Iterator<Item = u64>) -> Sorted {
        let mut latencies = Latencies::default();
        ms.for_each(|ms| latencies.push(Duration::from_millis(ms)));
        latencies.sorted()
    }

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let hundred = latencies((1..=100).rev());
        assert_eq!(
            [0.0, 0.5, 0.99, 0.999, 1.0].map(|share| hundred.at(share)),
            [1.0, 50.0, 99.0, 100.0, 100.0]
        );
        assert_eq!(latencies(7..8).at(0.5), 7.0);
        assert!(latencies(0..0).at(0.5).is_nan());
    }

    #[test]
    fn latencies_are_kept_to_a_tenth_of_a_microsecond_and_do_not_run_over() {
        let mut some = Latencies::default();
        some.push(Duration::from_nanos(1_250));
        assert_eq!(some.sorted().at(1.0), 0.0012);
        some.push(Duration::from_secs(1_000));
        assert!(some.sorted().at(1.0) > 400_000.0);
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn a_schedule_names_every_call_once() {
        let schedule = Schedule { rate: 1_000.0, time: Duration::from_millis(250) };
        assert_eq!(schedule.calls(), 250);
        assert_eq!(schedule.offset(100), Duration::from_millis(100));
        assert_eq!(schedule.due(Duration::ZERO), 1);
        assert_eq!(schedule.due(Duration::from_millis(100)), 101);
        assert_eq!(schedule.due(Duration::from_secs(9)), 250);
    }
}
