//! Services and EndpointSlices as the API server says them, on the way that
//! ClusterWatch takes: read, converted, put into the index.

use std::net::Ipv4Addr;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::fleet::{Fleet, NAMESPACE, PORT_NAME, SERVICE_PORT, name, vip};
use crate::service::convert::{self, Names};
use crate::service::index::{Index, Kind};

/// A Service with these protocols of its one port.
pub fn service(index: usize, protocols: &[&str]) -> Value {
    let ports: Vec<Value> = protocols
        .iter()
        .map(|protocol| json!({ "name": PORT_NAME, "port": SERVICE_PORT, "protocol": protocol.to_uppercase() }))
        .collect();
    let ip = vip(index);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": NAMESPACE, "name": name(index) },
        "spec": { "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": ports },
    })
}

/// Its endpoints, on `node`.
pub fn slice(index: usize, protocols: &[&str], endpoints: &[Ipv4Addr], port: u16, node: &str) -> Value {
    let ports: Vec<Value> = protocols
        .iter()
        .map(|protocol| json!({ "name": PORT_NAME, "port": port, "protocol": protocol.to_uppercase() }))
        .collect();
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|ip| {
            let conditions = json!({ "ready": true, "serving": true, "terminating": false });
            json!({ "addresses": [ip], "conditions": conditions, "nodeName": node })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {
            "namespace": NAMESPACE,
            "name": format!("{}-a", name(index)),
            "labels": { "kubernetes.io/service-name": name(index) },
        },
        "endpoints": endpoints,
        "ports": ports,
    })
}

/// What ClusterWatch does with what it is told.
#[derive(Default)]
pub struct Feed {
    pub index: Index,
    names: Names,
}

impl Feed {
    pub fn begin(&self) {
        self.index.list_begins(Kind::Services);
        self.index.list_begins(Kind::Slices);
    }

    pub fn end(&self) {
        self.index.list_ends(Kind::Services);
        self.index.list_ends(Kind::Slices);
    }

    pub fn service(&mut self, object: Value) -> anyhow::Result<()> {
        let object: Service = serde_json::from_value(object)?;
        let name = convert::name(&object.metadata, &mut self.names).context("a Service without a name")?;
        let service = convert::service(object, &mut self.names).map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
        self.index.service(name, service);
        Ok(())
    }

    pub fn slice(&mut self, object: Value) -> anyhow::Result<()> {
        self.typed_slice(serde_json::from_value(object)?)
    }

    pub fn typed_slice(&mut self, object: EndpointSlice) -> anyhow::Result<()> {
        let name = convert::name(&object.metadata, &mut self.names).context("a slice without a name")?;
        let of = convert::slice_owner(&object.metadata, &mut self.names).context("a slice of no Service")?;
        let slice = convert::slice(object, &mut self.names).map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
        self.index.slice(name, slice.map(|slice| (of, slice)));
        Ok(())
    }

    /// A list of exactly this fleet.
    pub fn list(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        self.begin();
        let mut ports = fleet.ports().peekable();
        while let Some(port) = ports.next() {
            let mut protocols = vec![port.protocol];
            while let Some(more) = ports.next_if(|next| next.index == port.index) {
                protocols.push(more.protocol);
            }
            self.service(service(port.index, &protocols))?;
            self.slice(slice(port.index, &protocols, &port.endpoints, port.endpoint_port, "elsewhere"))?;
        }
        self.end();
        Ok(())
    }
}
