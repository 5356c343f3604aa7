//! Sealing and opening values, as is done for secrets that are set and used.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot be set up has failed")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mcp_shared::crypter::{Crypter, KeyRing, LegacyMode, Place, generate_key_line};
use secrecy::SecretString;

const SIZES: [(&str, usize); 3] = [("40 B", 40), ("4 KB", 4_096), ("64 KB", 65_536)];

fn crypter(criterion: &mut Criterion) {
    let ring = KeyRing::from_file(&generate_key_line("k1").unwrap()).unwrap();
    let crypter = Crypter::new(ring, LegacyMode::Off).unwrap();
    let place = Place { collection: "secrets", field: "value", ids: &["alice", "echo", "API_KEY"] };
    for (name, size) in SIZES {
        let value = SecretString::from("x".repeat(size));
        let sealed = crypter.seal(&place, &value).unwrap();
        assert!(crypter.open(&place, &sealed).is_ok());
        let mut group = criterion.benchmark_group("crypter");
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("seal", name), |bencher| {
            bencher.iter(|| crypter.seal(&place, black_box(&value)).is_ok());
        });
        group.bench_function(BenchmarkId::new("open", name), |bencher| {
            bencher.iter(|| crypter.open(&place, black_box(&sealed)).is_ok());
        });
        group.finish();
    }
}

criterion_group!(benches, crypter);
criterion_main!(benches);
