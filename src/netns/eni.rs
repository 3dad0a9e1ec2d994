//! The node's side of ENIs.
//!
//! Purpose: makes a shared ENI's device carry its pods (address, own routing
//! table, receive queues over cores) and takes that away again before a detach.
//! Owner: the wiring thread that serves the request. Node-wide settings are
//! written here, once, never while a pod is wired.

use std::net::IpAddr;

use super::desk::{Desk, eni_fault, remedy};
use super::message::{self, Devices};
use super::names::eni_table;
use super::nl::NlError;
use super::objects::{Dev, Key, LinkKind, MAIN, Setting, Side, State, Value};
use super::plan::{self, Op};
use super::read::{self, Device};
use super::{PreparedEni, WireError, queues, site};
use crate::model::EniRef;
use crate::sys::sysctl;

impl Desk {
    /// `DeviceMissing` when the device is not here yet.
    pub(super) fn prepare(&mut self, eni: &EniRef, shared_eni: bool) -> Result<PreparedEni, WireError> {
        let shared = self.shared.clone();
        let _held = shared.locks.hold(format!("eni {}", eni.id));
        let fault = |e: NlError| eni_fault(eni, &e.what, remedy(&e));
        let Some(device) = self.find_eni(eni.mac).map_err(fault)? else {
            return Err(WireError::DeviceMissing(eni.id.clone()));
        };
        let mut receive = Vec::new();
        let mut mtu = device.mtu;
        if shared_eni {
            let dual = eni.subnet.cidr6.is_some();
            self.forwarding(dual).map_err(fault)?;
            self.apply_eni(eni, &device, dual).map_err(fault)?;
            shared.programs.eni_up(device.index).map_err(|e| eni_fault(eni, "program", e))?;
            if shared.config.spread_receive.applies(queues::cores(&shared.config.sysfs)) {
                receive = queues::spread(&shared.config.sysfs, &device.name);
            }
            mtu = shared.config.mtu.unwrap_or(mtu);
        }
        let rx_queues = queues::count(&shared.config.sysfs, &device.name).unwrap_or(device.rx_queues);
        Ok(PreparedEni { ifname: device.name, ifindex: device.index, rx_queues, mtu, receive_cores: receive })
    }

    pub(super) fn forget(&mut self, eni: &EniRef) -> Result<(), WireError> {
        let shared = self.shared.clone();
        let _held = shared.locks.hold(format!("eni {}", eni.id));
        let table = eni_table(shared.config.table_base, eni.primary4);
        let mut causes: Vec<String> = Vec::new();
        let device = match self.find_eni(eni.mac) {
            Ok(device) => device,
            Err(e) => return Err(eni_fault(eni, &e.what, remedy(&e))),
        };
        let mut devices = Devices::default();
        let mut remove = Vec::new();
        match read::rules(&mut self.nl) {
            Err(e) => causes.push(e.to_string()),
            Ok(rules) => {
                for r in rules.into_iter().filter(|r| r.table == table) {
                    message::delete(&Key::Rule(r.priority, r.selector), &Value::Rule(table), &devices, &mut remove);
                }
            }
        }
        // Whatever device they name: the ENI's may be gone already.
        for p in read::routes(&mut self.nl, table, None).unwrap_or_default().into_iter().filter(|p| p.ours) {
            devices.set(Dev::Eni, p.index, "ENI");
            let value = Value::Route { dev: Dev::Eni, via: p.via, source: p.source };
            message::delete(&Key::Route(Side::Node, table, p.to), &value, &devices, &mut remove);
        }
        if let Some(device) = device {
            devices.set(Dev::Eni, device.index, &device.name);
            causes.extend(shared.programs.eni_gone(device.index).err());
            match self.is_primary(eni, &device) {
                Err(e) => causes.push(e.to_string()),
                // The node's own device: only our table was ours.
                Ok(true) => {}
                Ok(false) => {
                    for a in read::addresses(&mut self.nl, device.index).unwrap_or_default() {
                        message::delete(&Key::Address(Dev::Eni, a.net), &Value::Address, &devices, &mut remove);
                    }
                    remove.push(message::link_down(&device.name, device.index));
                }
            }
        }
        match self.nl.batch(remove) {
            Err(e) => causes.push(e.to_string()),
            Ok(answers) => causes.extend(answers.into_iter().filter_map(Result::err).map(|e| e.to_string())),
        }
        if causes.is_empty() { Ok(()) } else { Err(eni_fault(eni, "forget", causes.join("; "))) }
    }

    /// Turn the node into a router, keeping what its OS learns from routers.
    fn forwarding(&mut self, dual: bool) -> Result<(), NlError> {
        let set = |path: &str, value: &str| {
            sysctl::set_net(path, value).map_err(|e| NlError::io(format!("sysctl net.{path}={value}"), &e))
        };
        set("ipv4/ip_forward", "1")?;
        if !dual {
            return Ok(());
        }
        let now = sysctl::get_net("ipv6/conf/all/forwarding").map_err(|e| NlError::io("sysctl", &e))?;
        if now.as_deref() == Some("1") {
            return Ok(());
        }
        // A router ignores advertisements unless accept_ra is 2; the node's own
        // default route may come from one.
        let learnt = read::routes(&mut self.nl, MAIN, None)?;
        for p in learnt.iter().filter(|p| p.protocol == netlink_packet_route::route::RouteProtocol::Ra) {
            let answers = self.nl.all(vec![message::get_link_by_index(p.index, super::nl::GONE)])?;
            if let Some(d) = answers.first().and_then(|a| read::first_device(a)) {
                set(&Setting::AcceptRa.path(&d.name), "2")?;
            }
        }
        set("ipv6/conf/all/forwarding", "1")?;
        Ok(())
    }

    fn apply_eni(&mut self, eni: &EniRef, device: &Device, dual: bool) -> Result<(), NlError> {
        let config = &self.shared.clone().config;
        let primary = self.is_primary(eni, device)?;
        let node4 = self.node4(eni)?;
        let desired = plan::desired_eni(config, eni, primary, dual, node4);
        let mut devices = Devices::default();
        devices.set(Dev::Eni, device.index, &device.name);
        let actual = self.read_eni(eni, device, &devices, &desired)?;
        let ops = plan::diff(&desired, &actual).map_err(|e| NlError {
            what: "link".to_owned(),
            errno: 0,
            cause: e.to_string(),
        })?;
        // What must be set before the link comes up.
        for op in &ops {
            if let Op::Put(Key::Setting(dev, setting), Value::Setting(value)) = op {
                let path = setting.path(devices.name(*dev));
                if let Err(e) = sysctl::set_net(&path, &value.to_string())
                    && !(e.kind() == std::io::ErrorKind::NotFound && *setting == Setting::AcceptRa)
                {
                    return Err(NlError::io(format!("sysctl {path}={value}"), &e));
                }
            }
        }
        let mut requests = Vec::new();
        for op in &ops {
            match op {
                Op::Put(key, value) => message::put(key, value, &devices, &mut requests),
                Op::Delete(key, value) => message::delete(key, value, &devices, &mut requests),
            }
        }
        self.nl.all(requests)?;
        Ok(())
    }

    fn read_eni(
        &mut self,
        eni: &EniRef,
        device: &Device,
        devices: &Devices,
        desired: &State,
    ) -> Result<State, NlError> {
        let mut state = State::new();
        state.insert(Key::Link(Dev::Eni), Value::Link(site::link(device, LinkKind::Given)));
        for key in desired.keys() {
            if let Key::Setting(_, setting) = key {
                let value = sysctl::get_net(&setting.path(&device.name)).ok().flatten();
                if let Some(value) = value.and_then(|v| v.parse().ok()) {
                    state.insert(key.clone(), Value::Setting(value));
                }
            }
        }
        for a in read::addresses(&mut self.nl, device.index)? {
            let key = Key::Address(Dev::Eni, a.net);
            if desired.contains_key(&key) {
                state.insert(key, Value::Address);
            }
        }
        let table = eni_table(self.shared.config.table_base, eni.primary4);
        for p in read::routes(&mut self.nl, table, None)?.into_iter().filter(|p| p.ours) {
            let dev = devices.role(Side::Node, p.index).unwrap_or(Dev::HostLink);
            let value = Value::Route { dev, via: p.via, source: p.source };
            state.insert(Key::Route(Side::Node, table, p.to), value);
        }
        Ok(state)
    }

    /// Tells the programs which addresses are the node's own, and which device
    /// carries what the node itself sends.
    pub(super) fn tell_addresses(&mut self) -> Result<(), NlError> {
        let addresses = read::all_addresses(&mut self.nl)?;
        let uplink = self.uplink()?;
        let programs = &self.shared.programs;
        let told = programs.node_addresses(&addresses);
        let told = told.and_then(|()| programs.uplink(uplink.as_ref().map(|(index, own)| (*index, own.as_slice()))));
        told.map_err(|cause| NlError { what: "the node's addresses".to_owned(), errno: 0, cause })
    }

    /// The device of the default route, IPv4's if there is one, with its global
    /// addresses; the one that the node prefers for its source goes first.
    fn uplink(&mut self) -> Result<Option<(u32, Vec<IpAddr>)>, NlError> {
        let routes = read::routes(&mut self.nl, MAIN, None)?;
        let mut ways: Vec<_> = routes.iter().filter(|p| p.to.prefix_len() == 0 && p.index != 0 && !p.ours).collect();
        ways.sort_by_key(|p| p.to.addr().is_ipv6());
        let Some(first) = ways.first() else { return Ok(None) };
        let found = read::addresses(&mut self.nl, first.index)?;
        let mut own: Vec<IpAddr> = found.iter().filter(|a| a.global).map(|a| a.net.addr()).collect();
        let preferred: Vec<IpAddr> = ways.iter().filter(|p| p.index == first.index).filter_map(|p| p.source).collect();
        own.sort_by_key(|ip| !preferred.contains(ip));
        Ok(Some((first.index, own)))
    }

    /// The node's own address towards the VPC.
    fn node4(&mut self, eni: &EniRef) -> Result<Option<std::net::Ipv4Addr>, NlError> {
        let answers = self.nl.all(vec![message::route_lookup(eni.subnet.gateway4.into())])?;
        let source = answers.first().and_then(|a| read::first_path(a)).and_then(|p| p.source);
        Ok(source.and_then(|ip| if let IpAddr::V4(v4) = ip { Some(v4) } else { None }))
    }

    /// Whether the node's OS runs this device: it has the ENI's own address with
    /// a subnet around it, or carries the node's default route.
    fn is_primary(&mut self, eni: &EniRef, device: &Device) -> Result<bool, NlError> {
        let own = IpAddr::V4(eni.primary4);
        let by_os = |a: &read::Addr| a.net.addr() == own && a.net.prefix_len() != 32;
        if read::addresses(&mut self.nl, device.index)?.iter().any(by_os) {
            return Ok(true);
        }
        Ok(read::routes(&mut self.nl, MAIN, Some(device.index))?.iter().any(|p| p.to.prefix_len() == 0 && !p.ours))
    }
}
