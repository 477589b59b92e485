//! The certificate service: a public key in, a certificate for the name that the caller has proven out.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sheetbend_certs::{Ca, CaError, Csr, DEFAULT_TTL, IssueRequest, SpiffeId, encode_certificates, format_time};
use sheetbend_control_plane_client::proto::ca::istio_certificate_service_server::IstioCertificateService;
use sheetbend_control_plane_client::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};

use crate::ledger::{Ledger, SpendError};
use crate::listen::{Peer, Who};
use crate::token::{TokenError, TokenKey};

/// Below that a certificate would be due for renewal before it is used.
const SHORTEST: Duration = Duration::from_secs(5);

/// Signs for whoever proves a name.
#[derive(Clone)]
pub(crate) struct CaService {
    pub(crate) ca: Arc<Ca>,
    pub(crate) tokens: Arc<TokenKey>,
    pub(crate) ledger: Arc<Ledger>,
}

/// Why nothing was signed.
enum Refused {
    /// The caller's doing.
    Caller(Status),
    /// Ours: the disk, the CA.
    Ours(String),
}

impl CaService {
    /// Who asks. A token that was sent counts, and a bad one is an error even beside a good certificate.
    fn prove(&self, peer: &Peer, token: Option<&str>, csr: &Csr, now: SystemTime) -> Result<SpiffeId, Refused> {
        let Some(token) = token else { return by_certificate(peer) };
        let open = self.tokens.open(token, now).map_err(|error| Refused::Caller(token_refused(&error)))?;
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match self.ledger.spend(&open, &csr.key_sha256().to_string(), seconds) {
            Ok(()) => Ok(open.id),
            Err(SpendError::Token(error)) => Err(Refused::Caller(token_refused(&error))),
            Err(SpendError::State(error)) => Err(Refused::Ours(error.to_string())),
        }
    }

    /// Blocks for a signature and two small writes.
    fn sign(
        &self,
        peer: &Peer,
        token: Option<&str>,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let now = SystemTime::now();
        // Before the key is looked at: checking a signature costs more than refusing a stranger.
        match (token, &peer.who) {
            (Some(token), _) => drop(self.tokens.open(token, now).map_err(|e| Refused::Caller(token_refused(&e)))?),
            (None, Who::Stranger) => return Err(Refused::Caller(nobody())),
            _ => {}
        }
        let csr = Csr::parse(request.csr.as_bytes())
            .map_err(|error| Refused::Caller(Status::invalid_argument(error.to_string())))?;
        let id = self.prove(peer, token, &csr, now)?;
        let ttl = match u64::try_from(request.validity_duration) {
            Ok(0) | Err(_) => DEFAULT_TTL,
            Ok(seconds) => Duration::from_secs(seconds).clamp(SHORTEST, DEFAULT_TTL),
        };
        let issued =
            self.ca.issue(&IssueRequest { ttl, ..IssueRequest::new(id.clone(), csr) }, now).map_err(ca_refused)?;
        tracing::info!(%id, serial = %issued.serial, until = %format_time(issued.not_after), "signed a certificate");
        let mut chain: Vec<String> = issued.chain.iter().map(|der| encode_certificates([der])).collect();
        chain.push(issued.bundle.to_pem());
        Ok(chain)
    }
}

fn by_certificate(peer: &Peer) -> Result<SpiffeId, Refused> {
    match &peer.who {
        Who::Workload(shown) => Ok(shown.leaf.id.clone()),
        Who::Expired { id, since } => {
            tracing::warn!(%id, since = %format_time(*since), "renewing with a certificate that has expired");
            Ok(id.clone())
        }
        Who::Stranger => Err(Refused::Caller(nobody())),
    }
}

fn nobody() -> Status {
    Status::unauthenticated(
        "nothing proves who asks: send a join token (`sheetbend token create` makes one), or connect with a certificate \
         of this mesh",
    )
}

fn token_refused(error: &TokenError) -> Status {
    Status::unauthenticated(error.to_string())
}

fn ca_refused(error: CaError) -> Refused {
    match error {
        CaError::Csr(error) => Refused::Caller(Status::invalid_argument(error.to_string())),
        CaError::OtherTrustDomain { .. } | CaError::TtlTooLong { .. } | CaError::Request(_) => {
            Refused::Caller(Status::failed_precondition(error.to_string()))
        }
        ours => Refused::Ours(ours.to_string()),
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer =
            request.extensions().get::<Peer>().cloned().ok_or_else(|| Status::internal("a request without a peer"))?;
        let token = bearer(&request)?;
        let (this, request, address) = (self.clone(), request.into_inner(), peer.address);
        let signed = tokio::task::spawn_blocking(move || this.sign(&peer, token.as_deref(), &request)).await;
        match signed.map_err(|error| Status::internal(error.to_string()))? {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(Refused::Caller(status)) => {
                tracing::info!(%address, reason = status.message(), "refused to sign");
                Err(status)
            }
            Err(Refused::Ours(reason)) => {
                tracing::error!(%address, %reason, "cannot sign");
                Err(Status::unavailable(format!("the control plane cannot sign now: {reason}")))
            }
        }
    }
}

fn bearer<T>(request: &Request<T>) -> Result<Option<String>, Status> {
    let Some(value) = request.metadata().get("authorization") else { return Ok(None) };
    let text = value.to_str().ok().and_then(|text| text.split_once(' '));
    match text {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(Some(token.trim().to_string())),
        _ => Err(Status::unauthenticated("the authorization header is not `Bearer TOKEN`")),
    }
}
