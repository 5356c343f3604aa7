//! Who is asking, and what that credential allows.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    error::{ErrorCode, WorkerError, shorten},
    ids::{ServerName, ToolName, UserId},
};

macro_rules! scopes {
    ($($variant:ident = $text:literal, $meaning:literal;)*) => {
        /// What a credential may be good for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Scope {
            $(#[doc = $meaning] $variant,)*
        }

        impl Scope {
            /// All of them, in the order of the documentation.
            pub const ALL: &'static [Scope] = &[$(Scope::$variant,)*];

            /// The scope as it is written.
            pub fn as_str(self) -> &'static str {
                match self { $(Scope::$variant => $text,)* }
            }

            /// What it allows, as a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Scope::$variant => $meaning,)* }
            }
        }
    };
}

scopes! {
    Call = "call", "See servers and their tools, and call tools.";
    Secrets = "secrets", "Set and delete one's own secrets and logins.";
    Admin = "admin", "Register, change and remove servers and packages; manage keys; drain workers.";
    Impersonate = "impersonate", "Name another user than one's own in `username`: for backends that are trusted.";
    Metrics = "metrics", "Read `/metrics` and `/fleet`.";
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        Self::ALL.iter().copied().find(|scope| scope.as_str() == text).ok_or(UnknownScope)
    }
}

/// A text that is no scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the scopes are: call, secrets, admin, impersonate, metrics")]
pub struct UnknownScope;

/// A set of scopes.
pub type Scopes = BTreeSet<Scope>;

/// Which servers and tools a credential reaches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reach {
    /// The servers; `None`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub servers: Option<BTreeSet<ServerName>>,
    /// The tools of all these servers; `None`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<BTreeSet<ToolName>>,
}

impl Reach {
    /// Whether this server is within it.
    pub fn has_server(&self, server: &ServerName) -> bool {
        self.servers.as_ref().is_none_or(|servers| servers.contains(server))
    }

    /// Whether a tool of that name is within it.
    pub fn has_tool(&self, tool: &str) -> bool {
        self.tools.as_ref().is_none_or(|tools| tools.contains(tool))
    }
}

/// How somebody showed who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Nobody is asked.
    Nobody,
    /// An API key, by its id.
    ApiKey {
        /// Not secret.
        id: String,
    },
    /// A login link, which whoever may act for the user was given.
    LoginLink,
    /// A token of an OIDC issuer.
    Token {
        /// The claim `sub`.
        subject: String,
    },
}

impl fmt::Display for Credential {
    /// As it stands in the audit log: never what would let somebody in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Credential::Nobody => f.write_str("none"),
            Credential::ApiKey { id } => write!(f, "key:{id}"),
            Credential::LoginLink => f.write_str("login-link"),
            Credential::Token { subject } => write!(f, "token:{}", shorten(subject, 128)),
        }
    }
}

/// Who is asking. Everything that concerns a user takes the user from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The user that the credential is of.
    pub user: UserId,
    /// How that is known.
    pub credential: Credential,
    /// What it is good for.
    pub scopes: Scopes,
    /// Where.
    pub reach: Reach,
}

impl Principal {
    /// Where nobody is asked, everybody may do everything, as the user that the request names.
    pub fn anybody() -> Self {
        Self {
            user: UserId::default(),
            credential: Credential::Nobody,
            scopes: Scope::ALL.iter().copied().collect(),
            reach: Reach::default(),
        }
    }

    /// Somebody without a credential, where others need one.
    pub fn stranger() -> Self {
        Self { scopes: Scopes::new(), ..Self::anybody() }
    }

    /// Whether it has a scope.
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// `forbidden`, unless it has a scope.
    pub fn require(&self, scope: Scope) -> Result<(), WorkerError> {
        if self.may(scope) {
            return Ok(());
        }
        let text = format!("This credential lacks the scope {scope}");
        Err(WorkerError::new(ErrorCode::Forbidden, text).with("scope", scope.as_str()))
    }

    /// The user that a request is for: the one that it names, if that is allowed, or else the credential's.
    pub fn on_behalf_of(&self, named: Option<UserId>) -> Result<UserId, WorkerError> {
        match named {
            None => Ok(self.user.clone()),
            Some(named) if named == self.user || self.may(Scope::Impersonate) => Ok(named),
            Some(_) => Err(WorkerError::new(
                ErrorCode::ForbiddenUser,
                "username is not the user of this credential, which may not act for others",
            )),
        }
    }

    /// `forbidden`, unless it reaches a server.
    pub fn reaches(&self, server: &ServerName) -> Result<(), WorkerError> {
        if self.reach.has_server(server) {
            return Ok(());
        }
        let text = "This credential may not use that server";
        Err(WorkerError::new(ErrorCode::Forbidden, text).with("serverName", shorten(server.as_str(), 64)))
    }

    /// `forbidden`, unless it may call a tool of a server.
    pub fn may_call(&self, server: &ServerName, tool: &ToolName) -> Result<(), WorkerError> {
        self.reaches(server)?;
        if self.reach.has_tool(tool.as_str()) {
            return Ok(());
        }
        let text = "This credential may not call that tool";
        Err(WorkerError::new(ErrorCode::Forbidden, text).with("serverName", shorten(server.as_str(), 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    fn principal(scopes: &[Scope]) -> Principal {
        Principal {
            user: user("alice"),
            credential: Credential::ApiKey { id: "a1".to_owned() },
            scopes: scopes.iter().copied().collect(),
            reach: Reach::default(),
        }
    }

    #[test]
    fn the_user_is_who_the_credential_says() {
        let alice = principal(&[Scope::Call]);
        assert_eq!(alice.on_behalf_of(None).unwrap(), user("alice"));
        assert_eq!(alice.on_behalf_of(Some(user("alice"))).unwrap(), user("alice"));
        for other in ["bob", "Alice", "default"] {
            let refused = alice.on_behalf_of(Some(user(other))).unwrap_err();
            assert_eq!(refused.code, ErrorCode::ForbiddenUser, "{other}");
        }
        let backend = principal(&[Scope::Impersonate]);
        assert_eq!(backend.on_behalf_of(Some(user("bob"))).unwrap(), user("bob"));
        assert_eq!(backend.on_behalf_of(None).unwrap(), user("alice"));
        assert_eq!(Principal::anybody().on_behalf_of(Some(user("bob"))).unwrap(), user("bob"));
    }

    #[test]
    fn scopes_do_not_contain_each_other() {
        for have in Scope::ALL {
            for want in Scope::ALL {
                assert_eq!(principal(&[*have]).require(*want).is_ok(), have == want, "{have} {want}");
            }
        }
        assert_eq!("admin".parse(), Ok(Scope::Admin));
        assert_eq!("Admin".parse::<Scope>(), Err(UnknownScope));
    }

    #[test]
    fn reach_is_all_or_what_is_listed() {
        let (github, other) = ["github", "other"].map(|name| ServerName::parse_new(name).unwrap()).into();
        let (read, write) = ["read", "write"].map(|name| ToolName::parse(name).unwrap()).into();
        let mut alice = principal(&[Scope::Call]);
        assert!(alice.may_call(&other, &write).is_ok());
        alice.reach.servers = Some([github.clone()].into());
        assert!(alice.may_call(&github, &write).is_ok());
        assert_eq!(alice.may_call(&other, &read).unwrap_err().code, ErrorCode::Forbidden);
        alice.reach.tools = Some([read.clone()].into());
        assert!(alice.may_call(&github, &read).is_ok());
        assert_eq!(alice.may_call(&github, &write).unwrap_err().code, ErrorCode::Forbidden);
        alice.reach.servers = Some(BTreeSet::new());
        assert!(alice.reaches(&github).is_err());
    }
}
