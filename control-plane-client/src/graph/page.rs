//! A graph over HTTP: which form was asked for, and the page that draws it.

use std::str::FromStr;
use std::sync::LazyLock;

use base64::Engine;

use super::{Graph, dot, json, mermaid, table};

/// The page: one file, no library, nothing loaded from anywhere. It asks its own address for JSON every second.
const PAGE: &str = include_str!("page.html");

/// The header that says what the page may do: run its own script and style, known by their digests, and ask its own
/// server. Nothing else, not even be framed.
pub fn content_security_policy() -> &'static str {
    static POLICY: LazyLock<String> = LazyLock::new(|| {
        let digest = |tag: &str| {
            let open = format!("<{tag}>");
            let inside = PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
            let sha256 = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, inside.unwrap_or_default().0.as_bytes());
            format!("'sha256-{}'", base64::engine::general_purpose::STANDARD.encode(sha256))
        };
        format!(
            "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'",
            digest("script"),
            digest("style")
        )
    });
    &POLICY
}

/// A form in which a graph is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// [`json`].
    Json,
    /// [`dot`].
    Dot,
    /// [`mermaid`].
    Mermaid,
    /// [`table`].
    Table,
    /// A page that draws it live.
    Html,
}

/// No form of a graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no form of the graph: json, dot, mermaid, table or html")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;
    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "json" => Ok(Self::Json),
            "dot" => Ok(Self::Dot),
            "mermaid" => Ok(Self::Mermaid),
            "table" | "text" => Ok(Self::Table),
            "html" => Ok(Self::Html),
            other => Err(UnknownFormat(other.chars().filter(|c| !c.is_control()).take(40).collect())),
        }
    }
}

impl Format {
    /// What a request asks for: `?format=` (or `?o=`) decides, then whether it accepts HTML. JSON otherwise.
    pub fn of_request(query: Option<&str>, accept: Option<&str>) -> Result<Self, UnknownFormat> {
        let asked = query.unwrap_or("").split('&').find_map(|p| p.strip_prefix("format=").or(p.strip_prefix("o=")));
        match asked {
            Some(format) => format.parse(),
            None if accept.is_some_and(|a| a.contains("text/html")) => Ok(Self::Html),
            None => Ok(Self::Json),
        }
    }

    /// The media type of this form.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Html => "text/html; charset=utf-8",
            Self::Dot | Self::Mermaid | Self::Table => "text/plain; charset=utf-8",
        }
    }
}

/// The graph in that form. The page does not hold the graph; it asks for it.
pub fn body(format: Format, graph: &Graph) -> String {
    match format {
        Format::Json => json(graph),
        Format::Dot => dot(graph),
        Format::Mermaid => mermaid(graph),
        Format::Table => table(graph, 160),
        Format::Html => PAGE.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_gets_the_page_and_everybody_else_json() {
        let browser = Some("text/html,application/xhtml+xml,*/*;q=0.8");
        assert_eq!(Format::of_request(None, browser), Ok(Format::Html));
        assert_eq!(Format::of_request(None, Some("*/*")), Ok(Format::Json));
        assert_eq!(Format::of_request(Some("format=dot"), browser), Ok(Format::Dot));
        assert!(Format::of_request(Some("format=svg"), None).is_err());
    }

    /// Without it browsers ask for `/favicon.ico`.
    const ICON: &str = "<link rel=\"icon\" href=\"data:,\">";

    #[test]
    fn the_page_loads_nothing_and_writes_no_html() {
        for loads in ["http://", "https://", "src=", "<link", "@import", "url("] {
            assert!(
                !PAGE.replace("http://www.w3.org/2000/svg", "").replace(ICON, "").contains(loads),
                "the page has `{loads}`"
            );
        }
        for writes in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!PAGE.contains(writes), "the page uses `{writes}`");
        }
    }
}
