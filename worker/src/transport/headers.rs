//! Headers in which the stateless protocol repeats what a request says, for those who route it without
//! reading it.

use std::collections::HashMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use mcp_shared::json::RawJson;
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

const METHOD: HeaderName = HeaderName::from_static("mcp-method");
const NAME: HeaderName = HeaderName::from_static("mcp-name");
const PARAM: &str = "mcp-param-";
/// How deep annotated properties may lie.
const DEPTH: usize = 16;

/// By tool: which of its arguments, by their path, are sent as which header.
#[derive(Default)]
pub struct ParamHeaders(HashMap<String, Vec<(Vec<String>, HeaderName)>>);

impl ParamHeaders {
    /// What a listing of tools asks for.
    pub fn of(tools: &RawJson) -> Self {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Tool {
            name: String,
            #[serde(default)]
            input_schema: Map<String, Value>,
        }
        // Most tools ask for nothing, and schemas can be long.
        let tools: Vec<&RawValue> = tools.read().unwrap_or_default();
        let asking = tools.into_iter().filter(|tool| tool.get().contains("x-mcp-header"));
        let parsed = asking.filter_map(|tool| serde_json::from_str::<Tool>(tool.get()).ok());
        let mut all = HashMap::new();
        for tool in parsed {
            let mut found = Vec::new();
            collect(&tool.input_schema, &mut Vec::new(), &mut found);
            if !found.is_empty() {
                all.insert(tool.name, found);
            }
        }
        Self(all)
    }
}

fn collect(schema: &Map<String, Value>, path: &mut Vec<String>, found: &mut Vec<(Vec<String>, HeaderName)>) {
    let Some(Value::Object(properties)) = schema.get("properties").filter(|_| path.len() < DEPTH) else {
        return;
    };
    for (name, property) in properties {
        let Value::Object(property) = property else { continue };
        path.push(name.clone());
        if let Some(Value::String(header)) = property.get("x-mcp-header")
            && !header.is_empty()
            && let Ok(header) = HeaderName::from_bytes(format!("{PARAM}{header}").as_bytes())
        {
            found.push((path.clone(), header));
        }
        collect(property, path, found);
        path.pop();
    }
}

/// Adds the headers of a request.
pub fn standard(request: &[u8], params: &ParamHeaders, headers: &mut HeaderMap) {
    #[derive(Deserialize)]
    struct Request<'a> {
        method: String,
        #[serde(borrow)]
        params: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Call<'a> {
        name: String,
        #[serde(borrow)]
        arguments: Option<&'a RawValue>,
    }
    let Ok(request) = serde_json::from_slice::<Request<'_>>(request) else { return };
    insert(headers, METHOD, &request.method);
    if request.method != "tools/call" {
        return;
    }
    let call = request.params.and_then(|params| serde_json::from_str::<Call<'_>>(params.get()).ok());
    let Some(call) = call else { return };
    insert(headers, NAME, &call.name);
    let Some(wanted) = params.0.get(&call.name) else { return };
    let arguments: Value =
        call.arguments.and_then(|arguments| serde_json::from_str(arguments.get()).ok()).unwrap_or_default();
    for (path, header) in wanted {
        let value = path.iter().try_fold(&arguments, |value, key| value.get(key));
        let text = match value {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Bool(flag)) => flag.to_string(),
            Some(Value::Number(number)) => number.to_string(),
            _ => continue,
        };
        insert(headers, header.clone(), &text);
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(&encoded(value)) {
        headers.insert(name, value);
    }
}

/// A text as it can stand in a header: as it is, or wrapped where it would not survive.
fn encoded(text: &str) -> String {
    let visible = text.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
    let trimmed = text.starts_with(' ') || text.ends_with(' ');
    let wrapped = text.starts_with("=?base64?") && text.ends_with("?=");
    if visible && !trimmed && !wrapped {
        text.to_owned()
    } else {
        format!("=?base64?{}?=", BASE64_STANDARD.encode(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_says_in_its_headers_what_its_tool_asks_for() {
        let tools = r#"[{"name":"plain"},{"name":"say","inputSchema":{"properties":{
            "region":{"type":"string","x-mcp-header":"Region"},
            "at":{"properties":{"zone":{"type":"integer","x-mcp-header":"Zone"}}},
            "bad":{"x-mcp-header":"a b"},"absent":{"x-mcp-header":"Absent"}}}}]"#;
        let params = ParamHeaders::of(&RawJson::parse(tools.to_owned()).unwrap());
        let mut headers = HeaderMap::new();
        let call = r#"{"method":"tools/call","params":{"name":"say","arguments":
            {"region":" grün","at":{"zone":7},"bad":"x"}}}"#;
        standard(call.as_bytes(), &params, &mut headers);
        let of = |name: &str| headers.get(name).map(|value| value.to_str().unwrap());
        assert_eq!((of("mcp-method"), of("mcp-name")), (Some("tools/call"), Some("say")));
        assert_eq!(of("mcp-param-region"), Some("=?base64?IGdyw7xu?="));
        assert_eq!(of("mcp-param-zone"), Some("7"));
        assert_eq!(headers.len(), 4);
        assert_eq!(encoded("=?base64?eA==?="), "=?base64?PT9iYXNlNjQ/ZUE9PT89?=");
        assert_eq!(encoded("us-west 1"), "us-west 1");
    }
}
