//! Other texts for the same values: secrets page by page, and writes that leave revisions as they are.

use rusqlite::{Connection, Row, params};

use super::{executor::Failure, sql::server_exists};
use crate::{
    ids::ServerName,
    store::{Revision, SecretRow, StoreError},
};

/// A page of all secrets, in the order of users and keys.
pub(super) fn secrets_after(
    connection: &Connection,
    after: Option<(String, String)>,
    limit: usize,
) -> Result<Vec<SecretRow>, Failure> {
    let (condition, (user, key)) = match after {
        Some(after) => ("(username, key) > (?1, ?2)", after),
        None => ("username >= ?1 AND key >= ?2", <(String, String)>::default()),
    };
    let sql =
        format!("SELECT username, key, value FROM secrets WHERE {condition} ORDER BY username, key LIMIT ?3");
    let mut statement = connection.prepare(&sql)?;
    // Texts are taken as bytes: one that is not UTF-8 must not fail the whole page.
    let text = |row: &Row<'_>, at: usize| -> rusqlite::Result<String> {
        Ok(String::from_utf8_lossy(row.get_ref(at)?.as_bytes()?).into_owned())
    };
    let rows = statement.query_map(params![user, key, i64::try_from(limit).unwrap_or(i64::MAX)], |row| {
        Ok(SecretRow { username: text(row, 0)?, key: text(row, 1)?, value: text(row, 2)? })
    })?;
    Ok(rows.collect::<Result<Vec<_>, _>>()?)
}

/// Writes the value of a secret that is still what it was; says whether it was.
pub(super) fn secret(connection: &Connection, row: SecretRow, value: String) -> Result<bool, Failure> {
    let written = connection.execute(
        "UPDATE secrets SET value = ?4 WHERE username = ?1 AND key = ?2 AND value = ?3",
        [row.username, row.key, row.value, value],
    )?;
    Ok(written > 0)
}

/// Writes the document of a server that still has the revision `expected`.
pub(super) fn server(
    connection: &Connection,
    name: &ServerName,
    document: &str,
    expected: Revision,
) -> Result<(), Failure> {
    let written = connection.execute(
        "UPDATE servers SET document = ?3 WHERE name = ?1 AND revision = ?2",
        params![name.as_str(), expected.0, document],
    )?;
    match written {
        0 if server_exists(connection, name)? => Err(StoreError::Conflict.into()),
        0 => Err(StoreError::NotFound.into()),
        _ => Ok(()),
    }
}
