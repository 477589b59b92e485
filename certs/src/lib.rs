//! Identities and certificates of a mesh.
//!
//! Who a workload is: a [`SpiffeId`]. What proves it: an [`Identity`], signed by a [`Ca`]. Who believes it: whoever has
//! the CA's root in a [`TrustBundle`]. What a proxy holds of all that, ready for use and swapped whole at each rotation:
//! the [`Material`] of an [`IdentityStore`]. Who the other side of a connection is: [`verify_peer`], after every
//! handshake.
//!
//! Start reading at `spiffe.rs`, then `verify.rs` (the rules), `tls.rs` (the rules inside rustls) and `ca.rs`. Nothing
//! here opens a socket, and time comes in as an argument wherever a decision hangs on it.

mod bundle;
mod ca;
mod csr;
mod facts;
pub mod files;
mod identity;
mod pem;
mod renewal;
mod spiffe;
mod store;
mod tls;
mod verify;

pub use bundle::{BundleError, Root, TrustBundle};
pub use ca::{BACKDATE, Ca, CaError, DEFAULT_TTL, IssueRequest, Issued, control_plane_file, describe_root};
pub use csr::{Csr, CsrError};
pub use facts::{CertFacts, Sha256, format_span, format_time};
pub use identity::{Identity, IdentityError, KeyAndCsr};
pub use pem::{decode_certificates, encode_certificates};
pub use renewal::{Alarm, renew_at};
pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
pub use store::{IdentityStore, InstallError, Material};
pub use tls::{
    ALPN_H2, ALPN_HTTP1, MeshAlpn, control_plane_client, control_plane_server, first_trust_client, provider,
};
pub use verify::{PeerError, RENEWAL_GRACE, Renewing, VerifiedPeer, verify_peer, verify_peer_for_renewal};
