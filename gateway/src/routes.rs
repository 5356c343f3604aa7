//! The handlers, one file per noun. [`crate::router`] lists the routes.

pub mod api_keys;
pub mod auth;
pub mod fleet;
pub mod google;
pub mod health;
pub mod jobs;
pub mod keys;
pub mod log;
pub mod metrics;
pub mod oauth;
pub mod package_input;
pub mod package_view;
pub mod packages;
pub mod remote_input;
pub mod secrets;
pub mod server_input;
pub mod server_view;
pub mod servers;
pub mod tools;
