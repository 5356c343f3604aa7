//! What servers say of their tools: how it is shown, and how it is noticed that they say something else.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use memchr::memchr3_iter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};
use sha2::{Digest, Sha256};

use crate::{
    ids::{ServerName, ToolName, UserId},
    json::RawJson,
    server::ServerRecord,
    timestamp::Timestamp,
};

/// The members whose values people and models read as text.
const READ: [&str; 3] = ["name", "title", "description"];
/// The members of a schema that are data, whatever they are called inside.
const DATA: [&str; 4] = ["default", "const", "enum", "examples"];

/// Whether a character has no place in a name or a description: control characters, those that nobody sees, those that
/// change the order in which others are seen, and tags, by which text is hidden in text.
fn is_hidden(c: char) -> bool {
    matches!(c,
        '\0'..='\u{8}' | '\u{b}'..='\u{1f}' | '\u{7f}'..='\u{9f}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

/// A listing as it may be shown: without hidden characters in names, titles and descriptions. Nearly always these are
/// the bytes that the server sent; of others everything else stays as it was.
pub fn tame(listing: &RawJson) -> RawJson {
    let text = listing.as_bytes();
    if !may_hide(text) {
        return listing.clone();
    }
    match Tamer::new(text).run() {
        Cow::Borrowed(_) => listing.clone(),
        Cow::Owned(text) => RawJson::from_parsed(text.into()),
    }
}

/// A tool's name as it may be shown.
pub fn tame_name(name: &str) -> String {
    name.chars().filter(|c| !is_hidden(*c)).collect()
}

/// Whether there may be a hidden character: one of the bytes that they begin with, or an escape.
fn may_hide(text: &[u8]) -> bool {
    let begins = |at: &[u8]| {
        matches!(
            at,
            [b'\\', b'u' | b'b' | b'f' | b'r', _]
                | [0x7f, ..]
                | [0xc2, 0x80..=0x9f, _]
                | [0xe2, 0x80, 0x8b..=0x8f | 0xaa..=0xae]
                | [0xe2, 0x81, 0xa0..=0xaf]
                | [0xef, 0xbb, 0xbf]
                | [0xf3, 0xa0, 0x80 | 0x81]
        )
    };
    // Whole listings go through here whenever somebody looks at all servers: only these bytes are looked at.
    let suspects = memchr3_iter(b'\\', 0x7f, 0xc2, text).chain(memchr3_iter(0xe2, 0xef, 0xf3, text));
    suspects.filter_map(|at| text.get(at..at + 3)).any(begins)
}

/// Goes through JSON that is known to be valid, and writes it again only from the first string on that has to change.
struct Tamer<'a> {
    text: &'a [u8],
    at: usize,
    /// What was written so far, and up to where it stands for the text.
    out: Vec<u8>,
    copied: usize,
}

/// An object or a list that is open.
struct Open {
    /// Whether the next string of an object is the name of a member.
    key_next: bool,
    object: bool,
    /// Whether strings of this member are read by people.
    read: bool,
    /// Whether all of it is data.
    data: bool,
    /// Whether the next member's value is.
    member_data: bool,
}

impl<'a> Tamer<'a> {
    fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0, out: Vec::new(), copied: 0 }
    }

    fn run(mut self) -> Cow<'a, [u8]> {
        let mut open: Vec<Open> = Vec::new();
        while let Some(&byte) = self.text.get(self.at) {
            match byte {
                b'"' => {
                    let from = self.at;
                    self.skip_string();
                    let string = &self.text[from..self.at];
                    let Some(inner) = open.last_mut() else { continue };
                    if inner.object && inner.key_next {
                        let name = serde_json::from_slice::<Cow<'_, str>>(string).unwrap_or_default();
                        inner.read = !inner.data && READ.contains(&&*name);
                        inner.member_data = inner.data || DATA.contains(&&*name);
                        inner.key_next = false;
                    } else if inner.object && inner.read {
                        self.replace(from, string);
                    }
                    continue;
                }
                b'{' | b'[' => {
                    let data = open.last().is_some_and(|outer| outer.member_data);
                    let object = byte == b'{';
                    open.push(Open { key_next: object, object, read: false, data, member_data: data });
                }
                b'}' | b']' => drop(open.pop()),
                b',' => {
                    if let Some(inner) = open.last_mut() {
                        inner.key_next = inner.object;
                    }
                }
                _ => {}
            }
            self.at += 1;
        }
        if self.copied == 0 {
            return Cow::Borrowed(self.text);
        }
        self.out.extend_from_slice(&self.text[self.copied..]);
        Cow::Owned(self.out)
    }

    /// Goes behind the string that begins here.
    fn skip_string(&mut self) {
        self.at += 1;
        while let Some(&byte) = self.text.get(self.at) {
            self.at += if byte == b'\\' { 2 } else { 1 };
            if byte == b'"' {
                return;
            }
        }
    }

    fn replace(&mut self, from: usize, string: &[u8]) {
        // Halves of surrogate pairs are not text; they stay for whoever can read them.
        let Ok(said) = serde_json::from_slice::<Cow<'_, str>>(string) else { return };
        if !said.contains(is_hidden) {
            return;
        }
        let shown: String = said.chars().filter(|c| !is_hidden(*c)).collect();
        let Ok(shown) = serde_json::to_vec(&shown) else { return };
        self.out.extend_from_slice(&self.text[self.copied..from]);
        self.out.extend_from_slice(&shown);
        self.copied = self.at;
    }
}

/// The SHA-256 of what each tool says of itself: name, title, description, schemas and annotations, however it is
/// written. Tools of one name are one.
pub fn fingerprints(listing: &RawJson) -> BTreeMap<String, String> {
    #[derive(Deserialize)]
    struct Tool {
        name: String,
        #[serde(flatten)]
        rest: serde_json::Map<String, Value>,
    }
    let tools: Vec<&RawValue> = listing.read().unwrap_or_default();
    let mut hashers = BTreeMap::<String, Sha256>::new();
    for tool in tools {
        let Ok(tool) = serde_json::from_str::<Tool>(tool.get()) else { continue };
        // What cannot be called harms nobody.
        if ToolName::parse(&tool.name).is_err() {
            continue;
        }
        let hasher = hashers.entry(tool.name).or_default();
        for field in ["title", "description", "inputSchema", "outputSchema", "annotations"] {
            hash_value(hasher, tool.rest.get(field).unwrap_or(&Value::Null));
        }
    }
    hashers.into_iter().map(|(name, hasher)| (name, hex::encode(hasher.finalize()))).collect()
}

/// Every value has one form: the members of objects in the order of their names, and lengths before texts and lists.
fn hash_value(hasher: &mut Sha256, value: &Value) {
    let mut part = |kind: u8, bytes: &[u8]| {
        hasher.update([kind]);
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    match value {
        Value::Null => part(b'0', b""),
        Value::Bool(value) => part(b'b', &[u8::from(*value)]),
        Value::Number(number) => part(b'n', number.to_string().as_bytes()),
        Value::String(text) => part(b's', text.as_bytes()),
        Value::Array(items) => {
            part(b'a', &(items.len() as u64).to_be_bytes());
            items.iter().for_each(|item| hash_value(hasher, item));
        }
        Value::Object(members) => {
            part(b'o', &(members.len() as u64).to_be_bytes());
            let sorted: BTreeMap<_, _> = members.iter().collect();
            for (name, value) in sorted {
                hasher.update((name.len() as u64).to_be_bytes());
                hasher.update(name.as_bytes());
                hash_value(hasher, value);
            }
        }
    }
}

/// What a server's tools were when they were first seen, and what became of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ToolPins {
    /// Which server.
    pub server_name: ServerName,
    /// Whose listing, where every user has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<UserId>,
    /// What the server is, as a hash: of another command, package or URL other tools are expected.
    pub of: String,
    /// The hash of each tool as it was pinned.
    #[serde(with = "pairs")]
    pub tools: BTreeMap<String, String>,
    /// The tools that are otherwise now, are new, or are gone.
    #[serde(with = "pairs")]
    pub changed: BTreeMap<String, ChangedTool>,
}

/// Maps as lists of pairs: what a tool is called may be no name of a field in a database.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<V: Serialize, S: Serializer>(
        map: &BTreeMap<String, V>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, V: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, V>, D::Error> {
        Ok(Vec::<(String, V)>::deserialize(deserializer)?.into_iter().collect())
    }
}

/// A tool that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangedTool {
    /// Its hash now; `None`: the server does not list it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<String>,
    /// Since when.
    pub at: Timestamp,
}

impl ToolPins {
    /// What is pinned when a server is listed for the first time, or after its record was changed.
    pub fn first(record: &ServerRecord, user: Option<&UserId>, listed: BTreeMap<String, String>) -> Self {
        Self {
            server_name: record.name.clone(),
            username: user.cloned(),
            of: identity(record),
            tools: listed,
            changed: BTreeMap::new(),
        }
    }

    /// Whether they are those of a record as it is.
    pub fn are_of(&self, record: &ServerRecord) -> bool {
        self.of == identity(record)
    }

    /// Takes in what is listed now. Returns the tools that are otherwise than at the last look.
    pub fn take(&mut self, listed: &BTreeMap<String, String>, at: Timestamp) -> Vec<String> {
        let names: BTreeSet<&String> =
            self.tools.keys().chain(listed.keys()).chain(self.changed.keys()).collect();
        let (mut news, mut changed) = (Vec::new(), BTreeMap::new());
        for name in names {
            let (pinned, now) = (self.tools.get(name), listed.get(name));
            let known = self.changed.get(name);
            let last = known.map_or(pinned, |known| known.now.as_ref());
            if now != last {
                news.push(name.clone());
            }
            if now != pinned {
                let at = known.filter(|_| now == last).map_or(at, |known| known.at);
                changed.insert(name.clone(), ChangedTool { now: now.cloned(), at });
            }
        }
        self.changed = changed;
        news
    }
}

/// What decides which tools a server has, as far as we know.
fn identity(record: &ServerRecord) -> String {
    let mut hasher = Sha256::new();
    hash_value(
        &mut hasher,
        &serde_json::to_value((&record.id, &record.transport, &record.package)).unwrap_or_default(),
    );
    hex::encode(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(text: &str) -> String {
        let tame = tame(&RawJson::parse(text.to_owned()).unwrap());
        // Whatever it is, it is JSON.
        RawJson::parse(tame.bytes().clone()).unwrap();
        String::from_utf8(tame.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn what_hides_nothing_stays_byte_for_byte() {
        for text in [
            "[]",
            r#"[{"name":"a","description":"caf\u00e9 ünï 日本 \n\t \"x\" \\u200b", "x": 1.50e+1 , "y":[1,  2]}]"#,
            r#"[{"name":"a","inputSchema":{"enum":["\u200b"],"default":{"description":"\u200b"},"x":"\u200b"}}]"#,
            r#"[{"name":["\u200b"],"description":"\ud800"}]"#,
        ] {
            assert_eq!(shown(text), text);
        }
    }

    #[test]
    fn hidden_characters_go_and_nothing_else() {
        let hidden = "\u{1b}[2J\u{7f}\u{85}\u{200b}\u{200f}\u{202e}\u{2066}\u{feff}\u{e0041}\u{e007f}";
        for (before, after) in [
            (format!("[{{\"name\":\"e{hidden}cho\"}}]").replace('\u{1b}', "\\u001b"), r#"[{"name":"e[2Jcho"}]"#),
            (
                r#"[ {"x": 1.0, "description" : "a\u200bb\u202Ec\b\f\r\ud83d\ude00\n", "y":"\u200b" } ]"#.to_owned(),
                r#"[ {"x": 1.0, "description" : "abc😀\n", "y":"\u200b" } ]"#,
            ),
            (
                r#"[{"name":"a","inputSchema":{"properties":{"description":{"description":"x\u200b","default":"\u200b"},
                    "n":{"title":"\u2060t"}}}},{"title":"\ufeff"}]"#
                    .to_owned(),
                r#"[{"name":"a","inputSchema":{"properties":{"description":{"description":"x","default":"\u200b"},
                    "n":{"title":"t"}}}},{"title":""}]"#,
            ),
            (r#"[{"n\u0061me":"\u200ba"}]"#.to_owned(), r#"[{"n\u0061me":"a"}]"#),
        ] {
            assert_eq!(shown(&before), after);
        }
    }

    #[test]
    fn every_hidden_character_is_found_raw_and_escaped() {
        for c in (0..=0x10_ffff).filter_map(char::from_u32).filter(|c| is_hidden(*c)) {
            let mut units = [0; 2];
            let escaped: String =
                c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect();
            let raw = if c < ' ' { escaped.clone() } else { c.to_string() };
            for text in [raw, escaped] {
                assert_eq!(shown(&format!(r#"[{{"title":"a{text}b"}}]"#)), r#"[{"title":"ab"}]"#, "{c:?}");
            }
        }
    }

    #[test]
    fn fingerprints_are_of_what_is_said_not_of_how() {
        let of = |text: &str| fingerprints(&RawJson::parse(text.to_owned()).unwrap());
        let one =
            of(r#"[{"name":"a","description":"x","inputSchema":{"type":"object","required":["p"]}}, 7]"#);
        let same = of(
            r#"[ {"inputSchema":{"required":["p"], "type":"object"},"vendor":1,"description":"\u0078","name":"a"} ]"#,
        );
        assert_eq!(one, same);
        for other in [
            r#"[{"name":"a","description":"y","inputSchema":{"type":"object","required":["p"]}}]"#,
            r#"[{"name":"a","description":"x","inputSchema":{"type":"object","required":["q"]}}]"#,
            r#"[{"name":"a","title":"x","inputSchema":{"type":"object","required":["p"]}}]"#,
            r#"[{"name":"a","description":"x","inputSchema":{"type":"object","required":["p"]},"annotations":{"readOnlyHint":true}}]"#,
        ] {
            assert_ne!(one["a"], of(other)["a"], "{other}");
        }
    }

    #[test]
    fn a_change_is_news_once_and_remembered_until_it_is_undone() {
        let record: ServerRecord = serde_json::from_value(json!({
            "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": "s", "command": "node", "enabled": true,
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
        }))
        .unwrap();
        let listed = |tools: &[(&str, &str)]| -> BTreeMap<String, String> {
            tools.iter().map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned())).collect()
        };
        let mut pins = ToolPins::first(&record, None, listed(&[("a", "1"), ("b", "1")]));
        let at = Timestamp::from_millis;
        assert_eq!(pins.take(&listed(&[("a", "1"), ("b", "1")]), at(1)), [""; 0]);
        assert_eq!(pins.take(&listed(&[("a", "2"), ("c", "1")]), at(2)), ["a", "b", "c"]);
        assert_eq!(pins.take(&listed(&[("a", "2"), ("c", "1")]), at(3)), [""; 0]);
        assert_eq!(pins.changed["a"], ChangedTool { now: Some("2".to_owned()), at: at(2) });
        assert_eq!(pins.changed["b"], ChangedTool { now: None, at: at(2) });
        assert_eq!(pins.take(&listed(&[("a", "3"), ("b", "1")]), at(4)), ["a", "b", "c"]);
        assert_eq!(pins.changed.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(pins.take(&listed(&[("a", "1"), ("b", "1")]), at(5)), ["a"]);
        assert!(pins.changed.is_empty());

        let mut other = record.clone();
        other.description = "new".to_owned();
        assert!(pins.are_of(&other));
        other.transport =
            serde_json::from_value(json!({"transportType": "stdio", "command": "npx"})).unwrap();
        assert!(!pins.are_of(&other));
    }
}
