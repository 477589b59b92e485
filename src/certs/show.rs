//! What certificates say, for people and for scripts.

use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use clap::ValueEnum;
use serde_json::json;
use sheetbend_certs::{CertFacts, decode_certificates, format_span, format_time};

use super::read_text;
use crate::Failure;

/// How to show it.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For scripts.
    Json,
}

pub(super) fn inspect(file: &Path, output: Output, now: SystemTime) -> Result<String, Failure> {
    let refuse = |e: String| Failure::new(format!("{}: {e}", file.display()));
    let chain = decode_certificates(&read_text(file)?).map_err(refuse)?;
    let facts = chain.iter().map(|der| CertFacts::of(der)).collect::<Result<Vec<_>, _>>().map_err(refuse)?;
    Ok(match output {
        Output::Table => facts.iter().enumerate().map(|(at, cert)| table(at + 1, cert, now)).collect(),
        Output::Json => format!("{:#}\n", json!(facts.iter().map(|cert| as_json(cert, now)).collect::<Vec<_>>())),
    })
}

fn table(number: usize, cert: &CertFacts, now: SystemTime) -> String {
    let escaped =
        |names: &[String]| names.iter().map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "   {name:<9} {value}");
        }
    };
    line("name", escaped(&cert.uris));
    line("dns", escaped(&cert.dns));
    line("ip", cert.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    line("subject", cert.subject.clone());
    line("issuer", cert.issuer.clone());
    line("serial", cert.serial.clone());
    line("valid", format!("{} to {} ({})", format_time(cert.not_before), format_time(cert.not_after), left(cert, now)));
    line("use", usage(cert));
    line("sha256", cert.sha256.to_string());
    // The number stands where the first line's indent was.
    out.replacen("   ", &format!("{number}. "), 1)
}

fn left(cert: &CertFacts, now: SystemTime) -> String {
    if let Ok(early) = cert.not_before.duration_since(now) {
        return format!("not yet: in {}", format_span(early));
    }
    match cert.not_after.duration_since(now) {
        Ok(left) => format!("{} left", format_span(left)),
        Err(ended) => format!("expired {} ago", format_span(ended.duration())),
    }
}

fn usage(cert: &CertFacts) -> String {
    match (cert.is_ca, cert.path_len, cert.server_auth, cert.client_auth) {
        (true, Some(0), ..) => "CA, signs workloads only".to_owned(),
        (true, Some(below), ..) => format!("CA, at most {below} CAs below it"),
        (true, None, ..) => "CA".to_owned(),
        (false, _, true, true) if cert.signs_handshakes_only => "workload: TLS server and client".to_owned(),
        (false, _, server, client) => {
            format!(
                "not a mesh workload's (serverAuth {server}, clientAuth {client}, keyUsage as asked {})",
                cert.signs_handshakes_only
            )
        }
    }
}

fn as_json(cert: &CertFacts, now: SystemTime) -> serde_json::Value {
    json!({
        "uris": cert.uris,
        "dns": cert.dns,
        "ips": cert.ips,
        "subject": cert.subject,
        "issuer": cert.issuer,
        "serial": cert.serial,
        "not_before": format_time(cert.not_before),
        "not_after": format_time(cert.not_after),
        "expired": now > cert.not_after,
        "ca": cert.is_ca,
        "sha256": cert.sha256.to_string(),
        "key_sha256": cert.key_sha256.to_string(),
    })
}
