//! Lines to and from a server: cutting what it writes, reading envelopes, and writing a call.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has failed")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mcp_worker::benching::{answers, line};

const SIZES: [(&str, usize); 3] = [("100 B", 100), ("10 KB", 10_000), ("1 MB", 1_000_000)];
/// Lines that a busy server writes at once.
const LINES: usize = 64;

fn framer(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut group = criterion.benchmark_group("framer/answers");
    for (name, size) in SIZES {
        let text = "x".repeat(size);
        let lines = if size > 100_000 { 1 } else { LINES };
        let output: String = (0..lines)
            .map(|id| {
                format!(
                    "{{\"jsonrpc\":\"2.0\",\"id\":{id},\"result\":{{\"content\":[{{\"type\":\"text\",\"text\":\"{text}\"}}]}}}}\n"
                )
            })
            .collect();
        assert_eq!(runtime.block_on(answers(output.as_bytes())), lines);
        group.throughput(Throughput::Bytes(output.len() as u64));
        group.bench_with_input(
            BenchmarkId::new(format!("{lines} lines"), name),
            &output,
            |bencher, output| {
                bencher.iter(|| runtime.block_on(answers(black_box(output.as_bytes()))));
            },
        );
    }
    group.finish();
    let mut group = criterion.benchmark_group("framer/call");
    for (name, size) in SIZES {
        let arguments = Bytes::from(format!("{{\"text\":\"{}\"}}", "x".repeat(size)));
        group.throughput(Throughput::Bytes(arguments.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), &arguments, |bencher, arguments| {
            bencher.iter(|| line(black_box(7), "echo", arguments));
        });
    }
    group.finish();
}

criterion_group!(benches, framer);
criterion_main!(benches);
