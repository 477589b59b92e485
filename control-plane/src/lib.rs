//! What answers a Sheetbend proxy - certificates, discovery, graph.
