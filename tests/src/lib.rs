//! Stories about Sheetbend told against real processes.
