//! Counts what the programs allocate, by a small library that is preloaded into them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::process::Command;

/// The library, and the files that it counts into.
pub struct Counter {
    folder: TempDir,
}

impl Counter {
    /// Builds the library with the C compiler of this machine.
    pub async fn build() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let source = folder.path().join("allocations.c");
        std::fs::write(&source, include_str!("allocations.c"))?;
        let library = folder.path().join("allocations.so");
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(library).arg(source);
        let built = compiler.status().await.context("counting allocations takes a C compiler, `cc`")?;
        ensure!(built.success(), "the library that counts allocations was not built");
        Ok(Self { folder })
    }

    /// What a program's environment needs. What it starts has an environment of its own and is not counted.
    pub fn env(&self, program: &str) -> Vec<(String, String)> {
        let text = |path: PathBuf| path.display().to_string();
        vec![
            ("LD_PRELOAD".to_owned(), text(self.folder.path().join("allocations.so"))),
            ("ALLOCATIONS_FILE".to_owned(), text(self.file(program))),
        ]
    }

    /// The file of a program.
    pub fn file(&self, program: &str) -> PathBuf {
        self.folder.path().join(format!("{program}.counts"))
    }
}

/// How often a program has allocated, and how many bytes.
pub fn read(file: &Path) -> Result<(f64, f64)> {
    let counts = std::fs::read(file).context("allocations were not counted")?;
    let number = |at: usize| {
        let bytes = counts.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u64::from_ne_bytes(bytes) as f64).context("allocations were not counted")
    };
    Ok((number(0)?, number(8)?))
}
