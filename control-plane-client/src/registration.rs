//! What a proxy says of itself on its discovery stream: where it is and which ports it serves.
//!
//! It travels as `sheetbend.io/registration` in the node's metadata. The service and the namespace are not in it:
//! those are what the stream's certificate says.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::Struct;
use serde::{Deserialize, Serialize};

use crate::model::{AppProtocol, Standing};
use crate::xds::DecodeError;
use crate::xds::metadata::{from_value, to_value};

/// The node metadata's key.
pub const KEY: &str = "sheetbend.io/registration";

/// More ports than one proxy can sensibly serve are a mistake or an attack.
pub const MAX_PORTS: usize = 256;

/// Where a proxy takes in traffic, and for which ports of its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The address under which the others reach this proxy.
    pub address: IpAddr,
    /// The ports served; none means withdrawn.
    pub ports: Vec<RegisteredPort>,
    /// Other addresses of the same proxy, such as a pod's of the other family. Who calls one of them means this proxy;
    /// nobody is led to them.
    #[serde(default)]
    pub also: Vec<IpAddr>,
    /// Its place among the instances of its service.
    #[serde(default)]
    pub standing: Standing,
}

/// More addresses than one proxy can sensibly have.
pub const MAX_ADDRESSES: usize = 16;

/// One port of the service, and the proxy's port that takes its traffic in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredPort {
    /// The service's port.
    pub port: u16,
    /// The port on which the proxy takes in what is meant for it.
    pub inbound: u16,
    /// What the app speaks there.
    #[serde(default)]
    pub protocol: AppProtocol,
}

impl Registration {
    /// The same address without a port: what a draining proxy says.
    pub fn withdrawn(&self) -> Self {
        Self { address: self.address, ports: Vec::new(), also: Vec::new(), standing: Standing::default() }
    }

    /// Reads the registration in a node's metadata. `None`: this node does not register anything.
    pub fn of_node(node: &Node) -> Result<Option<Self>, DecodeError> {
        let Some(value) = node.metadata.as_ref().and_then(|m| m.fields.get(KEY)) else { return Ok(None) };
        let registration: Self = from_value(value, "registration")?;
        registration.check()?;
        Ok(Some(registration))
    }

    /// Writes the registration into a node's metadata.
    pub fn put_into(&self, node: &mut Node) {
        let metadata = node.metadata.get_or_insert_with(Struct::default);
        metadata.fields.insert(KEY.to_string(), to_value(self));
    }

    fn check(&self) -> Result<(), DecodeError> {
        self.standing.check().map_err(|error| DecodeError::invalid("registration.standing", error))?;
        if self.ports.len() > MAX_PORTS {
            return Err(DecodeError::TooMany { what: "registered ports", count: self.ports.len(), most: MAX_PORTS });
        }
        if self.also.len() > MAX_ADDRESSES {
            return Err(DecodeError::TooMany { what: "addresses", count: self.also.len(), most: MAX_ADDRESSES });
        }
        if self.ports.iter().any(|p| p.port == 0 || p.inbound == 0) {
            return Err(DecodeError::invalid("registration.ports", "port 0 can not be reached"));
        }
        let mut ports: Vec<u16> = self.ports.iter().map(|p| p.port).collect();
        ports.sort_unstable();
        if let Some(twice) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(DecodeError::invalid("registration.ports", format!("port {} is there twice", twice[0])));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn protocols() -> impl Strategy<Value = AppProtocol> {
        use AppProtocol::*;
        prop::sample::select(vec![Detect, Http, Http2, Grpc, Tcp, Tls])
    }

    proptest! {
        #[test]
        fn a_registration_survives_the_wire(
            address in any::<IpAddr>(),
            also in prop::collection::vec(any::<IpAddr>(), 0..3),
            weight in 1..=Standing::MAX_WEIGHT,
            ports in prop::collection::btree_map(1..=u16::MAX, (1..=u16::MAX, protocols()), 0..5),
        ) {
            let ports = ports.into_iter().map(|(port, (inbound, protocol))| RegisteredPort { port, inbound, protocol });
            let standing = Standing { weight, priority: weight % 3, zone: "a".into() };
            let registration = Registration { address, ports: ports.collect(), also, standing };
            let mut node = Node::default();
            registration.put_into(&mut node);
            prop_assert_eq!(Registration::of_node(&node).unwrap(), Some(registration));
        }
    }

    #[test]
    fn a_node_without_a_registration_registers_nothing() {
        assert_eq!(Registration::of_node(&Node::default()), Ok(None));
    }

    #[test]
    fn a_port_named_twice_is_refused() {
        let port = RegisteredPort { port: 80, inbound: 15106, protocol: AppProtocol::Http };
        let standing = Standing::default();
        let registration =
            Registration { address: [127, 0, 0, 1].into(), ports: vec![port, port], also: Vec::new(), standing };
        let mut node = Node::default();
        registration.put_into(&mut node);
        let error = Registration::of_node(&node).unwrap_err();
        assert!(error.to_string().contains("port 80 is there twice"), "{error}");
    }
}
