//! Closed-loop measurement: every caller makes its next call when the last one is answered.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// One measurement.
pub struct Sample {
    latencies: Vec<Duration>,
    time: Duration,
    /// All calls, those that are not counted among them.
    pub made: usize,
}

/// What is printed of one or more measurements.
pub struct Summary {
    /// Calls answered in a second.
    pub per_second: f64,
    /// The same for the slowest and the fastest measurement.
    pub range: (f64, f64),
    /// Half of the calls were faster.
    pub p50_ms: f64,
    /// All but one in a hundred were faster.
    pub p99_ms: f64,
}

impl Sample {
    fn summary(&self) -> Summary {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = |share: f64| {
            let index = (sorted.len() as f64 * share) as usize;
            sorted
                .get(index.min(sorted.len().saturating_sub(1)))
                .map_or(f64::NAN, |one| one.as_secs_f64() * 1_000.0)
        };
        let per_second = sorted.len() as f64 / self.time.as_secs_f64();
        Summary { per_second, range: (per_second, per_second), p50_ms: at(0.5), p99_ms: at(0.99) }
    }
}

impl Summary {
    /// The median of each figure.
    pub fn median(samples: &[Sample]) -> Self {
        let all: Vec<_> = samples.iter().map(Sample::summary).collect();
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
pub async fn closed_loop<C, F, Fut>(callers: Vec<C>, time: Duration, call: F) -> Result<Sample>
where
    C: Send + 'static,
    F: Fn(C) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<C>> + Send + 'static,
{
    const WARM_UP: usize = 20;
    /// How long the calls around those that are counted may take.
    const PATIENCE: Duration = Duration::from_secs(60);

    let number = callers.len();
    let mut tasks = tokio::task::JoinSet::new();
    for mut caller in callers {
        let call = call.clone();
        tasks.spawn(async move {
            for _ in 0..WARM_UP {
                caller = call(caller).await?;
            }
            let start = Instant::now();
            let mut latencies = Vec::with_capacity(100_000);
            while start.elapsed() < time {
                let begin = Instant::now();
                caller = call(caller).await?;
                latencies.push(begin.elapsed());
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    let all = async {
        while let Some(one) = tasks.join_next().await {
            latencies.extend(one??);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(time + PATIENCE, all).await.context("calls were not answered in time")??;
    let made = latencies.len() + number * WARM_UP;
    Ok(Sample { latencies, time, made })
}
