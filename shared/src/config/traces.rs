//! Settings of traces, under the names that OpenTelemetry gives them.

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::{Reader, parse};
use crate::trace::{Export, Sampler};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
/// Bytes of a value of `OTEL_RESOURCE_ATTRIBUTES`.
const ATTRIBUTE_BYTES: usize = 1_024;

/// Whether anything is exported.
#[derive(Clone, Copy, PartialEq)]
enum Exporter {
    Otlp,
    Nothing,
}

fn exporter(text: &str) -> Result<Exporter, parse::Valid> {
    match text.to_ascii_lowercase().as_str() {
        "otlp" => Ok(Exporter::Otlp),
        "none" => Ok(Exporter::Nothing),
        _ => Err("otlp or none"),
    }
}

fn protocol(text: &str) -> Result<(), parse::Valid> {
    match text.to_ascii_lowercase().as_str() {
        "http/protobuf" => Ok(()),
        _ => Err("http/protobuf; this program speaks neither grpc (port 4317) nor http/json"),
    }
}

fn endpoint(text: &str) -> Result<Url, parse::Valid> {
    const VALID: parse::Valid = "an http or https URL without query, such as http://127.0.0.1:4318; credentials belong into \
                                 OTEL_EXPORTER_OTLP_HEADERS";
    let url = Url::parse(text).map_err(|_| VALID)?;
    let plain = url.username().is_empty() && url.password().is_none();
    let bare = url.query().is_none() && url.fragment().is_none();
    if matches!(url.scheme(), "http" | "https") && url.has_host() && plain && bare {
        Ok(url)
    } else {
        Err(VALID)
    }
}

/// The address of traces below that of a collector.
fn below(mut base: Url) -> Url {
    let path = format!("{}/v1/traces", base.path().trim_end_matches('/'));
    base.set_path(&path);
    base
}

fn headers(text: &str) -> Result<HeaderMap, parse::Valid> {
    const VALID: parse::Valid = "name=value pairs, comma-separated, with the values percent-encoded, such as \
                                 authorization=Bearer%20...";
    let mut headers = HeaderMap::new();
    for (name, value) in pairs(text).ok_or(VALID)? {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| VALID)?;
        let mut value = HeaderValue::from_str(&value).map_err(|_| VALID)?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

fn attributes(text: &str) -> Result<Vec<(String, String)>, parse::Valid> {
    const VALID: parse::Valid = "key=value pairs, comma-separated, with the values percent-encoded, such as \
                                 deployment.environment.name=production";
    let pairs = pairs(text).ok_or(VALID)?;
    let printable = |text: &str| text.len() <= ATTRIBUTE_BYTES && !text.chars().any(char::is_control);
    let good = pairs.iter().all(|(key, value)| printable(key) && printable(value));
    if good { Ok(pairs) } else { Err(VALID) }
}

fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (key, value) = part.split_once('=')?;
            let key = key.trim();
            (!key.is_empty()).then_some((key.to_owned(), parse::percent_decoded(value.trim())?))
        })
        .collect()
}

fn service(text: &str) -> Result<String, parse::Valid> {
    let good = text.len() <= 255 && !text.chars().any(char::is_control);
    if good { Ok(text.to_owned()) } else { Err("a name of at most 255 bytes") }
}

fn millis(text: &str) -> Result<Duration, parse::Valid> {
    let number = parse::whole(text).filter(|number| (1..=600_000).contains(number));
    number.map(Duration::from_millis).ok_or("a whole number of milliseconds from 1 to 600000")
}

fn spans(text: &str) -> Result<usize, parse::Valid> {
    let number = parse::whole(text).filter(|number| (1..=1_000_000).contains(number));
    number.and_then(|number| usize::try_from(number).ok()).ok_or("a whole number from 1 to 1000000")
}

fn sampler(text: &str) -> Result<(bool, Option<f64>), parse::Valid> {
    match text.to_ascii_lowercase().as_str() {
        "always_on" => Ok((false, Some(1.0))),
        "always_off" => Ok((false, Some(0.0))),
        "traceidratio" => Ok((false, None)),
        "parentbased_always_on" => Ok((true, Some(1.0))),
        "parentbased_always_off" => Ok((true, Some(0.0))),
        "parentbased_traceidratio" => Ok((true, None)),
        _ => Err("always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or \
                  parentbased_traceidratio"),
    }
}

fn ratio(text: &str) -> Result<f64, parse::Valid> {
    let digits = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number = text.parse().ok().filter(|number| digits && (0.0..=1.0).contains(number));
    number.ok_or("a number from 0 to 1, such as 0.1")
}

impl Reader {
    /// How traces are exported; `None` if they are not, or after a problem.
    pub(super) fn traces(&mut self) -> Option<Export> {
        // Everything is read, also what is not used then: a mistake is told when it is made.
        let disabled = self.required("OTEL_SDK_DISABLED", parse::boolean);
        let exporter = self.required("OTEL_TRACES_EXPORTER", exporter);
        let base = self.optional(ENDPOINT, endpoint);
        let own = self.optional(TRACES_ENDPOINT, endpoint);
        self.optional("OTEL_EXPORTER_OTLP_PROTOCOL", protocol);
        self.optional("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol);
        let general = self.optional("OTEL_EXPORTER_OTLP_HEADERS", headers);
        let special = self.optional("OTEL_EXPORTER_OTLP_TRACES_HEADERS", headers);
        let timeout = self.required("OTEL_EXPORTER_OTLP_TIMEOUT", millis);
        let own_timeout = self.optional("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", millis);
        let named = self.optional("OTEL_SERVICE_NAME", service);
        let mut resource = self.optional("OTEL_RESOURCE_ATTRIBUTES", attributes).unwrap_or_default();
        let sampler = self.required("OTEL_TRACES_SAMPLER", sampler);
        let ratio = self.required("OTEL_TRACES_SAMPLER_ARG", ratio);
        let queue = self.required("OTEL_BSP_MAX_QUEUE_SIZE", spans);
        let batch = self.required("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", spans);
        let delay = self.required("OTEL_BSP_SCHEDULE_DELAY", millis);

        if let Some(name) = named {
            resource.retain(|(key, _)| key != "service.name");
            resource.push(("service.name".to_owned(), name));
        }
        let (by_parent, fixed) = sampler?;
        let (queue, batch) = (queue?, batch?);
        if batch > queue {
            self.problem("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "it is more than OTEL_BSP_MAX_QUEUE_SIZE");
            return None;
        }
        let export = Export {
            endpoint: own.or_else(|| base.map(below))?,
            headers: special.or(general).unwrap_or_default(),
            timeout: own_timeout.or(timeout)?,
            sampler: Sampler { by_parent, ratio: fixed.or(ratio)? },
            resource,
            queue,
            batch,
            delay: delay?,
        };
        (!disabled? && exporter? == Exporter::Otlp).then_some(export)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn load(env: &[(&str, &str)]) -> Result<Option<Export>, String> {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Settings::load(env, None).map(|settings| settings.traces).map_err(|errors| errors.to_string())
    }

    #[test]
    fn nothing_is_exported_unless_a_collector_is_named() {
        for env in [
            &[][..],
            &[("OTEL_SERVICE_NAME", "mine"), ("OTEL_TRACES_SAMPLER", "always_on")],
            &[(ENDPOINT, "http://127.0.0.1:4318"), ("OTEL_SDK_DISABLED", "true")],
            &[(ENDPOINT, "http://127.0.0.1:4318"), ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert!(load(env).unwrap().is_none(), "{env:?}");
        }
    }

    #[test]
    fn the_standard_variables_mean_what_they_mean_elsewhere() {
        let export = load(&[(ENDPOINT, "http://collector:4318/")]).unwrap().unwrap();
        assert_eq!(export.endpoint.as_str(), "http://collector:4318/v1/traces");
        assert_eq!(export.sampler, Sampler { by_parent: true, ratio: 1.0 });
        assert_eq!(
            (export.timeout, export.delay, export.queue, export.batch),
            (Duration::from_secs(10), Duration::from_secs(5), 2_048, 512)
        );
        let export = load(&[
            (ENDPOINT, "https://collector/base"),
            (TRACES_ENDPOINT, "https://other/exactly/here"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=no"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=Bearer%20abc, x-scope = a"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "5000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "700"),
            ("OTEL_SERVICE_NAME", "mine"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=theirs,deployment.environment.name=a%2Cb"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        let export = export.unwrap().unwrap();
        assert_eq!(export.endpoint.as_str(), "https://other/exactly/here");
        assert_eq!(export.headers["authorization"], "Bearer abc");
        assert_eq!((export.headers.len(), export.timeout), (2, Duration::from_millis(700)));
        assert_eq!(export.sampler, Sampler { by_parent: true, ratio: 0.25 });
        let resource = [("deployment.environment.name", "a,b"), ("service.name", "mine")];
        assert_eq!(export.resource, resource.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert!(!format!("{export:?}").contains("abc"), "{export:?}");
    }

    #[test]
    fn bad_values_are_refused_and_those_of_credentials_not_repeated() {
        for (name, value) in [
            (ENDPOINT, "127.0.0.1:4318"),
            (ENDPOINT, "grpc://collector:4317"),
            (ENDPOINT, "http://user:canary@collector"),
            (TRACES_ENDPOINT, "http://collector/#x"),
            (TRACES_ENDPOINT, "http://collector/?key=x"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "canary"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=canary%0d%0ax: y"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a b=canary"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=canary%zz"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10s"),
            ("OTEL_RESOURCE_ATTRIBUTES", "nonsense"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_TRACES_SAMPLER_ARG", "1.1"),
            ("OTEL_TRACES_SAMPLER_ARG", "NaN"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_SDK_DISABLED", "perhaps"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
            ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ] {
            let error = load(&[(name, value)]).unwrap_err();
            let named =
                if name == "OTEL_BSP_MAX_QUEUE_SIZE" { "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" } else { name };
            assert!(error.starts_with(&format!("{named}: ")) && !error.contains("canary"), "{error}");
        }
    }
}
