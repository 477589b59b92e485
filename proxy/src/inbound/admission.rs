//! Whether somebody may call: what the policies decide is carried out, counted and told here.

use std::time::SystemTime;

use http::request;
use http::uri::Authority;
use sheetbend_control_plane_client::model::AppProtocol;

use super::{Caller, Inbound};
use crate::http::error::{Error, Refusal};
use crate::policy::authz::{self, Asked, Decision, Denied};
use crate::telemetry::Counter;

impl Caller {
    fn shown(&self, port: u16) -> authz::Caller<'_> {
        authz::Caller { id: self.id.as_ref(), address: self.peer.ip().to_canonical(), port }
    }

    fn name(&self) -> &str {
        self.id.as_ref().map_or("nobody", |id| id.as_str())
    }
}

impl Inbound {
    /// Whether a connection may pass to the app, of which nothing is read. Neither counted nor told.
    pub(super) fn may_connect(&self, caller: &Caller) -> Result<(), Denied> {
        self.lists(caller)?;
        self.shared.inbound_rules.load().authz.connection(&caller.shown(self.port.port)).verdict
    }

    /// The same for a connection that is about to pass.
    pub(super) fn admit_connection(&self, caller: &Caller) -> Result<(), Denied> {
        let listed = self.lists(caller);
        let rules = self.shared.inbound_rules.load();
        let decision = rules.authz.connection(&caller.shown(self.port.port));
        self.tell(&decision, caller, "");
        listed.and(decision.verdict).inspect_err(|why| self.refuse(caller, why))
    }

    /// Whether somebody said that the app speaks HTTP.
    pub(super) fn speaks_http(&self) -> bool {
        matches!(self.port.protocol, AppProtocol::Http | AppProtocol::Http2 | AppProtocol::Grpc)
    }

    /// Whether nothing but requests may pass to the app. A server takes more for a request than a proxy dares to (RFC 9112
    /// §2.2 and §3 let it be lenient), and what is read in requests alone would not be read in those.
    fn must_be_read(&self) -> bool {
        match self.port.protocol {
            AppProtocol::Http | AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Tcp | AppProtocol::Tls => false,
            AppProtocol::Detect => {
                let rules = self.shared.inbound_rules.load();
                !rules.tokens.is_empty() || !rules.admission.is_open()
            }
        }
    }

    /// Whether bytes may pass that are no request.
    pub(super) fn admit_bytes(&self, caller: &Caller) -> Result<(), ()> {
        if !self.must_be_read() {
            return Ok(());
        }
        if let Some(left_out) = self.shared.telemetry.refused(Counter::RefusedOpaque) {
            let (id, port, protocol) = (caller.name(), self.port.port, self.port.protocol);
            tracing::warn!(peer = %caller.peer, id, port, ?protocol, left_out, "a connection without a request is refused");
        }
        Err(())
    }

    /// Whether a request may, which names `authority`.
    pub(super) fn admit(&self, caller: &Caller, head: &request::Parts, authority: &Authority) -> Result<(), Error> {
        self.lists(caller).map_err(Error::Denied)?;
        let rules = self.shared.inbound_rules.load();
        let claims = rules.tokens.claims(&head.headers, SystemTime::now()).map_err(Error::Token)?;
        let asked = Asked {
            method: &head.method,
            authority: authority.as_str(),
            path: head.uri.path(),
            headers: &head.headers,
            claims: claims.as_ref(),
        };
        let decision = rules.authz.request(&caller.shown(self.port.port), &asked);
        let decision = decision.map_err(|why| Error::Refused(Refusal::Ambiguous(why)))?;
        self.tell(&decision, caller, asked.path);
        decision.verdict.map_err(Error::Denied)
    }

    /// Whether the proxy's own list has a caller, where there is one.
    fn lists(&self, caller: &Caller) -> Result<(), Denied> {
        let allow = &self.shared.allow;
        match allow.is_empty() || caller.id.as_ref().is_some_and(|id| allow.contains(id)) {
            true => Ok(()),
            false => Err(Denied::NotListed),
        }
    }

    /// What is audited, and what would have happened.
    fn tell(&self, decision: &Decision<'_>, caller: &Caller, path: &str) {
        let (telemetry, caller) = (&self.shared.telemetry, caller.name());
        if let Some(rule) = decision.audit {
            telemetry.count(Counter::AccessAudited);
            if let Some(left_out) = telemetry.sparingly("audit") {
                let allowed = decision.verdict.is_ok();
                tracing::info!(%rule, caller, path, port = self.port.port, allowed, left_out, "a call is audited");
            }
        }
        let Some(would) = &decision.dry_run else { return };
        telemetry.count(if would.is_ok() { Counter::DryRunAllowed } else { Counter::DryRunDenied });
        if would.is_ok() == decision.verdict.is_ok() {
            return;
        }
        if let Some(left_out) = telemetry.sparingly("dry run") {
            let port = self.port.port;
            match would {
                Ok(()) => tracing::info!(caller, path, port, left_out, "dry run: this call would be allowed"),
                Err(why) => tracing::info!(%why, caller, path, port, left_out, "dry run: this call would be denied"),
            }
        }
    }

    /// Counts and tells a connection that may not pass.
    fn refuse(&self, caller: &Caller, why: &Denied) {
        if let Some(left_out) = self.shared.telemetry.refused(why.counter()) {
            let (id, port) = (caller.name(), self.port.port);
            tracing::warn!(peer = %caller.peer, id, port, %why, left_out, "a connection is refused");
        }
    }
}

impl Denied {
    /// What counts it.
    pub(crate) fn counter(&self) -> Counter {
        match self {
            Self::NotListed => Counter::RefusedNotAllowed,
            Self::Default(_) | Self::By(_) | Self::ByNone(_) => Counter::RefusedAuthorization,
        }
    }
}
