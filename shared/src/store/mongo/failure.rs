//! What the driver's errors mean for callers. Nothing of a document gets into an error.

use mongodb::error::{Error, ErrorKind, WriteFailure};

use crate::{error::shorten, store::StoreError};

/// A unique index refused a document.
const DUPLICATE_KEY: i32 = 11000;
/// The disk is full, or writes of users are blocked: both mean that only reads go on.
const NO_ROOM: &[i32] = &[14031, 12501, 371];
/// The login is not valid any more, or has not the rights.
const FORBIDDEN: &[i32] = &[13, 18, 8000];
/// A document is larger than a document may be.
const TOO_LARGE: &[i32] = &[10334, 17280, 17419, 17420];

/// Why an operation failed: by our own judgement, or by the driver's.
#[derive(Debug)]
pub(super) enum Failure {
    Store(StoreError),
    Driver(Error),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Driver(error)
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error,
            Failure::Driver(error) => classify(&error),
        }
    }
}

/// Whether a unique index refused the write.
pub(super) fn is_duplicate(error: &Error) -> bool {
    code(error) == Some(DUPLICATE_KEY)
}

/// Whether an index was refused because the same one exists under another name, or one of its name
/// with other fields.
pub(super) fn is_other_name(error: &Error) -> bool {
    matches!(code(error), Some(85 | 86))
}

fn code(error: &Error) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(error) => Some(error.code),
        ErrorKind::Write(WriteFailure::WriteError(error)) => Some(error.code),
        ErrorKind::Write(WriteFailure::WriteConcernError(error)) => Some(error.code),
        _ => None,
    }
}

fn classify(error: &Error) -> StoreError {
    let cause = describe(error);
    let code = code(error);
    if code.is_some_and(|code| NO_ROOM.contains(&code)) || cause.contains("No space left on device") {
        return StoreError::Full;
    }
    match error.kind.as_ref() {
        _ if code.is_some_and(|code| TOO_LARGE.contains(&code)) => {
            StoreError::Corrupt { what: "a document would be larger than MongoDB allows".to_owned() }
        }
        // It answers and does not let this node do what it has to: an operator has to see to it.
        _ if code.is_some_and(|code| FORBIDDEN.contains(&code)) => {
            tracing::error!(error.cause = %cause, "MongoDB refuses this node");
            StoreError::Unavailable { cause }
        }
        // The driver refused a document, or did not understand one. The database is not at fault.
        ErrorKind::InvalidArgument { .. } | ErrorKind::Bson(_) => StoreError::Corrupt { what: cause },
        _ => StoreError::Unavailable { cause },
    }
}

/// The error for the log. The details of write errors are left out: they may quote the document.
pub(super) fn describe(error: &Error) -> String {
    let text = match error.kind.as_ref() {
        ErrorKind::Command(error) => format!("error {} {}: {}", error.code, error.code_name, error.message),
        ErrorKind::Write(WriteFailure::WriteError(error)) if error.code == DUPLICATE_KEY => {
            format!("error {DUPLICATE_KEY}: duplicate key")
        }
        ErrorKind::Write(WriteFailure::WriteError(error)) => {
            format!("write error {}: {}", error.code, error.message)
        }
        ErrorKind::Write(WriteFailure::WriteConcernError(error)) => {
            format!("write concern error {} {}: {}", error.code, error.code_name, error.message)
        }
        // It may quote what it did not understand.
        ErrorKind::Bson(_) => "a document cannot be read or written".to_owned(),
        ErrorKind::Io(error) => format!("connection: {error}"),
        kind => kind.to_string(),
    };
    shorten(&text, 300)
}

pub(super) fn unavailable(cause: &str) -> StoreError {
    StoreError::Unavailable { cause: cause.to_owned() }
}
