//! How requests are recorded: a change before it is made and when it was answered, and what was refused.
//!
//! Nothing that changes what is stored runs without [`Recorded`], which only [`Caller::record`] gives, and that waits
//! until the line is on the disk ([`App::commit`], [`App::order`]).

use std::sync::{Arc, Mutex, PoisonError};

use axum::response::Response;
use http::StatusCode;
use mcp_shared::{
    audit::{Action, Audit, AuditCalls, Entry, Event, Object, Recorded, Unavailable},
    error::{ErrorCode, WorkerError},
    ids::{RequestId, UserId},
    principal::{Credential, Principal},
    worker_api::{CallContext, ToolCall},
};

use crate::{app::App, caller::Caller, problem::Problem};

/// The lines that a request left, and that its answer ends.
#[derive(Clone, Default)]
pub struct Trail(Arc<Mutex<Vec<Recorded>>>);

impl Trail {
    fn add(&self, recorded: Recorded) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(recorded);
    }

    /// The request came to this.
    pub fn end(&self, status: StatusCode, code: Option<ErrorCode>) {
        let lines = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for line in lines {
            line.answered(status.as_u16(), code);
        }
    }
}

impl Caller {
    /// Records that a change is let in, before it is made.
    pub async fn record(&self, app: &App, action: Action, object: Object) -> Result<Recorded, Problem> {
        self.record_as(app, action, object, None).await
    }

    /// The same, where the change is made for a user.
    pub async fn record_for(
        &self,
        app: &App,
        action: Action,
        object: Object,
        user: &UserId,
    ) -> Result<Recorded, Problem> {
        self.record_as(app, action, object, Some(user)).await
    }

    async fn record_as(
        &self,
        app: &App,
        action: Action,
        object: Object,
        user: Option<&UserId>,
    ) -> Result<Recorded, Problem> {
        let entry = Entry::new(Event::Allowed, action, object).by(&self.credential, &self.user);
        let entry = entry.in_request(&self.request);
        let entry = match user {
            Some(user) => entry.on_behalf_of(user),
            None => entry,
        };
        let recorded = app.audit.begin(entry).await.map_err(WorkerError::from)?;
        self.trail.add(recorded.share());
        Ok(recorded)
    }

    /// Records a call, where calls are recorded. The path of calls does not wait for it.
    pub fn record_call(&self, app: &App, context: &CallContext, call: &ToolCall) {
        if app.audit.calls() == AuditCalls::All {
            let object = Object::server(&call.server).with_tools([&call.tool]);
            let entry = Entry::new(Event::Allowed, Action::ToolCall, object).by(&self.credential, &self.user);
            app.audit.note(entry.in_request(&self.request).on_behalf_of(&context.user));
        }
    }
}

/// Records what a command does, before it does it. Whose command line it is, the system knows better.
pub async fn record_command(audit: &Audit, action: Action, object: Object) -> Result<Recorded, Unavailable> {
    audit.begin(Entry::new(Event::Allowed, action, object).by_credential("command-line")).await
}

/// Records a request that was refused for want of a right.
pub fn note_denied(
    audit: &Audit,
    id: &RequestId,
    route: (&str, Option<&str>),
    call: bool,
    response: &Response,
) {
    let status = response.status();
    let code = response.extensions().get::<ErrorCode>().copied();
    let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    // That of a remote server is none of ours.
    if !refused || code == Some(ErrorCode::ReauthRequired) || call && audit.calls() == AuditCalls::None {
        return;
    }
    let action = if call { Action::ToolCall } else { Action::Request };
    let (method, pattern) = route;
    let entry = Entry::new(Event::Denied, action, Object::route(method, pattern.unwrap_or("-")));
    let principal = response.extensions().get::<Arc<Principal>>();
    let entry = match principal.filter(|principal| principal.credential != Credential::Nobody) {
        Some(principal) => entry.by(&principal.credential, &principal.user),
        None => entry,
    };
    audit.deny(entry.in_request(id).answered(status.as_u16(), code));
}
