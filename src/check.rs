//! `sheetbend check`: everything that is wrong in a folder of resources, before a mesh reads it.

use std::path::PathBuf;
use std::process::ExitCode;

use sheetbend_control_plane::{Checked, check};
use sheetbend_control_plane_client::model::ServiceName;

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The folder of resources, or one file
    #[arg(value_name = "FOLDER")]
    path: PathBuf,

    /// A service that no resource declares, since a sidecar registers it: `NAME[.NAMESPACE][:PORT]`; may be repeated
    #[arg(long = "service", value_name = "NAME", value_parser = service)]
    services: Vec<(ServiceName, Option<u16>)>,

    /// The CA's trust domain; without it, any is taken
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: Option<String>,

    /// The form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let checked = check(&args.path, &args.services, args.trust_domain.as_deref())
        .map_err(|error| Failure::new(format!("{}: {error}", args.path.display())))?;
    match args.output {
        Output::Text => print!("{}", text(&checked)),
        Output::Json => println!("{:#}", serde_json::to_value(&checked).unwrap_or_default()),
    }
    Ok(ExitCode::from(u8::from(!checked.problems.is_empty())))
}

fn text(checked: &Checked) -> String {
    let told: String = checked.problems.iter().map(|problem| format!("{problem}\n")).collect();
    let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (files, resources) = (plural(checked.files, "file"), plural(checked.resources, "good resource"));
    match checked.problems.len() {
        0 => format!("{files}, {resources}, nothing wrong\n"),
        wrong => format!("{told}{files}, {resources}, {}\n", plural(wrong, "problem")),
    }
}

fn service(text: &str) -> Result<(ServiceName, Option<u16>), String> {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port.parse().map_err(|_| format!("`{port}` is not a port"))?)),
        None => (text, None),
    };
    let (service, namespace) = name.rsplit_once('.').unwrap_or((name, "default"));
    Ok((ServiceName { service: service.into(), namespace: namespace.into() }, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_with_or_without_namespace_and_port() {
        let named = |text: &str| service(text).map(|(name, port)| (name.to_string(), port));
        assert_eq!(named("web"), Ok(("web.default".into(), None)));
        assert_eq!(named("web.shop:80"), Ok(("web.shop".into(), Some(80))));
        assert!(named("web:http").is_err());
    }
}
