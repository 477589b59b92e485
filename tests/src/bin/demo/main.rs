//! A small shop on loopback.
fn main() {}
