//! Login links. A browser has no API key: whoever asks for a link on a user's behalf gets one that is good for
//! beginning that user's login to that server, for a while, and for nothing else.

use std::collections::BTreeSet;

use mcp_shared::{
    crypter::Place,
    error::{ErrorCode, WorkerError},
    ids::{ServerName, UserId},
    limits,
    principal::{Credential, Principal, Reach, Scope},
    timestamp::Timestamp,
    vault::Vault,
};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// The parameter that has it.
pub const PARAMETER: &str = "ticket";
const PLACE: Place<'static> = Place { collection: "", field: "login-link", ids: &[] };

#[derive(Serialize, Deserialize)]
struct Ticket {
    user: UserId,
    server: ServerName,
    until: Timestamp,
}

/// Makes links, and knows them again. Every gateway knows those of the others.
pub struct Tickets {
    vault: Vault,
}

impl Tickets {
    /// With the keys of a vault.
    pub fn new(vault: &Vault) -> Self {
        Self { vault: vault.clone() }
    }

    /// The value of the parameter.
    pub fn issue(&self, user: &UserId, server: &ServerName) -> Result<String, Problem> {
        let life = i64::try_from(limits::LOGIN_LINK.as_millis()).unwrap_or(i64::MAX);
        let until = Timestamp::from_millis(Timestamp::now().millis().saturating_add(life));
        let ticket = Ticket { user: user.clone(), server: server.clone(), until };
        let text = serde_json::to_string(&ticket).map_err(WorkerError::internal)?;
        Ok(self.vault.crypter().seal_bound(&PLACE, &text.into()).map_err(WorkerError::internal)?)
    }

    /// Who has the link; `None`: there is no ticket in the address. One that is not valid any more is an error, which
    /// says so to the person in front of the browser.
    pub fn holder(&self, query: Option<&str>) -> Result<Option<Principal>, Problem> {
        let mut found = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes())
            .filter(|(name, _)| name == PARAMETER)
            .map(|(_, value)| value);
        let Some(text) = found.next() else { return Ok(None) };
        let over = || {
            Problem::new(
                ErrorCode::Unauthorized,
                "The login link is not valid, or not any more; ask for a new one",
            )
        };
        let opened = self.vault.crypter().open_bound(&PLACE, &text).map_err(|_| over())?;
        let ticket: Ticket = serde_json::from_str(opened.expose_secret()).map_err(|_| over())?;
        if ticket.until <= Timestamp::now() || found.next().is_some() {
            return Err(over());
        }
        Ok(Some(Principal {
            user: ticket.user,
            credential: Credential::LoginLink,
            scopes: [Scope::Secrets].into(),
            reach: Reach { servers: Some(BTreeSet::from([ticket.server])), tools: None },
        }))
    }
}
