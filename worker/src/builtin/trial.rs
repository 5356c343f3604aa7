//! Whether the browser works on this machine: it is started as for pages, and shows one that is empty.

use std::{path::Path, sync::Arc, time::Duration};

use mcp_shared::config::RemoteSettings;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::browser::Browsers;
use crate::supervisor::{Supervisor, this_program};

/// How long it may take. A machine that is busy takes seconds for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to be gone, with its folder.
const END: Duration = Duration::from_secs(3);

/// Tries it out. Says which one it is, or why it does not work; nothing is left of it.
pub async fn run(settings: &RemoteSettings, program: &Path, sandboxed: bool) -> Result<String, String> {
    let (tasks, stopping) = (TaskTracker::new(), CancellationToken::new());
    let supervisor = Arc::new(Supervisor::new(this_program()));
    let browsers = Browsers::new(
        settings.web_tools.clone(),
        settings.egress.clone(),
        supervisor,
        tasks.clone(),
        stopping.clone(),
    );
    let tried = timeout(PATIENCE, browsers.try_out(program, sandboxed)).await;
    stopping.cancel();
    tasks.close();
    let _ = timeout(END, tasks.wait()).await;
    tried.unwrap_or_else(|_| Err(format!("it shows no page within {} s", PATIENCE.as_secs())))
}
