//! The Sheetbend data plane.
