//! What a MongoDB says of itself, for those who look after it.

use std::time::{Duration, Instant};

use mongodb::bson::{Bson, Document, doc};

use super::{MongoStore, failure::Failure};
use crate::{
    store::{Collection, Fact, StoreError},
    timestamp::Timestamp,
};

/// What a user has to be allowed to do in the database.
const ACTIONS: [&str; 5] = ["find", "insert", "update", "remove", "createIndex"];
/// How often the way there and back is measured; the shortest counts.
const TRIPS: usize = 3;

/// A database server as it was found.
#[derive(Debug, Clone)]
pub struct Examined {
    /// Its version.
    pub version: String,
    /// The newest version of the protocol that it speaks.
    pub wire: i32,
    /// Whether it stands alone or is a member of something, for people.
    pub topology: String,
    /// How long a question and its answer take.
    pub round_trip: Duration,
    /// How far its clock is from ours, where it says what time it is.
    pub skew: Option<Duration>,
    /// Who we are to it; `None`: it does not ask.
    pub user: Option<String>,
    /// What that user may not do and would have to; `None`: it does not say.
    pub missing: Option<Vec<&'static str>>,
}

impl MongoStore {
    /// Asks the server about itself. Nothing is written.
    pub async fn examine(&self) -> Result<Examined, StoreError> {
        self.run(self.database.examine()).await
    }
}

impl super::Database {
    async fn examine(&self) -> Result<Examined, Failure> {
        let mut round_trip = Duration::MAX;
        let mut skew = None;
        let mut hello = Document::new();
        for _ in 0..TRIPS {
            let (before, asked) = (Timestamp::now().millis(), Instant::now());
            hello = self.database.run_command(doc! { "hello": 1 }).await?;
            let took = asked.elapsed();
            if took < round_trip {
                round_trip = took;
                let half = i64::try_from(took.as_millis() / 2).unwrap_or_default();
                let theirs = hello.get_datetime("localTime").ok().map(|moment| moment.timestamp_millis());
                skew = theirs.map(|theirs| Duration::from_millis(theirs.abs_diff(before + half)));
            }
        }
        let build = self.database.run_command(doc! { "buildInfo": 1 }).await?;
        let topology = match (hello.get_str("setName"), hello.get_str("msg")) {
            (Ok(set), _) => format!("replica set {set}"),
            (_, Ok("isdbgrid")) => "sharded".to_owned(),
            _ => "a server alone".to_owned(),
        };
        // Not every server of the protocol knows it.
        let status = doc! { "connectionStatus": 1, "showPrivileges": true };
        let status = self.database.run_command(status).await.unwrap_or_default();
        let info = status.get_document("authInfo").cloned().unwrap_or_default();
        let users = info.get_array("authenticatedUsers").cloned().unwrap_or_default();
        let user = users.first().and_then(Bson::as_document).and_then(|user| user.get_str("user").ok());
        let privileges = info.get_array("authenticatedUserPrivileges").ok().filter(|all| !all.is_empty());
        Ok(Examined {
            version: build.get_str("version").unwrap_or("unknown").to_owned(),
            wire: hello.get_i32("maxWireVersion").unwrap_or_default(),
            topology,
            round_trip,
            skew,
            user: user.map(str::to_owned),
            missing: privileges.map(|all| missing(self.database.name(), &self.collections(), all)),
        })
    }

    /// The collections that this program writes.
    pub(super) fn collections(&self) -> Vec<&str> {
        let rows = [&self.servers, &self.secrets, &self.tools].map(mongodb::Collection::name);
        let documents = [&self.leases, &self.probe].map(mongodb::Collection::name);
        let facts = [Fact::AppState, Fact::KeyRing].map(Fact::collection);
        rows.into_iter().chain(documents).chain(facts).chain(Collection::ALL.map(Collection::name)).collect()
    }
}

/// What is not allowed in each of the collections of a database, by one privilege or another.
fn missing(database: &str, collections: &[&str], privileges: &[Bson]) -> Vec<&'static str> {
    let privileges: Vec<&Document> = privileges.iter().filter_map(Bson::as_document).collect();
    let concerns = |resource: &Document, collection: &str| {
        let named = |field: &str, name: &str| {
            resource.get_str(field).is_ok_and(|text| text.is_empty() || text == name)
        };
        resource.get_bool("anyResource").unwrap_or(false)
            || named("db", database) && named("collection", collection)
    };
    let permits = |privilege: &Document, action: &str| {
        let actions = privilege.get_array("actions").map(Vec::as_slice).unwrap_or_default();
        actions.iter().filter_map(Bson::as_str).any(|one| one == action || one == "anyAction")
    };
    let allowed = |collection: &str, action: &str| {
        privileges.iter().any(|privilege| {
            let here = privilege.get_document("resource").is_ok_and(|one| concerns(one, collection));
            here && permits(privilege, action)
        })
    };
    let everywhere = |action: &&str| collections.iter().all(|collection| allowed(collection, action));
    ACTIONS.into_iter().filter(|action| !everywhere(action)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn privilege(database: &str, collection: &str, actions: &[&str]) -> Bson {
        doc! { "resource": { "db": database, "collection": collection }, "actions": actions }.into()
    }

    #[test]
    fn roles_may_be_for_a_database_or_for_each_collection() {
        let ours = ["mcp", "secrets"];
        let missing = |privileges: &[Bson]| missing("db", &ours, privileges);
        assert_eq!(missing(&[privilege("db", "", &ACTIONS)]), [""; 0]);
        assert_eq!(missing(&[privilege("", "", &["anyAction"])]), [""; 0]);
        assert_eq!(
            missing(&[doc! { "resource": { "anyResource": true }, "actions": ["anyAction"] }.into()]),
            [""; 0]
        );
        let each = ours.map(|collection| privilege("db", collection, &ACTIONS));
        assert_eq!(missing(&each), [""; 0]);
        assert_eq!(missing(&each[..1]), ACTIONS);
        let reads = privilege("db", "", &["find"]);
        assert_eq!(missing(&[reads.clone(), each[0].clone()]), ACTIONS[1..]);
        assert_eq!(missing(&[reads, privilege("other", "", &["anyAction"])]), ACTIONS[1..]);
    }
}
