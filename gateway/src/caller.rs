//! Who sent a request, as handlers see it.

use std::{ops::Deref, sync::Arc};

use axum::extract::FromRequestParts;
use http::request::Parts;
use mcp_shared::{
    error::WorkerError,
    ids::{RequestId, ServerName, UserId},
    principal::{Principal, Scope},
};

use crate::{
    audit::Trail,
    body::{Field, Fields},
    login::Parameters,
    problem::Problem,
    routes::server_view::Viewer,
    traced::Traced,
};

/// Who sent a request. The route's own rule, which the table of routes has, was checked before.
#[derive(Clone)]
pub struct Caller {
    principal: Arc<Principal>,
    /// The request.
    pub request: RequestId,
    /// What it leaves in the audit log.
    pub trail: Trail,
    /// What is known of it, if it is traced.
    pub traced: Option<Traced>,
}

impl Deref for Caller {
    type Target = Principal;

    fn deref(&self) -> &Principal {
        &self.principal
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let found = (parts.extensions.get::<Arc<Principal>>(), parts.extensions.get::<RequestId>());
        let trail = parts.extensions.get::<Trail>().cloned().unwrap_or_default();
        let traced = parts.extensions.get::<Traced>().cloned();
        let (Some(principal), Some(request)) = found else {
            return Err(WorkerError::internal("a request came past the guard").into());
        };
        Ok(Self { principal: Arc::clone(principal), request: request.clone(), trail, traced })
    }
}

impl Caller {
    /// The user that a body names, if the caller may act for that user, or else the caller's own.
    pub fn user(&self, fields: &Fields<'_>) -> Result<UserId, Problem> {
        let named = match fields.text("username")? {
            Field::Value(name) => Some(UserId::parse(&name)?),
            Field::Absent | Field::Null => None,
        };
        Ok(self.on_behalf_of(named)?)
    }

    /// The same of a parameter of the address.
    pub fn user_of(&self, parameters: &Parameters, name: &str) -> Result<UserId, Problem> {
        let named = parameters.get(name).map(UserId::parse).transpose()?;
        Ok(self.on_behalf_of(named)?)
    }

    /// What of a server's record may be shown.
    pub fn viewer(&self) -> Viewer {
        Viewer { admin: self.may(Scope::Admin) }
    }

    /// `forbidden`, unless a server is within the credential's reach. What is out of reach is not said to
    /// be there, nor not to be there.
    pub fn at(&self, server: &ServerName) -> Result<(), Problem> {
        Ok(self.reaches(server)?)
    }
}
