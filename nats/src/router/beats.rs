//! Beats: this node's, and those of others.

use std::{sync::Arc, time::Duration};

use async_nats::Subscriber;
use futures_util::StreamExt;
use mcp_shared::{error::WorkerError, fleet::NodeReport, telemetry};
use tokio::{sync::watch, time::sleep};

use super::{Inner, lock};
use crate::{
    caller::{Now, bus_unavailable},
    fleet::BEAT,
    wire::{self, Beat},
};

/// How long changes are gathered before they are told.
const GATHER: Duration = Duration::from_millis(10);

impl Inner {
    /// Hears the others until the router leaves.
    pub(super) async fn hear_beats(self: Arc<Self>, mut beats: Subscriber) {
        loop {
            let message = tokio::select! {
                message = beats.next() => message,
                () = self.stopping.cancelled() => return,
            };
            let Some(message) = message else { return };
            let beat = match wire::decode::<Beat>(&message.payload) {
                Ok((beat, _)) => beat,
                Err(error) => {
                    tracing::warn!(%error, "a beat was passed over");
                    continue;
                }
            };
            let now = self.bus.now();
            match beat {
                Beat::Gone(node) => self.fleet_mut().left(&node),
                Beat::Log(filter) => match telemetry::set_filter(filter.as_deref()) {
                    Ok(()) => {}
                    Err(error) => tracing::warn!(%error, "a log filter of another node was passed over"),
                },
                Beat::Here(report) => self.meet(now, report),
                Beat::Hello(report) => {
                    if report.id != *self.bus.node() {
                        self.asked.notify_one();
                    }
                    self.meet(now, report);
                }
            }
        }
    }

    /// Takes a node into the view of the fleet, unless it cannot be of this fleet: it would look for
    /// servers and secrets where they are not.
    fn meet(&self, now: Now, report: NodeReport) {
        let Some(why) = self.disagreement(&report) else {
            return self.fleet_mut().beat(now, report);
        };
        let mut strangers = lock(&self.strangers);
        if !strangers.contains(&report.id) {
            tracing::error!(node = %report.id, %why, "a node is passed over that cannot be of this fleet");
        }
        strangers.put(report.id, why);
    }

    /// Why a node cannot be of one fleet with this one, if it cannot.
    fn disagreement(&self, report: &NodeReport) -> Option<String> {
        lock(&self.me).disagreement(report)?;
        // Keys are exchanged while nodes run, and since its last beat this one may have others.
        let me = (self.describe)();
        let why = me.disagreement(report);
        *lock(&self.me) = me;
        why
    }

    /// Says what this node is, each second and whenever it has something new to say.
    pub(super) async fn beat(self: Arc<Self>, mut changed: watch::Receiver<()>) {
        self.say(&Beat::Hello((self.describe)())).await;
        let mut changes = true;
        loop {
            tokio::select! {
                () = sleep(BEAT) => {}
                () = self.asked.notified() => {}
                told = changed.changed(), if changes => {
                    // A node that never changes has nobody to tell of it.
                    changes = told.is_ok();
                    // What changes together is told together.
                    sleep(GATHER).await;
                }
                () = self.stopping.cancelled() => return,
            }
            if self.bus.is_connected() {
                self.show_up().await;
            }
        }
    }

    pub(super) async fn say_goodbye(&self) {
        self.say(&Beat::Gone(self.bus.node().clone())).await;
        self.bus.flush(Duration::from_secs(1)).await;
    }

    pub(super) async fn show_up(&self) {
        let me = (self.describe)();
        lock(&self.me).clone_from(&me);
        self.say(&Beat::Here(me)).await;
    }

    /// Has all nodes that hear it log by a filter; this one is among them.
    pub(super) async fn filter_logs(&self, filter: Option<&str>) -> Result<(), WorkerError> {
        if !self.is_up() {
            return Err(bus_unavailable());
        }
        let subject = self.bus.subjects().beat(self.bus.node());
        let said = self.bus.send(subject, &Beat::Log(filter.map(str::to_owned)), &[]).await;
        said.map_err(|error| {
            tracing::warn!(error.cause = %error, "other nodes were not told of a log filter");
            bus_unavailable()
        })
    }

    async fn say(&self, beat: &Beat) {
        let subject = self.bus.subjects().beat(self.bus.node());
        if let Err(error) = self.bus.send(subject, beat, &[]).await {
            tracing::debug!(error.cause = %error, "a beat was not sent");
        }
    }
}
