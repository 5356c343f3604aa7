//! Strangers' documents are read by a process of its own, one for each: what hangs, takes all memory or falls over there
//! ends there, and the kernel sees to it that it does.

use std::{
    io::{BufRead, Read, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use mcp_shared::limits;
use nix::sys::resource::{Resource, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::document;
use crate::supervisor::{Exit, SpawnSpec, Streams, Supervisor};

/// The argument that makes our executable read a document from its standard input and write what it says to its standard
/// output. Its first line says what the document is.
pub const ARGUMENT: &str = "__convert-document";

/// Bytes of memory of the stack of what reads a document.
const STACK: usize = 64 * 1024 * 1024;

/// What a document is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// A page.
    Html {
        /// Where it is.
        url: String,
        /// The character set that its server named.
        charset: Option<String>,
    },
    /// A PDF.
    Pdf,
}

/// What it says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Its title; empty if it has none.
    pub title: String,
    /// Its text: Markdown of a page, plain text of a PDF.
    pub text: String,
    /// Whether the text is longer than it may be.
    pub cut: bool,
}

/// Why a document was not read. The texts are for callers.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("the document cannot be read: {0}")]
    Unreadable(String),
    #[error("the document takes too much memory or time to be read")]
    TooMuch,
    #[error("the document could not be read because of a fault of ours")]
    Failed,
}

/// Has documents read.
pub struct Converter {
    executable: PathBuf,
    supervisor: Arc<Supervisor>,
}

impl Converter {
    /// `executable` is this program.
    pub fn new(executable: PathBuf, supervisor: Arc<Supervisor>) -> Self {
        Self { executable, supervisor }
    }

    /// Reads one document. When this future is dropped the process goes.
    pub async fn convert(&self, source: &Source, bytes: &[u8]) -> Result<Document, ConvertError> {
        let converted = timeout(limits::WEB_CONVERT_TIMEOUT, self.run(source, bytes)).await;
        converted.unwrap_or(Err(ConvertError::TooMuch))
    }

    async fn run(&self, source: &Source, bytes: &[u8]) -> Result<Document, ConvertError> {
        let source = serde_json::to_string(source).map_err(|_| ConvertError::Failed)?;
        let spec = SpawnSpec {
            program: self.executable.to_string_lossy().into_owned(),
            args: vec![ARGUMENT.to_owned()],
            env: Vec::new(),
            folder: None,
        };
        let (mut child, streams) = self.supervisor.spawn(spec).await.map_err(|error| {
            tracing::error!(%error, "a document cannot be read: the process for it did not start");
            ConvertError::Failed
        })?;
        let Streams { mut stdin, stdout, stderr } = streams;
        let give = async {
            // In a command line everybody on this machine could read where the document is from. One that ends before it
            // has read everything says why by its end.
            if stdin.write_all(format!("{source}\n").as_bytes()).await.is_ok() {
                let _ = stdin.write_all(bytes).await;
            }
            drop(stdin);
        };
        let (mut said, mut words) = (Vec::new(), Vec::new());
        // A character may take six bytes in JSON.
        let mut answer = stdout.take(8 * limits::WEB_TEXT_BYTES as u64);
        let mut stderr = stderr.take(4 * 1024);
        let ((), _, _) = tokio::join!(give, answer.read_to_end(&mut said), stderr.read_to_end(&mut words));
        match child.exited().await {
            Exit::Code(0) => {
                let read: Result<Document, String> =
                    serde_json::from_slice(&said).map_err(|_| ConvertError::Failed)?;
                read.map_err(ConvertError::Unreadable)
            }
            // What reads it fell over it.
            Exit::Code(_) => {
                Err(ConvertError::Unreadable("it is damaged, or of a kind that is not known".to_owned()))
            }
            exit => {
                let words = String::from_utf8_lossy(&words);
                tracing::info!(%exit, words = words.trim(), "what read a document ended");
                Err(ConvertError::TooMuch)
            }
        }
    }
}

/// Reads the document on the standard input, and nothing else: the process that does it has limits from here on.
pub fn run() -> ExitCode {
    let seconds = limits::WEB_CONVERT_TIMEOUT.as_secs();
    let limited = [
        (Resource::RLIMIT_AS, limits::WEB_CONVERT_MEMORY),
        (Resource::RLIMIT_CPU, seconds),
        // It has nothing to write to, and nobody to talk to beyond what is open already.
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NOFILE, 3),
        (Resource::RLIMIT_CORE, 0),
    ];
    // Without them a document of a stranger is not looked at.
    if limited.iter().any(|(resource, most)| setrlimit(*resource, *most, *most).is_err()) {
        return ExitCode::FAILURE;
    }
    let (mut bytes, mut source) = (Vec::new(), String::new());
    let most = 2 * limits::WEB_PAGE_BYTES as u64;
    let mut input = std::io::stdin().lock().take(most);
    if input.read_line(&mut source).is_err() || input.read_to_end(&mut bytes).is_err() {
        return ExitCode::FAILURE;
    }
    let Ok(source) = serde_json::from_str::<Source>(&source) else { return ExitCode::FAILURE };
    // The libraries for it call themselves again for what is inside of something.
    let read = std::thread::Builder::new().stack_size(STACK).spawn(move || document::read(&source, &bytes));
    let Ok(Ok(read)) = read.map(std::thread::JoinHandle::join) else { return ExitCode::FAILURE };
    let written = serde_json::to_vec(&read).map(|text| std::io::stdout().lock().write_all(&text));
    if matches!(written, Ok(Ok(()))) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
