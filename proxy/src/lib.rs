//! The Sheetbend data plane.

pub mod admin;
pub mod app;
pub mod client_hello;
pub mod detect;
pub mod first_bytes;
mod forward;
mod here;
pub mod http;
mod inbound;
pub mod listen;
mod outbound;
pub mod policy;
pub mod proc_net;
pub mod rewind;
pub mod route;
mod sock_diag;
pub mod tcp;
pub mod telemetry;
pub mod traffic;
pub mod upstream;
