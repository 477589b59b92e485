//! HTTP as hyper speaks it, and what a proxy adds: bodies that report, headers that end here, errors that explain.

pub mod body;
pub mod deadline;
pub mod error;
pub mod exchange;
pub mod expect;
mod head_clock;
pub mod headers;
pub mod idle;
pub mod known;
pub mod serve;
pub mod story;
mod turns;
pub mod upgrade;
