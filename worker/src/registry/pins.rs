//! Tools that are not what they were: noticed, said, and remembered.

use std::time::Duration;

use mcp_shared::{
    audit::{self, Action, Event, Object},
    ids::UserId,
    json::RawJson,
    listing::{ToolPins, fingerprints},
    metrics,
    store::StoreError,
    timestamp::Timestamp,
    vault::VaultError,
};
use tokio::time::Instant;

use super::{Entry, lock};
use crate::{group::current, host::Host};

/// How often the pins are written again when another worker changes them at the same time.
const ATTEMPTS: usize = 5;
/// How often it is said of one server that its tools changed. It is remembered each time.
const SAID_AGAIN: Duration = Duration::from_secs(10);

impl Entry {
    /// Holds a listing against what the server listed before. `user`: whose it is, where every user has one.
    pub(super) async fn pin(&self, user: Option<&UserId>, tools: &RawJson, host: &Host) {
        // One after the other, as they came.
        let _pinning = self.pinning.lock().await;
        match self.compare(user, tools, host).await {
            Ok(changed) if changed.is_empty() => {}
            Ok(changed) => self.say_changed(user, &changed, host),
            Err(error) => {
                tracing::warn!(server = %self.name, error.cause = %error, "listed tools were not compared");
            }
        }
    }

    /// The tools that are otherwise than at the last look, if nothing of the record explains it.
    async fn compare(
        &self,
        user: Option<&UserId>,
        tools: &RawJson,
        host: &Host,
    ) -> Result<Vec<String>, VaultError> {
        let listed = fingerprints(tools);
        for _ in 0..ATTEMPTS {
            let record = current(&self.record);
            let stored = host.vault.tool_pins(&self.name, user).await?;
            let (mut pins, expected) = match stored {
                Some(stored) => (stored.value, Some(stored.revision)),
                None => (ToolPins::first(&record, user, listed.clone()), None),
            };
            let before = pins.clone();
            let changed = if pins.are_of(&record) {
                pins.take(&listed, Timestamp::now())
            } else {
                pins = ToolPins::first(&record, user, listed.clone());
                Vec::new()
            };
            if expected.is_some() && pins == before {
                return Ok(changed);
            }
            match host.vault.put_tool_pins(&pins, expected).await {
                // Another worker was faster, and may have said it already; or an administrator removed the server.
                Err(VaultError::Store(
                    StoreError::Conflict | StoreError::AlreadyExists { .. } | StoreError::NotFound,
                )) => {}
                written => return written.map(|_| changed),
            }
        }
        Ok(Vec::new())
    }

    fn say_changed(&self, user: Option<&UserId>, changed: &[String], host: &Host) {
        metrics::count_tool_change();
        {
            let mut said = lock(&self.said_changed);
            if said.is_some_and(|said: Instant| said.elapsed() < SAID_AGAIN) {
                return;
            }
            *said = Some(Instant::now());
        }
        tracing::warn!(server = %self.name, tools = changed.len(), "a server says something else of its tools than before");
        self.log.note(&format!("its tools are not what they were: {} changed", changed.len()));
        let Some(audit) = &host.audit else { return };
        let object = Object::server(&self.name).with_tools(changed);
        let entry = audit::Entry::new(Event::Noted, Action::ToolsChanged, object);
        audit.note(match user {
            Some(user) => entry.on_behalf_of(user),
            None => entry,
        });
    }
}
