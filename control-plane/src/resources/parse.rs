//! One file of resources: what is good in it, and the place of every mistake.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_saphyr::{Error, Location};
use sheetbend_control_plane_client::model::ServiceName;

use super::Resource;
use super::convert;
use super::kinds;
use super::without::without_field;

/// Larger files are not read.
pub(super) const MAX_FILE: u64 = 4 << 20;

/// What is wrong in a file, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, thiserror::Error)]
#[error("{}:{line}:{column}: {reason}{}", file.display(), hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default())]
pub struct Problem {
    /// The file, as the folder's path leads to it.
    pub file: PathBuf,
    /// Counted from 1.
    pub line: u64,
    /// Counted from 1, in characters.
    pub column: u64,
    /// What is wrong.
    pub reason: String,
    /// How it may be mended.
    pub hint: Option<String>,
}

/// A mistake within one document.
pub(super) struct Mistake {
    at: Location,
    reason: String,
    hint: Option<String>,
    kind: MistakeKind,
    /// Those found beside it.
    more: Vec<Mistake>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MistakeKind {
    /// A field that nobody knows: without it, the rest can be looked at.
    UnknownField,
    /// No YAML, or something else than is expected in its place.
    Shape,
    /// It can be read, and makes no sense.
    Meaning,
}

impl Mistake {
    fn new(at: Location, reason: String, hint: Option<String>) -> Self {
        Self { at, reason, hint, kind: MistakeKind::Meaning, more: Vec::new() }
    }

    fn into_all(mut self) -> Vec<Mistake> {
        let more = std::mem::take(&mut self.more);
        let mut all = vec![self];
        all.extend(more.into_iter().flat_map(Mistake::into_all));
        all
    }
}

pub(super) type Checked<T> = Result<T, Mistake>;

pub(super) fn mistake<T>(at: Location, reason: impl Into<String>, hint: impl Into<Option<&'static str>>) -> Checked<T> {
    Err(Mistake::new(at, reason.into(), hint.into().map(str::to_string)))
}

/// A word that is none of those that are known here.
pub(super) fn not_among<T>(at: Location, written: &str, reason: String, known: &[&str]) -> Checked<T> {
    let hint = suggestion(written, known.iter().copied()).unwrap_or_else(|| match known.is_empty() {
        true => "known here is none".to_string(),
        false => format!("known here are {}", known.join(", ")),
    });
    Err(Mistake::new(at, reason, Some(hint)))
}

/// All of them, or every mistake among them.
pub(super) fn every<T>(all: impl IntoIterator<Item = Checked<T>>) -> Checked<Vec<T>> {
    let (mut good, mut wrong) = (Vec::new(), None::<Mistake>);
    for one in all {
        match (one, &mut wrong) {
            (Ok(one), _) => good.push(one),
            (Err(mistake), Some(first)) => first.more.push(mistake),
            (Err(mistake), None) => wrong = Some(mistake),
        }
    }
    wrong.map_or(Ok(good), Err)
}

/// Both, or the mistakes in both.
pub(super) fn both<A, B>(a: Checked<A>, b: Checked<B>) -> Checked<(A, B)> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(mut mistake), Err(other)) => {
            mistake.more.push(other);
            Err(mistake)
        }
        (Err(mistake), _) | (_, Err(mistake)) => Err(mistake),
    }
}

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// Every good resource, with the line on which its document starts.
    pub(super) resources: Vec<(u64, Resource)>,
    /// Every mistake.
    pub(super) problems: Vec<Problem>,
    /// Services that stand in a document with a mistake.
    pub(super) unread: Vec<ServiceName>,
}

pub(super) fn parse(file: &Path, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for (before, document) in documents(text) {
        match parse_document(document) {
            Ok(Some(mut resource)) => {
                resource.place(file, before);
                parsed.resources.push((before + 1, resource));
            }
            Ok(None) => {}
            Err(mistakes) => {
                parsed.problems.extend(mistakes.into_iter().map(|Mistake { at, reason, hint, .. }| {
                    let (line, column) = (before + at.line().max(1), at.column().max(1));
                    Problem { file: file.into(), line, column, reason, hint }
                }));
                parsed.unread.extend(service_in(document));
            }
        }
    }
    parsed.problems.sort_unstable();
    parsed
}

/// The Service that a document with mistakes would be, as far as that can be read.
fn service_in(document: &str) -> Option<ServiceName> {
    #[derive(serde::Deserialize)]
    struct Named {
        kind: String,
        metadata: kinds::Meta,
    }
    let named: Named = serde_saphyr::from_str(document).ok().filter(|named: &Named| named.kind == "Service")?;
    let namespace = named.metadata.namespace.map_or("default".into(), |namespace| namespace.value.into());
    Some(ServiceName { service: named.metadata.name.value.into(), namespace })
}

/// The documents of a stream, each with the number of lines before it. A line that begins with `---` is a marker
/// wherever it stands (YAML 1.2 §9.1.2), block scalars included. What stands behind a marker belongs to the document.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut first_line, mut at, mut line) = (0, 0, 0, 0);
    for row in text.split_inclusive('\n') {
        let marker =
            row.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && at > start {
            documents.push((first_line, &text[start..at]));
            (start, first_line) = (at, line);
        }
        at += row.len();
        line += 1;
    }
    documents.push((first_line, &text[start..]));
    documents.retain(|(_, document)| document.lines().any(has_content));
    documents
}

fn has_content(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || line.starts_with('#') || line == "---" || line == "...")
}

/// Kinds that may stand beside ours in one file and are not ours to read.
const BYSTANDERS: [&str; 12] = [
    "ConfigMap",
    "Secret",
    "Pod",
    "ServiceAccount",
    "Namespace",
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "ReplicaSet",
    "Job",
    "CronJob",
    "NetworkPolicy",
];
const KINDS: [&str; 13] = [
    "Service",
    "EndpointSlice",
    "HTTPRoute",
    "GRPCRoute",
    "TLSRoute",
    "TCPRoute",
    "BackendPolicy",
    "XBackendTrafficPolicy",
    "TrafficLimit",
    "FaultInjection",
    "AuthorizationPolicy",
    "RequestAuthentication",
    "MeshSettings",
];

/// Mistakes of one document that are told at most.
const MOST_MISTAKES: usize = 100;

/// A document's resource, or every mistake in it: without a field that nobody knows, the rest is looked at again.
fn parse_document(text: &str) -> Result<Option<Resource>, Vec<Mistake>> {
    let (mut text, mut mistakes) = (Cow::Borrowed(text), Vec::new());
    loop {
        let mistake = match resource(&text) {
            Ok(resource) if mistakes.is_empty() => return Ok(resource),
            Ok(_) => return Err(mistakes),
            Err(mistake) => mistake,
        };
        if mistake.kind == MistakeKind::Shape && !mistakes.is_empty() {
            // Perhaps for want of the fields that were taken out.
            return Err(mistakes);
        }
        let unknown = mistake.kind == MistakeKind::UnknownField;
        let shorter = unknown.then(|| without_field(&text, mistake.at.into())).flatten();
        mistakes.extend(mistake.into_all());
        match shorter.filter(|_| mistakes.len() < MOST_MISTAKES) {
            Some(shorter) => text = Cow::Owned(shorter),
            None => return Err(mistakes),
        }
    }
}

fn resource(text: &str) -> Checked<Option<Resource>> {
    let header: kinds::Header = read(text)?;
    let start = Location::UNKNOWN;
    let Some(kind) = header.kind else {
        return mistake(start, "this document has no `kind`", "every resource begins with apiVersion and kind");
    };
    let Some(version) = header.api_version else {
        return mistake(kind.referenced, format!("this {} has no `apiVersion`", kind.value), None);
    };
    let expect = |wanted: &[&'static str]| match wanted.contains(&version.value.as_str()) {
        true => Ok(()),
        false => Err(Mistake::new(
            version.referenced,
            format!("{} of {} is not known here", kind.value, version.value),
            Some(format!("write apiVersion: {}", wanted[0])),
        )),
    };
    match kind.value.as_str() {
        "Service" => expect(&["v1"]).and_then(|()| convert::service(read(text)?).map(Resource::Service)).map(Some),
        "EndpointSlice" => {
            expect(&["discovery.k8s.io/v1"]).and_then(|()| convert::slice(read(text)?).map(Resource::Slice)).map(Some)
        }
        "HTTPRoute" => expect(&["gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1beta1"])
            .and_then(|()| convert::http_route(read(text)?).map(Resource::Route))
            .map(Some),
        "GRPCRoute" => expect(&["gateway.networking.k8s.io/v1"])
            .and_then(|()| convert::grpc_route(read(text)?).map(Resource::Route))
            .map(Some),
        "TLSRoute" => expect(&[
            "gateway.networking.k8s.io/v1",
            "gateway.networking.k8s.io/v1alpha3",
            "gateway.networking.k8s.io/v1alpha2",
        ])
        .and_then(|()| convert::tls_route(read(text)?).map(Resource::Route))
        .map(Some),
        "TCPRoute" => expect(&["gateway.networking.k8s.io/v1alpha2", "gateway.networking.k8s.io/v1"])
            .and_then(|()| convert::tcp_route(read(text)?).map(Resource::Route))
            .map(Some),
        "BackendPolicy" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::backend_policy(read(text)?).map(Resource::Backend))
            .map(Some),
        "TrafficLimit" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::traffic_limit(read(text)?).map(Resource::Limit))
            .map(Some),
        "FaultInjection" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::fault_injection(read(text)?).map(Resource::Faults))
            .map(Some),
        "RequestAuthentication" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::access::request_authentication(read(text)?).map(Resource::Tokens))
            .map(Some),
        "AuthorizationPolicy" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::access::authorization_policy(read(text)?).map(Resource::Authorization))
            .map(Some),
        "XBackendTrafficPolicy" => expect(&["gateway.networking.x-k8s.io/v1alpha1"])
            .and_then(|()| convert::backend_traffic(read(text)?).map(Resource::Backend))
            .map(Some),
        "MeshSettings" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::settings(read(text)?).map(Resource::Settings))
            .map(Some),
        bystander if BYSTANDERS.contains(&bystander) => Ok(None),
        other => Err(Mistake::new(
            kind.referenced,
            format!("`{other}` is not a kind that is read here"),
            Some(suggestion(other, KINDS.into_iter()).unwrap_or_else(|| format!("known are {}", KINDS.join(", ")))),
        )),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Checked<T> {
    serde_saphyr::from_str(text).map_err(|error| {
        let at = error.location().unwrap_or(Location::UNKNOWN);
        match error.without_snippet() {
            Error::SerdeUnknownField { field, expected, .. } => {
                let hint = match NOT_YET.contains(&field.as_str()) {
                    true => "the Gateway API has this field, and it is not obeyed here yet: take it out".to_string(),
                    false => suggestion(field, expected.iter().copied())
                        .unwrap_or_else(|| format!("known here are {}", expected.join(", "))),
                };
                let mistake = Mistake::new(at, format!("unknown field `{field}`"), Some(hint));
                Mistake { kind: MistakeKind::UnknownField, ..mistake }
            }
            plain => {
                let (reason, hint) = in_plain_words(one_line(&plain.to_string()));
                let mistake = Mistake::new(at, reason, hint.map(str::to_string));
                Mistake { kind: MistakeKind::Shape, ..mistake }
            }
        }
    })
}

/// Words of the Gateway API that change what traffic does, and which nothing here obeys yet.
const NOT_YET: [&str; 6] =
    ["requestMirror", "cors", "extensionRef", "sessionPersistence", "sectionName", "useDefaultGateways"];

/// What the parser says in words of Rust, in those of whoever writes YAML.
fn in_plain_words(message: String) -> (String, Option<&'static str>) {
    let said = |reason: &str, hint| (reason.to_string(), Some(hint));
    match message.as_str() {
        "invalid u16" => said("not a number from 0 to 65535", "write a whole number"),
        "invalid u32" | "invalid u64" => said("not a whole number of 0 or more", "write digits alone"),
        "expected sequence start" => said("not a list", "write `[one, two]`, or `- one` on a line of its own"),
        "expected mapping start" => said("not an object", "write `{key: value}`, or `key: value` on a line of its own"),
        duplicate if duplicate.starts_with("duplicate mapping key") => {
            let end = message.find(", set ").unwrap_or(message.len());
            let key = message[..end].trim_start_matches("duplicate mapping key").trim_start_matches([':', ' ']);
            (format!("the key `{key}` is there twice"), Some("take one of the two out"))
        }
        missing if missing.starts_with("missing field") => (message, Some("it cannot be left out")),
        _ => (message, None),
    }
}

/// The parser's messages end with a place that stands in front of ours already.
fn one_line(message: &str) -> String {
    let first = message.lines().find(|line| !line.trim().is_empty()).unwrap_or("not YAML").trim();
    let first = first.strip_prefix("error: ").unwrap_or(first);
    match first.find(" at line ") {
        Some(end) => first[..end].trim_end_matches([',', ':']).to_string(),
        None => first.to_string(),
    }
}

/// The known word nearest to what was written, if it is near at all.
pub(crate) fn suggestion<'a>(written: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let near = |word: &&str| distance(&written.to_lowercase(), &word.to_lowercase());
    let best = known.min_by_key(near)?;
    (near(&best) <= 1 + written.len() / 4).then(|| format!("did you mean `{best}`?"))
}

/// Levenshtein's distance, for words of at most 64 bytes.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let cost = (diagonal + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], cost);
        }
    }
    row[b.len()]
}
