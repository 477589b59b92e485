//! Who may call, as it is written, made into what a proxy obeys.

use serde_saphyr::Spanned;
use sheetbend_control_plane_client::model::DefaultAccess;

use crate::resources::parse::{Checked, mistake};

/// `defaultInboundPolicy` of a MeshSettings.
pub(super) fn default_access(raw: Option<&Spanned<String>>) -> Checked<Option<DefaultAccess>> {
    let Some(raw) = raw else { return Ok(None) };
    match raw.value.as_str() {
        "Allow" => Ok(Some(DefaultAccess::Allow)),
        "MeshOnly" => Ok(Some(DefaultAccess::MeshOnly)),
        "Deny" => Ok(Some(DefaultAccess::Deny)),
        other => mistake(raw.referenced, format!("defaultInboundPolicy `{other}`"), "write Allow, MeshOnly or Deny"),
    }
}
