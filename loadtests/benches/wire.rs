//! The codec of the bus: messages with their bodies, as they are written and read.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has failed")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mcp_nats::wire::{CallId, Frame, ToRouter, ToWorker, decode, encode};
use serde_json::json;

const BODIES: [(&str, usize); 2] = [("100 B", 100), ("100 KB", 100_000)];

fn wire(criterion: &mut Criterion) {
    // As the router writes it: see `Offer`.
    let offer = json!([
        "000102030405060708090a0b0c0d0e0f",
        {"offer": {
            "version": 1, "request": "01234567-89ab-7def-8123-456789abcdef", "user": "default", "spentMs": 0,
            "size": 120, "router": "gateway-01234567",
            "call": {"server": "echo", "tool": "echo", "progress": false, "placing": "owned"},
        }},
    ]);
    let offer = Bytes::from(format!("{offer}\n"));
    let read = decode::<(CallId, ToWorker)>(&offer);
    let (offer_message, _) = read.unwrap();
    let go = (CallId(7), ToWorker::Go(Frame { number: 0, total: 120, sha256: None }));
    let mut group = criterion.benchmark_group("wire/offer");
    group.bench_function("encode", |bencher| bencher.iter(|| encode(black_box(&offer_message), b"")));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| decode::<(CallId, ToWorker)>(black_box(&offer)).is_ok());
    });
    group.finish();
    for (name, size) in BODIES {
        let body = vec![b'x'; size];
        let answer = ToRouter::Answer(Frame { number: 0, total: size, sha256: None });
        let (go_bytes, answer_bytes) = (encode(&go, &body).unwrap(), encode(&answer, &body).unwrap());
        let mut group = criterion.benchmark_group("wire/body");
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("encode go", name), |bencher| {
            bencher.iter(|| encode(black_box(&go), &body));
        });
        group.bench_function(BenchmarkId::new("decode go", name), |bencher| {
            bencher.iter(|| decode::<(CallId, ToWorker)>(black_box(&go_bytes)).is_ok());
        });
        group.bench_function(BenchmarkId::new("encode answer", name), |bencher| {
            bencher.iter(|| encode(black_box(&answer), &body));
        });
        group.bench_function(BenchmarkId::new("decode answer", name), |bencher| {
            bencher.iter(|| decode::<ToRouter>(black_box(&answer_bytes)).is_ok());
        });
        group.finish();
    }
}

criterion_group!(benches, wire);
criterion_main!(benches);
