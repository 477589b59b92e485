//! Stories about Sheetbend, told against real processes.
//!
//! A story is a file of `tests/`: it starts the real binaries beside real programs, does what a user does and looks at
//! what a user sees. This library is what stories share.

mod app;
mod binaries;
mod cable;
mod graph;
pub mod http;
mod impostor;
mod load;
mod look;
mod mesh;
mod moody;
mod need;
mod netns;
pub mod planned;
mod pod;
mod process;
mod resources;
mod scripted;
mod slow;
pub mod tls;
mod wait;

pub use app::{AnyBody, App, full, long};
pub use binaries::{binary, workspace};
pub use cable::{Cable, assert_secret, shows};
pub use graph::{Edge, edges, read_edges};
pub use impostor::Impostor;
pub use load::{Good, Load, Tally};
pub use look::registered;
pub use mesh::{Mesh, Run, START, Sidecar};
pub use moody::{Mood, Moody, becomes, breaker};
pub use need::{envoy, leave_out, namespaces, print_left_out, program, python, root, tools};
pub use netns::{Host, two_hosts, two_pods};
pub use pod::{PYTHON, Pod, PodBuilder, lines_on, pods};
pub use process::{Finished, Process, finish, raise_file_limit};
pub use resources::service;
pub use scripted::{Line, Scripted, dialogue, hear};
pub use slow::Slow;
pub use wait::{eventually, free_port, loopback, until, until_accepts};
