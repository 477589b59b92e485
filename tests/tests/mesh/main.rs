//! What carries the requests: stories of wires, protocols, certificates, the graph and the command line.

mod certs_cli;
mod databases;
mod demo;
mod detect;
mod drain;
mod envoy_peer;
mod file_table;
mod graph_cli;
mod graph_page;
mod http2_semantics;
mod http_clients;
mod http_semantics;
mod limits;
mod local_mesh;
mod no_sidecar;
mod readme;
mod rotation;
mod run_mesh;
mod run_program;
mod versions;
mod wire;
mod xds_envoy;
mod xds_grpc;
