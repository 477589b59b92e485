//! One request for a certificate, and what is made of the answer.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Identity, KeyAndCsr, TrustBundle, decode_certificates};
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

use crate::channel::{ConnectError, Connector};
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::xds::shown;

/// From connecting to the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A certificate, as the control plane answered.
pub(super) struct Answer {
    pub(super) identity: Identity,
    pub(super) bundle: Arc<TrustBundle>,
    /// How far the control plane's clock is ahead of ours, in seconds; what is below the network's noise is 0.
    pub(super) clock_ahead: Option<i64>,
}

/// Why there is none.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum AskError {
    /// Nobody there, or not willing now. Asking again may help.
    #[error("{0}")]
    Away(String),
    /// The control plane said no, and will say so again.
    #[error("{0}")]
    Refused(String),
}

/// Asks for a certificate for `key`. `bearer` proves who asks, where the connection does not.
pub(super) async fn ask(
    connector: &Connector,
    bearer: Option<&str>,
    key: &KeyAndCsr,
    ttl: Duration,
) -> Result<Answer, AskError> {
    let late = || Err(AskError::Away(format!("{connector}: no answer within {} s", PATIENCE.as_secs())));
    tokio::time::timeout(PATIENCE, exchange(connector, bearer, key, ttl)).await.unwrap_or_else(|_| late())
}

async fn exchange(
    connector: &Connector,
    bearer: Option<&str>,
    key: &KeyAndCsr,
    ttl: Duration,
) -> Result<Answer, AskError> {
    let mut request = Request::new(IstioCertificateRequest {
        csr: key.csr_pem(),
        validity_duration: ttl.as_secs().try_into().unwrap_or(i64::MAX),
        metadata: None,
    });
    if let Some(token) = bearer {
        let value = MetadataValue::try_from(format!("Bearer {token}"));
        let mut value =
            value.map_err(|_| AskError::Refused("the token has characters that no token has".to_string()))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    let channel = connector.connect().await.map_err(|error| match error {
        ConnectError::Url { .. } => AskError::Refused(error.to_string()),
        _ => AskError::Away(error.to_string()),
    })?;
    let response = IstioCertificateServiceClient::new(channel).create_certificate(request).await.map_err(said)?;
    let answered = SystemTime::now();
    let clock_ahead = response.metadata().get("date").and_then(|date| clock_ahead(date.to_str().ok()?, answered));
    let (identity, bundle) = read(&response.into_inner().cert_chain, key).map_err(AskError::Away)?;
    Ok(Answer { identity, bundle: Arc::new(bundle), clock_ahead })
}

/// The leaf, its issuers, and last the roots.
fn read(parts: &[String], key: &KeyAndCsr) -> Result<(Identity, TrustBundle), String> {
    let wrong = |reason: String| format!("the control plane's answer is no certificate: {reason}");
    let [chain @ .., roots] = parts else { return Err(wrong("it is empty".to_string())) };
    if chain.is_empty() {
        return Err(wrong("it has a single part, and the last is the trust bundle".to_string()));
    }
    let chain = decode_certificates(&chain.concat()).map_err(wrong)?;
    let chain = sheetbend_certs::encode_certificates(&chain);
    let identity = Identity::from_pem(&chain, &key.key_pem()).map_err(|error| wrong(error.to_string()))?;
    let bundle = TrustBundle::from_pem(roots).map_err(|error| wrong(error.to_string()))?;
    Ok((identity, bundle))
}

fn said(status: Status) -> AskError {
    use tonic::Code::*;
    let text = shown(status.message(), 500);
    match status.code() {
        Unauthenticated | PermissionDenied | InvalidArgument | FailedPrecondition | Unimplemented | OutOfRange => {
            AskError::Refused(text)
        }
        code => AskError::Away(format!("{code}: {text}")),
    }
}

/// The `Date` header has whole seconds, and the answer took a while: up to 2 s are noise.
fn clock_ahead(date: &str, now: SystemTime) -> Option<i64> {
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp().as_second();
    let ours = jiff::Timestamp::try_from(now).ok()?.as_second();
    Some(theirs - ours).map(|ahead| if ahead.abs() <= 2 { 0 } else { ahead })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_measured_by_the_answers_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        assert_eq!(clock_ahead("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(0));
        assert_eq!(clock_ahead("Sun, 06 Nov 1994 09:49:37 GMT", now), Some(3600));
        assert_eq!(clock_ahead("Sun, 06 Nov 1994 08:48:37 GMT", now), Some(-60));
        assert_eq!(clock_ahead("yesterday", now), None);
    }
}
