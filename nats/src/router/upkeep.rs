//! What nobody answers: time limits, silent workers, an absent bus.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{Errand, Inner, lock, replies::ECHO};
use crate::caller::Now;

/// How often the clock is looked at.
const TICK: Duration = Duration::from_millis(50);
/// How often this node tries to hear itself.
const ECHO_EVERY: Duration = Duration::from_millis(250);
/// How often workers that have calls are asked for a sign of life.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// A call that was not heard of for so long is asked about.
const SILENT_CALL: Duration = Duration::from_secs(1);
/// A worker with calls is lost when nothing was heard of it for so long.
const LOST_AFTER: Duration = Duration::from_millis(3_500);
/// How long calls wait for the bus to come back.
const BUS_PATIENCE: Duration = Duration::from_secs(10);
/// How long after a new connection others may still be making theirs.
const SETTLING: Duration = Duration::from_secs(4);
/// Finished calls that a worker is told of at once.
const DONE_BATCH: usize = 256;

impl Inner {
    /// Whether connections have stood for a while, so that an absent worker is gone.
    pub(super) fn is_settled(&self) -> bool {
        self.bus.now() >= Duration::from_millis(self.unsettled_until.load(Ordering::Acquire))
    }

    /// Sends what the watch has to say, in order.
    pub(super) async fn run_errands(self: Arc<Self>, mut errands: mpsc::Receiver<Errand>) {
        loop {
            tokio::select! {
                errand = errands.recv() => match errand {
                    Some(errand) => errand.await,
                    None => return,
                },
                () = self.stopping.cancelled() => return,
            }
        }
    }

    /// Has something sent as soon as the connection takes it.
    pub(super) fn send_later(&self, errand: impl Future<Output = ()> + Send + 'static) {
        if self.errands.try_send(Box::pin(errand)).is_err() {
            // The watch finds out what became of the call.
            tracing::debug!("too much waits to be sent: a message is left out");
        }
    }

    /// Looks at the clock until the router leaves.
    pub(super) async fn watch(self: Arc<Self>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut gaps = self.bus.gaps();
        let (mut echoed, mut probed) = (Instant::now() - ECHO_EVERY, Instant::now());
        let mut away: Option<Now> = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.stopping.cancelled() => return,
            }
            let now = self.bus.now();
            if echoed.elapsed() >= ECHO_EVERY && self.bus.is_connected() {
                echoed = Instant::now();
                let bus = self.bus.clone();
                self.send_later(async move {
                    let _ = bus.publish(bus.reply_to(ECHO).into(), Bytes::new()).await;
                });
            }
            if self.bus.gaps() != gaps {
                gaps = self.bus.gaps();
                self.cancel_again();
                self.unsettled_until.store(crate::wire::millis(now + SETTLING), Ordering::Release);
                self.fleet_mut().excuse(now);
            }
            match (self.is_up(), away) {
                (false, None) => away = Some(now),
                (false, Some(since)) if now.saturating_sub(since) >= BUS_PATIENCE => {
                    self.cut_off();
                }
                (true, Some(_)) => {
                    away = None;
                    self.cancel_again();
                    self.unsettled_until.store(crate::wire::millis(now + SETTLING), Ordering::Release);
                    self.fleet_mut().excuse(now);
                }
                _ => {}
            }
            let working = self.tick(SILENT_CALL);
            if probed.elapsed() >= PROBE_EVERY && away.is_none() {
                probed = Instant::now();
                lock(&self.probes).clear();
                for (worker, open) in working {
                    let silence = self.fleet().silence(now, &worker);
                    if silence.is_none_or(|silence| silence >= LOST_AFTER) {
                        self.worker_lost(&worker);
                    } else {
                        self.probe(&worker, open);
                    }
                }
                let rest: Vec<_> = lock(&self.done).keys().cloned().collect();
                for worker in rest {
                    self.probe(&worker, Vec::new());
                }
            } else if away.is_none() {
                let full: Vec<_> = lock(&self.done)
                    .iter()
                    .filter(|(_, ids)| ids.len() >= DONE_BATCH)
                    .map(|(worker, _)| worker.clone())
                    .collect();
                for worker in full {
                    self.probe(&worker, Vec::new());
                }
            }
        }
    }
}
