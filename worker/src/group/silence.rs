//! What becomes of a process that says nothing at all any more while calls wait for it: one that was stopped, or
//! hangs as a whole.
//!
//! Silence alone proves nothing. Many servers have one thread, and say nothing, not even to a ping, while a tool
//! runs that takes its time. Such a process must not be ended while a call is within its time that it may be busy
//! with. So a silent process is replaced only when
//!
//! * it owes [`limits::PINGS_MISSED`] signs of life,
//! * all calls that it had been given when the silence was noticed are past their deadlines and the time that a
//!   cancelled call is granted, so that nobody waits for whatever it does, and
//! * it has been silent for as long as a call of this server may take if its caller asks for nothing else: what
//!   nobody waits for any more may still hold up what came after it, and come to an end.
//!
//! Calls that came later end with it. Nearly all of them would have run into their deadlines behind all this; one
//! that its server had taken up in the meantime, without a word about anything else, is lost, and its caller told
//! that nobody knows what became of it.

use std::{future::pending, sync::Arc};

use mcp_shared::{limits, metrics::Gone};
use tokio::time::{Instant, timeout};

use super::{Group, current};
use crate::instance::Instance;

/// A silence that was noticed.
struct Silence {
    since: Instant,
    /// When all calls that were under way then have had their time.
    over: Instant,
}

/// Watches one process, until it ends or has to be replaced.
pub(super) async fn watch_silence(group: Arc<Group>, instance: Arc<Instance>) {
    let mut silence: Option<Silence> = None;
    let mut heard = 0;
    loop {
        let pause = timeout(limits::PING_INTERVAL, async {
            if silence.is_some() {
                // Any answer will do, and an error is one: what counts is that something was heard.
                let _ = instance.connection.request("ping", "{}").await;
            }
            pending::<()>().await;
        });
        tokio::select! {
            _ = pause => {}
            _ = instance.ended() => return,
        }
        let now_heard = instance.connection.heard();
        if instance.is_idle() || std::mem::replace(&mut heard, now_heard) != now_heard {
            silence = None;
            continue;
        }
        let now = Instant::now();
        let Some(Silence { since, over }) = silence else {
            silence = Some(Silence { since: now, over: instance.last_deadline() + limits::CANCEL_GRACE });
            continue;
        };
        let longest = current(&group.record).call_limit(None);
        let enough = longest.max(limits::PING_INTERVAL * limits::PINGS_MISSED);
        if now >= over && now - since >= enough {
            group.log.note("the process says nothing any more while calls wait for it: it is replaced");
            tracing::warn!(server = %group.server, "a silent process is replaced");
            instance.leave();
            instance.stop_for(Gone::Stuck).await;
            return;
        }
    }
}
