//! This proxy's part of the service graph: what its edges' counters gained since they were looked at last.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use sheetbend_control_plane_client::graph::buckets;
use sheetbend_control_plane_client::proto::v1::{self, BucketCount, EdgeDelta};

use super::edge::{Edge, EdgeKey, Peer, Reporter};

/// How far somebody has read each edge's counters.
#[derive(Default)]
pub(super) struct Cursors(HashMap<EdgeKey, Cursor>);

struct Cursor {
    counts: [u64; 6],
    latency: Box<[u64; buckets::COUNT]>,
}

impl Cursors {
    /// What every edge gained; edges that gained nothing are left out.
    pub(super) fn advance<'a>(&mut self, edges: impl IntoIterator<Item = &'a Arc<Edge>>) -> Vec<EdgeDelta> {
        edges.into_iter().filter_map(|edge| self.advance_one(edge)).collect()
    }

    fn advance_one(&mut self, edge: &Edge) -> Option<EdgeDelta> {
        let totals = &edge.totals;
        let counts = [
            &totals.requests,
            &totals.errors,
            &totals.bytes_sent,
            &totals.bytes_received,
            &totals.connections_opened,
            &totals.connections_closed,
        ]
        .map(|count| count.load(Relaxed));
        let new = || Cursor { counts: [0; 6], latency: Box::new([0; buckets::COUNT]) };
        if !self.0.contains_key(&edge.key) {
            self.0.insert(edge.key.clone(), new());
        }
        let cursor = self.0.get_mut(&edge.key)?;
        if cursor.counts == counts {
            return None;
        }
        let mut gained = counts;
        for (gained, before) in gained.iter_mut().zip(std::mem::replace(&mut cursor.counts, counts)) {
            *gained = gained.wrapping_sub(before);
        }
        let [requests, errors, bytes_sent, bytes_received, connections_opened, connections_closed] = gained;
        let mut latency = Vec::new();
        for (bucket, (count, before)) in totals.latency.iter().zip(cursor.latency.iter_mut()).enumerate() {
            let count = count.load(Relaxed);
            let gained = count.wrapping_sub(std::mem::replace(before, count));
            if gained > 0 {
                latency.push(BucketCount { bucket: bucket as u32, count: gained });
            }
        }
        let peer = match &edge.key.peer {
            Peer::Known(id) => id.as_str().to_string(),
            Peer::Unknown => String::new(),
        };
        let (reporter, source, destination_principal) = match edge.key.reporter {
            Reporter::Source => (v1::Reporter::Source, String::new(), peer),
            Reporter::Destination => (v1::Reporter::Destination, peer, String::new()),
        };
        Some(EdgeDelta {
            reporter: reporter.into(),
            source,
            destination: edge.key.destination.to_string(),
            destination_principal,
            protocol: edge.key.protocol.as_str().to_string(),
            mtls: edge.key.mtls,
            requests,
            errors,
            bytes_sent,
            bytes_received,
            connections_opened,
            connections_closed,
            latency,
        })
    }
}
