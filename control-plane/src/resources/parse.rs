//! One file of resources: all of it is good, or it is refused with the place of the first mistake.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_saphyr::{Error, Location};

use super::Resource;
use super::convert;
use super::kinds;

/// Larger files are not read.
pub(super) const MAX_FILE: u64 = 4 << 20;

/// Why a file is refused, and where.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, thiserror::Error)]
#[error("{}:{line}:{column}: {reason}{}", file.display(), hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default())]
pub(crate) struct Refusal {
    pub(crate) file: PathBuf,
    pub(crate) line: u64,
    pub(crate) column: u64,
    pub(crate) reason: String,
    pub(crate) hint: Option<String>,
}

/// A mistake within one document.
pub(super) struct Mistake {
    at: Location,
    reason: String,
    hint: Option<String>,
}

pub(super) type Checked<T> = Result<T, Mistake>;

pub(super) fn mistake<T>(at: Location, reason: impl Into<String>, hint: impl Into<Option<&'static str>>) -> Checked<T> {
    Err(Mistake { at, reason: reason.into(), hint: hint.into().map(str::to_string) })
}

/// Every resource of a file, each with the line on which its document starts.
pub(super) fn parse(file: &Path, text: &str) -> Result<Vec<(u64, Resource)>, Refusal> {
    let mut resources = Vec::new();
    for (before, document) in documents(text) {
        match parse_document(document) {
            Ok(Some(resource)) => resources.push((before + 1, resource)),
            Ok(None) => {}
            Err(Mistake { at, reason, hint }) => {
                let (line, column) = (before + at.line().max(1), at.column().max(1));
                return Err(Refusal { file: file.into(), line, column, reason, hint });
            }
        }
    }
    Ok(resources)
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
const KINDS: [&str; 6] = ["Service", "EndpointSlice", "HTTPRoute", "GRPCRoute", "BackendPolicy", "MeshSettings"];

fn parse_document(text: &str) -> Checked<Option<Resource>> {
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
        false => Err(Mistake {
            at: version.referenced,
            reason: format!("{} of {} is not known here", kind.value, version.value),
            hint: Some(format!("write apiVersion: {}", wanted[0])),
        }),
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
        "BackendPolicy" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::backend_policy(read(text)?).map(Resource::Backend))
            .map(Some),
        "MeshSettings" => expect(&["sheetbend.io/v1alpha1"])
            .and_then(|()| convert::settings(read(text)?).map(Resource::Settings))
            .map(Some),
        bystander if BYSTANDERS.contains(&bystander) => Ok(None),
        other => Err(Mistake {
            at: kind.referenced,
            reason: format!("`{other}` is not a kind that is read here"),
            hint: Some(
                suggestion(other, KINDS.into_iter()).unwrap_or_else(|| format!("known are {}", KINDS.join(", "))),
            ),
        }),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Checked<T> {
    serde_saphyr::from_str(text).map_err(|error| {
        let at = error.location().unwrap_or(Location::UNKNOWN);
        match error.without_snippet() {
            Error::SerdeUnknownField { field, expected, .. } => Mistake {
                at,
                reason: format!("unknown field `{field}`"),
                hint: Some(match NOT_YET.contains(&field.as_str()) {
                    true => "the Gateway API has this field, and it is not obeyed here yet: take it out".to_string(),
                    false => suggestion(field, expected.iter().copied())
                        .unwrap_or_else(|| format!("known here are {}", expected.join(", "))),
                }),
            },
            plain => Mistake { at, reason: one_line(&plain.to_string()), hint: None },
        }
    })
}

/// Words of the Gateway API that change what traffic does, and which nothing here obeys yet.
const NOT_YET: [&str; 5] = ["filters", "retry", "sessionPersistence", "sectionName", "useDefaultGateways"];

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
fn suggestion<'a>(written: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
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
