//! PURE: state and `now` in, a decision out.

pub mod balance;
pub mod breaker;
pub mod choice;
pub mod layers;
pub mod limit;
pub mod outlier;
pub mod rate;
pub mod retry;
pub mod shed;
pub mod window;
