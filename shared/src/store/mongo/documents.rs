//! Servers as documents: mcp-api's shape, with three fields of ours beside it.
//!
//! What mcp-api wrote is kept as it is: a field whose value did not change keeps its type, also one
//! that JSON does not have, and fields that nobody here knows stay.

use std::fmt::Write;

use mongodb::bson::{Bson, DateTime, Document, RawDocumentBuf, doc, oid::ObjectId};
use serde_json::{Map, Number, Value};
use sha2::{Digest, Sha256};

use crate::{
    server::ServerRecord,
    store::{Revision, SealedServer, StoreError},
    timestamp::Timestamp,
};

/// The number of the document's version. Documents that mcp-api wrote have none.
pub(super) const REVISION: &str = "_revision";
/// A number that no earlier or later server of the same name has.
pub(super) const INCARNATION: &str = "_incarnation";
/// The name under which other spellings of it are refused.
pub(super) const CASE_KEY: &str = "_caseKey";

const OWN: &[&str] = &[REVISION, INCARNATION, CASE_KEY];
const DATES: &[&str] = &["createdAt", "updatedAt"];
/// JavaScript has no integers, so these may be stored as `180000.0`.
const WHOLE_NUMBERS: &[&str] = &["startupTimeout", "toolTimeout", "idleTimeout", "concurrency", "instances"];

/// A server's document as it stands in the database.
#[derive(Debug)]
pub(super) struct StoredServer {
    document: Document,
    pub(super) revision: Revision,
}

impl StoredServer {
    /// Takes a document apart. The error says which document it is.
    pub(super) fn read(raw: &RawDocumentBuf) -> Result<Self, String> {
        let document = Document::try_from(raw).map_err(|_| which(raw))?;
        let revision = revision(raw, &document).ok_or_else(|| which(raw))?;
        Ok(Self { document, revision })
    }

    /// The record that the document holds. The error says why it cannot be read.
    pub(super) fn record(&self) -> Result<SealedServer, serde_json::Error> {
        let mut map = Map::new();
        for (field, value) in self.document.iter().filter(|(field, _)| !OWN.contains(&field.as_str())) {
            let value = match whole(value) {
                Some(number) if WHOLE_NUMBERS.contains(&field.as_str()) => number.into(),
                _ => render(value),
            };
            map.insert(field.clone(), value);
        }
        let known = |map: &Map<String, Value>, field: &str| map.get(field).is_some_and(|v| !v.is_null());
        // The first versions of mcp-api kept no times; the id has one.
        if !known(&map, "createdAt") {
            let millis = match self.document.get("_id") {
                Some(Bson::ObjectId(id)) => id.timestamp().timestamp_millis(),
                _ => 0,
            };
            map.insert("createdAt".to_owned(), render(&DateTime::from_millis(millis).into()));
        }
        if !known(&map, "updatedAt") {
            let created = map.get("createdAt").cloned().unwrap_or_default();
            map.insert("updatedAt".to_owned(), created);
        }
        // A server of mcp-api ran once, and may not stand being run twice.
        if !self.document.contains_key(REVISION) && !known(&map, "scaling") {
            map.insert("scaling".to_owned(), "singleton".into());
        }
        ServerRecord::from_document(map).map(SealedServer)
    }

    /// The document for a changed record.
    pub(super) fn replaced_by(&self, server: &SealedServer, revision: i64) -> Result<Document, StoreError> {
        let record = record_map(&server.0)?;
        let mut document = changed(&self.document, &record, DATES);
        add_nulls(&self.document, &mut document);
        for field in [INCARNATION, CASE_KEY] {
            if let Some(value) = self.document.get(field) {
                document.insert(field, value.clone());
            }
        }
        document.insert(REVISION, revision);
        Ok(document)
    }

    /// A filter that fits the document while it is as it was read.
    pub(super) fn unchanged(&self) -> Document {
        unchanged(&self.document, self.revision)
    }
}

/// The number of a document's version; `None` if what stands there is no number.
pub(super) fn revision(raw: &RawDocumentBuf, document: &Document) -> Option<Revision> {
    match document.get(REVISION) {
        Some(value) => whole(value).map(Revision),
        // Whoever writes such a document changes no number in it, so its content is what a
        // compare-and-set can compare. Negative, so that it is none of ours.
        None => {
            let hash = Sha256::digest(raw.as_bytes());
            let number = hash.iter().take(6).fold(0, |number, byte| number << 8 | i64::from(*byte));
            Some(Revision(-1 - number))
        }
    }
}

/// A filter that fits a document while it is as it was read.
pub(super) fn unchanged(document: &Document, revision: Revision) -> Document {
    let mut filter = doc! { "_id": { "$eq": id(document) } };
    if document.contains_key(REVISION) {
        filter.insert(REVISION, doc! { "$eq": revision.0 });
        return filter;
    }
    filter.insert(REVISION, doc! { "$exists": false });
    let plain = |field: &str| field != "_id" && !field.starts_with('$') && !field.contains('.');
    for (field, value) in document.iter().filter(|(field, _)| plain(field)) {
        filter.insert(field, doc! { "$eq": value.clone() });
    }
    filter
}

fn id(document: &Document) -> Bson {
    document.get("_id").cloned().unwrap_or(Bson::Null)
}

/// A document with other fields under the same id. A field whose value did not change keeps its type.
pub(super) fn changed(old: &Document, fields: &Map<String, Value>, dates: &[&str]) -> Document {
    let mut document = doc! { "_id": id(old) };
    for (field, value) in fields {
        let new = match old.get(field) {
            Some(old) if render(old) == *value => old.clone(),
            _ => field_value(field, value, dates),
        };
        document.insert(field, new);
    }
    document
}

/// Adds what is `null` in the old document. Records do not have that; mcp-api writes it, and may expect it.
pub(super) fn add_nulls(old: &Document, document: &mut Document) {
    for (field, _) in old.iter().filter(|(_, value)| **value == Bson::Null) {
        document.entry(field.clone()).or_insert(Bson::Null);
    }
}

/// The document of a new server, with a first revision.
pub(super) fn new_document(server: &SealedServer, revision: i64) -> Result<Document, StoreError> {
    let record = record_map(&server.0)?;
    let mut document: Document =
        record.iter().map(|(field, value)| (field.clone(), field_value(field, value, DATES))).collect();
    document.insert(REVISION, revision);
    document.insert(INCARNATION, revision);
    document.insert(CASE_KEY, server.0.name.case_key());
    Ok(document)
}

/// What tells a server from earlier and later ones of its name: our number, or else the id.
pub(super) fn incarnation(document: &Document) -> Bson {
    document.get(INCARNATION).or_else(|| document.get("_id")).cloned().unwrap_or(Bson::Null)
}

/// Whether two values are equal, where numbers may have changed their type: JavaScript writes back what
/// it read as another one.
pub(super) fn same(a: &Bson, b: &Bson) -> bool {
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The number, if it is a whole one.
pub(super) fn whole(value: &Bson) -> Option<i64> {
    match value {
        Bson::Int32(number) => Some(i64::from(*number)),
        Bson::Int64(number) => Some(*number),
        // Up to 2^53 every whole number is exact.
        Bson::Double(number) if number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0 => {
            Some(*number as i64)
        }
        _ => None,
    }
}

/// Names a document that cannot be read, by what of it can.
fn which(raw: &RawDocumentBuf) -> String {
    match raw.get_str("name") {
        Ok(name) => format!("server {name}"),
        Err(_) => match raw.get_object_id("_id") {
            Ok(id) => format!("server with id {id}"),
            Err(_) => "a server without name and id".to_owned(),
        },
    }
}

fn record_map(record: &ServerRecord) -> Result<Map<String, Value>, StoreError> {
    let mut map = record
        .to_document()
        .map_err(|cause| StoreError::Corrupt { what: format!("server {}: {cause}", record.name) })?;
    map.retain(|field, _| !OWN.contains(&field.as_str()));
    Ok(map)
}

/// A field of a record, typed as mcp-api does it; `dates` are the fields that it has as dates.
pub(super) fn field_value(field: &str, value: &Value, dates: &[&str]) -> Bson {
    match value {
        Value::String(text) if field == "_id" => match ObjectId::parse_str(text) {
            Ok(id) => Bson::ObjectId(id),
            Err(_) => Bson::String(text.clone()),
        },
        Value::String(_) if dates.contains(&field) => {
            let stamp = serde_json::from_value::<Timestamp>(value.clone()).ok();
            let date = stamp.map(|stamp| Bson::DateTime(DateTime::from_millis(stamp.millis())));
            // A date has milliseconds and no time zone. What it would not give back stays a text.
            date.filter(|date| render(date) == *value).unwrap_or_else(|| plain(value))
        }
        _ => plain(value),
    }
}

/// JSON as it is. The notation in which JSON can name other types is not for what users send: an object
/// with a member `$date` is an object.
fn plain(value: &Value) -> Bson {
    match value {
        Value::Null => Bson::Null,
        Value::Bool(value) => Bson::Boolean(*value),
        Value::Number(number) => plain_number(number),
        Value::String(text) => Bson::String(text.clone()),
        Value::Array(values) => Bson::Array(values.iter().map(plain).collect()),
        Value::Object(map) => {
            Bson::Document(map.iter().map(|(field, value)| (field.clone(), plain(value))).collect())
        }
    }
}

fn plain_number(number: &Number) -> Bson {
    match number.as_i64() {
        Some(whole) => i32::try_from(whole).map_or(Bson::Int64(whole), Bson::Int32),
        None => Bson::Double(number.as_f64().unwrap_or(f64::MAX)),
    }
}

/// A value as JSON. What JSON does not have becomes text.
pub(super) fn render(value: &Bson) -> Value {
    match value {
        Bson::Null | Bson::Undefined => Value::Null,
        Bson::Boolean(value) => Value::Bool(*value),
        Bson::Int32(number) => (*number).into(),
        Bson::Int64(number) => (*number).into(),
        Bson::Double(number) => Number::from_f64(*number).map_or(Value::Null, Value::Number),
        Bson::String(text) => Value::String(text.clone()),
        Bson::ObjectId(id) => Value::String(id.to_hex()),
        Bson::Array(values) => Value::Array(values.iter().map(render).collect()),
        Bson::Document(document) => {
            Value::Object(document.iter().map(|(field, value)| (field.clone(), render(value))).collect())
        }
        Bson::DateTime(moment) => {
            let mut text = String::new();
            match write!(text, "{}", Timestamp::from_millis(moment.timestamp_millis())) {
                Ok(()) => Value::String(text),
                // Beyond the years that can be written.
                Err(_) => Value::String(value.to_string()),
            }
        }
        other => Value::String(other.to_string()),
    }
}
