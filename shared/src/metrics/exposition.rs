//! How a node's metrics are shown: each is read where it is counted, when somebody asks.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::exemplar::Exemplar,
    registry::Registry,
};

use super::{
    instruments::{Counts, Histogram},
    table::{Closed, Kind, Metric},
};

/// The media type of [`Exposition::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Read = Box<dyn Fn(&mut Samples<'_>) + Send + Sync>;

/// What one node shows.
pub struct Exposition {
    shown: Arc<Shown>,
    registry: Registry,
}

#[derive(Default)]
struct Shown(RwLock<BTreeMap<Metric, Read>>);

impl Exposition {
    /// Shows nothing yet.
    pub fn empty() -> Self {
        let (shown, mut registry) = (Arc::new(Shown::default()), Registry::default());
        registry.register_collector(Box::new(Shared(Arc::clone(&shown))));
        Self { shown, registry }
    }

    /// Shows a metric with whatever time series `read` finds whenever somebody asks.
    pub fn show_all(&self, metric: Metric, read: impl Fn(&mut Samples<'_>) + Send + Sync + 'static) {
        let mut shown = self.shown.0.write().unwrap_or_else(PoisonError::into_inner);
        shown.insert(metric, Box::new(read));
    }

    /// Shows a value that is read whenever somebody asks.
    pub fn show(&self, metric: Metric, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.show_all(metric, move |samples| samples.value(&[], read()));
    }

    /// Shows a number that can be told without loss, as counts below 2^53 can.
    pub fn show_count(&self, metric: Metric, read: impl Fn() -> usize + Send + Sync + 'static) {
        self.show(metric, move || read() as f64);
    }

    /// Shows a counter with one label.
    pub fn show_counts<L: Closed, const N: usize>(
        &self,
        metric: Metric,
        label: &'static str,
        counts: &'static Counts<L, N>,
    ) {
        self.show_all(metric, move |samples| {
            for value in L::all() {
                samples.count(&[(label, value.text())], counts.get(*value));
            }
        });
    }

    /// What is shown.
    pub fn metrics(&self) -> Vec<Metric> {
        self.shown.0.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Everything as text, in the format of OpenMetrics.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut out = String::with_capacity(64 * 1024);
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// Takes the time series of one metric.
pub struct Samples<'a> {
    encoder: MetricEncoder<'a>,
    kind: Kind,
    written: fmt::Result,
}

impl Samples<'_> {
    /// A counter's number.
    pub fn count(&mut self, labels: &[(&str, &str)], count: u64) {
        self.write(labels, |encoder| encoder.encode_counter::<NoLabelSet, _, f64>(&count, NONE));
    }

    /// The number of a counter that counts parts as well, or of a gauge.
    pub fn value(&mut self, labels: &[(&str, &str)], value: f64) {
        match self.kind {
            Kind::Counter => {
                self.write(labels, |encoder| encoder.encode_counter::<NoLabelSet, _, f64>(&value, NONE));
            }
            _ => self.write(labels, |encoder| encoder.encode_gauge(&value)),
        }
    }

    /// A histogram's buckets.
    pub fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        let (sum, buckets) = histogram.read();
        // Read once: what is added meanwhile is in both or in neither.
        let count = buckets.iter().map(|(_, count)| count).sum();
        self.write(labels, |encoder| encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None));
    }

    fn write(&mut self, labels: &[(&str, &str)], sample: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result) {
        let written = if labels.is_empty() {
            sample(&mut self.encoder)
        } else {
            self.encoder.encode_family(&labels).and_then(|mut encoder| sample(&mut encoder))
        };
        self.written = self.written.and(written);
    }
}

const NONE: Option<&Exemplar<NoLabelSet, f64>> = None;

struct Shared(Arc<Shown>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("metrics")
    }
}

impl Collector for Shared {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (metric, read) in &*self.0.0.read().unwrap_or_else(PoisonError::into_inner) {
            let unit = metric.unit();
            let encoder = encoder.encode_descriptor(
                metric.stem(),
                metric.help(),
                unit.as_ref(),
                metric.metric_type(),
            )?;
            let mut samples = Samples { encoder, kind: metric.kind(), written: Ok(()) };
            read(&mut samples);
            samples.written?;
        }
        Ok(())
    }
}
