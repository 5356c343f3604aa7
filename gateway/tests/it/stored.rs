//! What is stored, read past the programs: the file of one machine, or the database of a cluster.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use rusqlite::{Connection, OpenFlags, types::ValueRef};

use crate::deployment::Data;

/// Tables and collections that change without anybody's asking.
pub const RESTLESS: [&str; 3] = ["leases", "probe", "idem"];

/// Every table or collection with all of its rows, as text.
pub async fn everything(data: &Data) -> BTreeMap<String, Vec<String>> {
    if crate::CLUSTER { collections(data).await } else { tables(data) }
}

/// The same without what changes by itself.
pub async fn settled(data: &Data) -> BTreeMap<String, Vec<String>> {
    let mut all = everything(data).await;
    all.retain(|name, _| !RESTLESS.contains(&name.as_str()));
    all
}

async fn collections(data: &Data) -> BTreeMap<String, Vec<String>> {
    let client = mongodb::Client::with_uri_str(data.mongo()).await.unwrap();
    let database = client.database(data.name());
    let mut all = BTreeMap::new();
    for name in database.list_collection_names().await.unwrap() {
        let found = database.collection::<Document>(&name).find(doc! {}).await.unwrap();
        let documents: Vec<Document> = found.try_collect().await.unwrap();
        let mut rows: Vec<_> = documents.iter().map(ToString::to_string).collect();
        rows.sort();
        all.insert(name, rows);
    }
    all
}

fn tables(data: &Data) -> BTreeMap<String, Vec<String>> {
    let file = data.path().join("data/mcp-api.db");
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    let mut names = connection.prepare(names).unwrap();
    let names: Vec<String> =
        names.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in names {
        let mut statement = connection.prepare(&format!("SELECT * FROM {name}")).unwrap();
        let columns: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let mut rows = statement.query([]).unwrap();
        all.entry(name.clone()).or_default();
        while let Some(row) = rows.next().unwrap() {
            let cells: Vec<_> = (0..columns.len()).map(|at| text(row.get_ref(at).unwrap())).collect();
            // Documents of many kinds share one table.
            let table = match columns.iter().position(|column| column == "collection") {
                Some(at) => cells[at].clone(),
                None => name.clone(),
            };
            all.entry(table).or_default().push(cells.join("|"));
        }
    }
    all.values_mut().for_each(|rows| rows.sort());
    all
}

fn text(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "null".to_owned(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    }
}
