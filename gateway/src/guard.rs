//! What stands between the edge and the handlers: who is asking, and may they come here at all. What a route
//! needs stands in the table of routes; whatever is not in it needs a credential.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{MatchedPath, Request},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{Method, request::Parts};
use mcp_shared::principal::{Principal, Scope};

use crate::{auth::Authenticator, problem::Problem};

/// Who may come to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody: probes, and browsers on their way back from a login.
    Public,
    /// Whoever has a login link, or a credential with the scope `secrets`.
    Login,
    /// Whoever has a credential with this scope.
    Needs(Scope),
}

impl Access {
    /// In one word, for tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Access::Public => "public",
            Access::Login => "login link, or secrets",
            Access::Needs(scope) => scope.as_str(),
        }
    }
}

/// What it goes by.
pub struct Guard {
    routes: HashMap<&'static str, Vec<(Method, Access)>>,
    authenticator: Arc<Authenticator>,
}

impl Guard {
    /// A guard of these routes.
    pub fn new(
        routes: impl IntoIterator<Item = (&'static str, Method, Access)>,
        authenticator: Arc<Authenticator>,
    ) -> Self {
        let mut of_path: HashMap<_, Vec<_>> = HashMap::new();
        for (path, method, access) in routes {
            of_path.entry(path).or_default().push((method, access));
        }
        Self { routes: of_path, authenticator }
    }

    /// Whether routes that are not public need a credential.
    pub fn asks(&self) -> bool {
        self.authenticator.asks()
    }

    async fn admit(&self, head: &Parts) -> Result<Principal, Problem> {
        let authenticator = &self.authenticator;
        if !authenticator.asks() {
            return Ok(Principal::anybody());
        }
        let method = if head.method == Method::HEAD { &Method::GET } else { &head.method };
        let route = head.extensions.get::<MatchedPath>().and_then(|path| self.routes.get(path.as_str()));
        let access =
            route.and_then(|route| route.iter().find(|(of, _)| of == method)).map(|(_, access)| *access);
        match access {
            Some(Access::Public) => Ok(Principal::stranger()),
            Some(Access::Login) => match authenticator.ticket(head.uri.query())? {
                Some(holder) => Ok(holder),
                None => allowed(authenticator.authenticate(&head.headers).await?, Scope::Secrets),
            },
            Some(Access::Needs(scope)) => allowed(authenticator.authenticate(&head.headers).await?, scope),
            // There is no such route or method, which is nobody's business who may not come here anyway.
            None => authenticator.authenticate(&head.headers).await,
        }
    }
}

fn allowed(principal: Principal, scope: Scope) -> Result<Principal, Problem> {
    principal.require(scope)?;
    Ok(principal)
}

impl Guard {
    /// Lets a request through to its handler, or says why not.
    pub async fn pass(&self, request: Request, next: Next) -> Response {
        // The body cannot be shared with whoever waits.
        let (mut head, body) = request.into_parts();
        match self.admit(&head).await {
            Ok(principal) => {
                let principal = Arc::new(principal);
                head.extensions.insert(Arc::clone(&principal));
                let mut response = next.run(Request::from_parts(head, body)).await;
                response.extensions_mut().insert(principal);
                response
            }
            Err(problem) => problem.into_response(),
        }
    }
}
