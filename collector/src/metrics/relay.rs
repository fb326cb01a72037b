//! What relays do.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// See the module.
#[derive(Clone, Default)]
pub struct RelayMetrics {
    connections: Gauge,
    requests: Family<KindLabel, Counter>,
    received: Counter,
    sent: Counter,
}

/// Counts a connection for as long as it lives.
pub struct ConnectionGauge(Gauge);

impl Drop for ConnectionGauge {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl RelayMetrics {
    /// A connection begins.
    #[must_use]
    pub fn connection(&self) -> ConnectionGauge {
        self.connections.inc();
        ConnectionGauge(self.connections.clone())
    }
    /// A request was understood.
    pub fn request(&self, kind: &'static str) {
        self.requests.get_or_create(&KindLabel { kind }).inc();
    }
    /// So much of a body came.
    pub fn received(&self, bytes: u64) {
        self.received.inc_by(bytes);
    }
    /// So much of an object went out.
    pub fn sent(&self, bytes: u64) {
        self.sent.inc_by(bytes);
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("relay_connections", "Connections of relays now", self.connections.clone());
        registry.register("relay_requests", "Requests of relays, by their kind", self.requests.clone());
        registry.register("relay_received_bytes", "Bytes of objects that relays sent", self.received.clone());
        registry.register("relay_sent_bytes", "Bytes of objects sent to relays", self.sent.clone());
    }
}
