//! Leaving in order: others take over first, then the calls in flight end.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};

use super::Inner;

/// How long others have to take over what only this worker runs.
const HAND_OVER: Duration = Duration::from_secs(10);

impl Inner {
    pub(super) async fn drain(self: &Arc<Self>, limit: Duration) {
        let end = Instant::now() + limit;
        self.host.drain();
        self.hand_over(end.min(Instant::now() + HAND_OVER)).await;
        let calls = async {
            loop {
                let mut ended = std::pin::pin!(self.ended.notified());
                ended.as_mut().enable();
                if self.table().desk.open() == 0 {
                    return;
                }
                ended.await;
            }
        };
        if timeout_at(end, calls).await.is_err() {
            tracing::warn!("calls were still in flight when the time to stop was over");
        }
    }

    /// Waits until every shared server that runs here runs elsewhere as well, if there is an elsewhere.
    async fn hand_over(&self, end: Instant) {
        let shared: Vec<_> =
            self.host.describe().servers.into_iter().filter(|load| load.users == 0).collect();
        while Instant::now() < end {
            let others = self.router.staying();
            let alone = !self.router.is_up() || others.iter().all(|worker| worker == self.bus.node());
            let left =
                shared.iter().filter(|load| self.host.wanted().iter().any(|(name, _)| *name == load.name));
            let mut left = left.filter(|load| self.router.running(&load.name).is_empty());
            if alone || left.next().is_none() {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}
