//! Whether somebody may call: what the policies decide is carried out, counted and told here.

use std::time::{Duration, SystemTime};

use http::request;
use http::uri::Authority;
use sheetbend_control_plane_client::model::AppProtocol;

use super::{Caller, Inbound};
use crate::http::error::{Error, Refusal};
use crate::http::exchange::{Exchange, Noted};
use crate::policy::authz::{self, Asked, Decision, Denied};
use crate::telemetry::{AccessEntry, Counter, Flags, Reporter};

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
        let noted = self.note(&decision);
        let verdict = listed.and(decision.verdict);
        if let Some(noted) = noted {
            self.log(&noted, caller, verdict.as_ref().copied());
        }
        verdict.inspect_err(|why| self.refuse(caller, why))
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

    /// Whether a request may, which names `authority`. `exchange` hears what is noted of it.
    pub(super) fn admit(
        &self,
        caller: &Caller,
        head: &request::Parts,
        authority: &Authority,
        exchange: &mut Exchange,
    ) -> Result<(), Error> {
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
        exchange.noted = self.note(&decision);
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

    /// Counts what is audited and what would have happened, and gives what the access log says of it: of each, since whoever
    /// audits wants all of them.
    fn note(&self, decision: &Decision<'_>) -> Option<Box<Noted>> {
        let telemetry = &self.shared.telemetry;
        if decision.audit.is_some() {
            telemetry.count(Counter::AccessAudited);
        }
        if let Some(would) = &decision.dry_run {
            telemetry.count(if would.is_ok() { Counter::DryRunAllowed } else { Counter::DryRunDenied });
        }
        let differs = decision.dry_run.as_ref().filter(|would| would.is_ok() != decision.verdict.is_ok());
        if decision.audit.is_none() && differs.is_none() {
            return None;
        }
        let dry_run = differs.map(|would| match would {
            Ok(()) => "allowed".into(),
            Err(why) => why.to_string().into(),
        });
        Some(Box::new(Noted { audit: decision.audit.cloned(), dry_run }))
    }

    /// The line of a connection of which something is noted, as it begins.
    fn log(&self, noted: &Noted, caller: &Caller, verdict: Result<(), &Denied>) {
        let app = self.port.app.load_full();
        let detail = verdict.err().map(ToString::to_string).unwrap_or_default();
        self.shared.telemetry.access_log().write(&AccessEntry {
            start: SystemTime::now(),
            reporter: Reporter::Destination,
            method: "",
            path: "",
            authority: "",
            protocol: "TCP",
            status: 0,
            grpc_status: None,
            flags: if verdict.is_ok() { Flags::NONE } else { Flags::DENIED },
            detail: &detail,
            duration: Duration::ZERO,
            upstream_duration: None,
            request_bytes: 0,
            response_bytes: 0,
            upstream: app.socket_address(),
            downstream: Some(caller.peer),
            destination: &self.port.name,
            source_identity: caller.id.as_ref().map_or("", |id| id.as_str()),
            destination_identity: "",
            request_id: "",
            attempts: 1,
            audit: noted.audit.as_deref().unwrap_or_default(),
            dry_run: noted.dry_run.as_deref().unwrap_or_default(),
        });
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
