//! The Sheetbend data plane.

pub mod proc_net;
