//! What watches over a group: the ends of its processes, their changing tools, and their idleness.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use mcp_shared::{limits, metrics::Gone};
use tokio::{sync::watch, time::timeout};

use super::{Group, current};
use crate::instance::Instance;

/// Watches one process: replaces it when it dies, lists its tools again when they change.
pub(super) async fn watch_instance(group: Arc<Group>, instance: Arc<Instance>) {
    loop {
        tokio::select! {
            end = instance.ended() => {
                group.instance_ended(&instance, end);
                return;
            }
            () = instance.connection.tools_changed() => {
                let limit = current(&group.record).startup_limit();
                match timeout(limit, crate::mcp::list_tools(&instance.connection)).await {
                    Ok(Ok(tools)) => {
                        instance.set_tools(tools);
                        // Of a version that is on its way out nobody wants to know.
                        if !group.retired.is_cancelled() {
                            (group.on_tools)(&instance.tools());
                        }
                    }
                    Ok(Err(refusal)) => group.log.note(&format!("its tools changed, but {refusal}")),
                    Err(_) => group.log.note("its tools changed, but it did not list them in time"),
                }
                // A server may announce changes faster than anybody wants to hear of them.
                let _ = timeout(limits::LISTING_PAUSE, instance.ended()).await;
            }
        }
    }
}

/// Stops the processes when nobody called for as long as the record says.
pub(super) async fn watch_idle(group: Weak<Group>) {
    loop {
        let (pause, retired, stopping) = {
            let Some(group) = group.upgrade() else { return };
            let limit = current(&group.record).idle_limit();
            let mut state = group.state();
            let idle = state.last_used.elapsed();
            let busy = state.busy.is_some()
                || state.instances.iter().any(|instance| instance.in_flight.load(Ordering::Acquire) > 0);
            let pause = match limit {
                Some(limit) if idle >= limit && !busy && !state.instances.is_empty() => {
                    // New calls wait for the end of this, and then start a process again.
                    let (done, receiver) = watch::channel(None);
                    state.busy = Some(receiver);
                    state.wanted = false;
                    let instances = std::mem::take(&mut state.instances);
                    tracing::info!(server = %group.server, "stopping an idle server");
                    let stopped = Arc::clone(&group);
                    group.host.tasks.spawn(async move {
                        futures_util::future::join_all(instances.iter().map(|one| one.stop_for(Gone::Idle)))
                            .await;
                        stopped.state().busy = None;
                        drop(done);
                        stopped.host.note_change();
                        stopped.rest().await;
                    });
                    limit
                }
                Some(limit) => limit.saturating_sub(idle).max(Duration::from_millis(20)),
                // The record may get a limit later.
                None => Duration::from_secs(5),
            };
            drop(state);
            (pause.min(Duration::from_secs(5)), group.retired.clone(), group.host.stopping.clone())
        };
        tokio::select! {
            () = retired.cancelled() => return,
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}
