//! Servers on standard input and output that act for their users at Google (`MCP_AUTH_TYPE`): the users'
//! tokens and the application's credentials go into each call as arguments that nobody else sees.

use crate::{
    ids::ToolName,
    server::{ServerRecord, Transport},
};

/// The variable by which a server declares how its users log in.
pub const TYPE_VARIABLE: &str = "MCP_AUTH_TYPE";
/// The only way that there is.
pub const TYPE: &str = "OAUTH2_GOOGLE";
/// The variable that names the argument for the user's tokens.
pub const TOKENS_VARIABLE: &str = "MCP_AUTH_TOKENS_PARAM";
/// The variable that names the argument for the application's credentials.
pub const CREDENTIALS_VARIABLE: &str = "MCP_AUTH_CREDENTIALS_PARAM";
/// The argument for the user's tokens where nobody names another one; mcp-api knows no other.
const TOKENS_ARGUMENT: &str = "userCredentials";
/// The argument for the application's credentials where nobody names another one; mcp-api knows no other.
const CREDENTIALS_ARGUMENT: &str = "gauthFileContent";
/// The user's secret that has the tokens: the JSON object that the server gave.
pub const TOKENS_SECRET: &str = "GOOGLE_OAUTH_TOKENS";
/// The key under which mcp-api keeps a user's tokens: one for all servers, and none of them in its name. They
/// are used until the user logs in again.
pub const TOKENS_OF_MCP_API: &str = "google_tokens";
/// Tools whose names begin like this are part of a login: whoever calls them has no tokens yet.
const LOGIN_TOOLS: &str = "auth_";
/// The server's tool that says where a login begins.
pub const URL_TOOL: &str = "auth_get_authorization_url";
/// The server's tool that gives tokens for the code of a login.
pub const EXCHANGE_TOOL: &str = "auth_exchange_code";

/// Under which names a server takes what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoogleFlow {
    /// The argument for the user's tokens.
    pub tokens: String,
    /// The argument for the application's credentials.
    pub credentials: String,
}

impl GoogleFlow {
    /// What a record says about it; `None`: its users do not log in to Google.
    pub fn of(record: &ServerRecord) -> Option<Self> {
        let Transport::Stdio { env, .. } = &record.transport else { return None };
        if env.0.get(TYPE_VARIABLE).map(String::as_str) != Some(TYPE) {
            return None;
        }
        let named = |variable: &str, default: &str| {
            env.0.get(variable).filter(|name| !name.is_empty()).map_or(default, String::as_str).to_owned()
        };
        Some(Self {
            tokens: named(TOKENS_VARIABLE, TOKENS_ARGUMENT),
            credentials: named(CREDENTIALS_VARIABLE, CREDENTIALS_ARGUMENT),
        })
    }

    /// Whether a tool acts for its user, which it needs tokens for.
    pub fn needs_tokens(tool: &ToolName) -> bool {
        !tool.as_str().starts_with(LOGIN_TOOLS)
    }
}
