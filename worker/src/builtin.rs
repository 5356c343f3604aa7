//! Servers that are part of the program. To everything else in this worker such a server is one like the others, with a
//! connection, calls in flight, a log: what is at the other end of the connection is a task and not a process.

use std::sync::Arc;

use mcp_shared::limits;
use tokio::{io::duplex, sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    host::Host,
    instance::{End, Instance, Origin},
    logs::Log,
    mcp,
    transport::stdio,
};

pub(crate) mod browser;
mod cdp;
mod content;
pub mod convert;
mod document;
mod fetch;
mod page;
mod proxy;
mod search;
mod serve;
pub(crate) mod trial;
mod usage;
mod webtools;

pub use webtools::WebTools;

/// Bytes that may be on their way in each direction.
const BUFFER: usize = 64 * 1024;

/// Connects to the one that there is.
pub async fn open(host: &Arc<Host>, log: &Arc<Log>) -> Result<Arc<Instance>, String> {
    let (ours, theirs) = duplex(BUFFER);
    let (output, input) = tokio::io::split(ours);
    let connection = stdio::open(input, output, Arc::clone(log), &host.tasks);
    host.tasks.spawn(serve::serve(Arc::clone(&host.web_tools), theirs, host.tasks.clone()));
    let greet = async {
        mcp::negotiate(&connection).await?;
        mcp::list_tools(&connection).await
    };
    let tools = match timeout(limits::STARTUP_TIMEOUT, greet).await {
        Ok(Ok(tools)) => tools,
        Ok(Err(refusal)) => {
            connection.close();
            return Err(refusal.to_string());
        }
        Err(_) => {
            connection.close();
            return Err("it did not list its tools in time".to_owned());
        }
    };
    let stop = CancellationToken::new();
    let (ended_sender, ended) = watch::channel(None);
    let (stopped, watched) = (stop.clone(), connection.clone());
    host.tasks.spawn(async move {
        tokio::select! {
            () = stopped.cancelled() => {}
            () = watched.broken() => {}
        }
        watched.close_input();
        watched.close();
        ended_sender.send_replace(Some(End::Builtin));
    });
    Ok(Instance::new(connection, Origin::Builtin, tools, stop, ended))
}
