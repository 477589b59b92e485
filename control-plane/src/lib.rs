//! What answers a Sheetbend proxy: certificates, discovery, the merged graph.
//!
//! Nothing on a request's way waits for this. A proxy connects with mutual TLS, subscribes to what its app talks to,
//! and keeps what it knows when we are away.
//!
//! - [`Config`], [`ControlPlane`]: start one, ask where it listens, shut it down.
//! - [`LocalMesh`]: the mesh of one user on one machine, in which any process may turn out to be the control plane.
//! - [`check()`]: what is wrong with a folder of resources.
//! - [`token`]: join tokens.

#![deny(missing_docs)]

mod admin;
mod ads;
mod ca_service;
mod check;
mod config;
mod keep;
mod ledger;
mod listen;
mod local;
mod metrics;
mod own;
mod persist;
mod places;
mod registry;
mod report;
mod resources;
mod server;
mod state;
pub mod token;
mod trust;
mod world;

pub use check::{Checked, check};
pub use config::{Config, DEFAULT_ADMIN_PORT, DEFAULT_PORT, StartError};
pub use local::{Holding, LocalMesh, LocalMeshError};
pub use persist::StateError;
pub use resources::Problem;
pub use server::{ControlPlane, create_token};
pub use sheetbend_control_plane_client::local::{JoinError, Joined};
