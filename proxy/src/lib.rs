//! The Sheetbend data plane.

pub mod admin;
pub mod client_hello;
pub mod detect;
pub mod first_bytes;
pub mod http;
pub mod listen;
pub mod proc_net;
pub mod rewind;
pub mod tcp;
pub mod telemetry;
pub mod traffic;
pub mod upstream;
