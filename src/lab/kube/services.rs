//! Addresses and node ports of Services. Pure state: `prepare` fills a Service
//! in without taking anything, `commit` takes and gives back.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::error::Cause;
use super::object::{self, list, map_mut, text};
use super::validate::family;

/// Most addresses considered in one range.
const SPAN: u128 = 1 << 20;

struct Range {
    net: IpNet,
    size: u128,
    next: u128,
    used: HashSet<IpAddr>,
}

impl Range {
    fn new(net: IpNet) -> Self {
        let bits = net.max_prefix_len() - net.prefix_len();
        let size = if bits >= 20 { SPAN } else { 1_u128 << bits };
        // The lower part is left to addresses that people choose.
        let next = (size / 16).clamp(16, 256).min(size.saturating_sub(2));
        Self { net, size, next, used: HashSet::new() }
    }

    fn family(&self) -> &'static str {
        if self.net.addr().is_ipv4() { "IPv4" } else { "IPv6" }
    }

    fn address(&self, offset: u128) -> IpAddr {
        match self.net.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base).wrapping_add(offset as u32))),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base).wrapping_add(offset))),
        }
    }

    fn free(&mut self) -> Option<IpAddr> {
        // Neither the network's nor, in IPv4, the broadcast address.
        let last = self.size.saturating_sub(1);
        for _ in 0..self.size {
            let offset = self.next;
            self.next = if self.next + 1 >= last { 1 } else { self.next + 1 };
            let address = self.address(offset);
            if offset != 0 && !self.used.contains(&address) {
                return Some(address);
            }
        }
        None
    }
}

/// What is given out to Services.
pub struct Services {
    ranges: Vec<Range>,
    ports: RangeInclusive<u16>,
    next_port: u16,
    used_ports: HashMap<(u16, String), u32>,
}

fn cause(field: &str, message: String) -> Vec<Cause> {
    vec![Cause { field: field.to_owned(), reason: "FieldValueInvalid", message }]
}

impl Services {
    /// One range per family; the first is the primary family.
    pub fn new(ranges: &[IpNet], ports: RangeInclusive<u16>) -> Self {
        let next_port = *ports.start();
        Self { ranges: ranges.iter().copied().map(Range::new).collect(), ports, next_port, used_ports: HashMap::new() }
    }

    /// The address of the `kubernetes` Service: the first of the primary range.
    pub fn first(&self) -> Option<IpAddr> {
        self.ranges.first().map(|range| range.address(1))
    }

    fn range(&mut self, family: &str) -> Option<&mut Range> {
        self.ranges.iter_mut().find(|range| range.family() == family)
    }

    /// Fill in addresses and ports, keeping what `old` has.
    pub fn prepare(&mut self, old: Option<&Value>, new: &mut Value) -> Result<(), Vec<Cause>> {
        let kind = text(new, "/spec/type").to_owned();
        if kind == "ExternalName" {
            let spec = map_mut(new, &["spec"]);
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.remove(field);
            }
            return Ok(());
        }
        let old = old.filter(|old| text(old, "/spec/type") != "ExternalName");
        self.addresses(old, new)?;
        if kind == "NodePort" || (kind == "LoadBalancer" && object::flag(new, "/spec/allocateLoadBalancerNodePorts")) {
            self.node_ports(old, new)?;
        }
        if kind == "LoadBalancer"
            && text(new, "/spec/externalTrafficPolicy") == "Local"
            && object::int(new, "/spec/healthCheckNodePort").is_none_or(|p| p == 0)
        {
            let kept = old.and_then(|old| object::int(old, "/spec/healthCheckNodePort")).filter(|p| *p != 0);
            let port = match kept {
                Some(port) => port,
                None => i64::from(self.free_port("TCP", &HashSet::new())?),
            };
            object::set(new, &["spec", "healthCheckNodePort"], port);
        }
        Ok(())
    }

    fn addresses(&mut self, old: Option<&Value>, new: &mut Value) -> Result<(), Vec<Cause>> {
        let spec = map_mut(new, &["spec"]);
        if let Some(before) = old.and_then(|old| old.get("spec")) {
            keep(spec, before, "clusterIP");
            keep(spec, before, "ipFamilyPolicy");
        }
        let mut given: Vec<String> = spec
            .get("clusterIPs")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|ip| ip.as_str().map(str::to_owned))
            .collect();
        let first = spec.get("clusterIP").and_then(Value::as_str).unwrap_or("").to_owned();
        if !first.is_empty() {
            match given.first() {
                None => given.push(first),
                Some(have) if *have == first => {}
                // Only the old spelling was changed.
                Some(_)
                    if old.is_some_and(|o| {
                        list(o, "/spec/clusterIPs")
                            .iter()
                            .map(|v| v.as_str().unwrap_or(""))
                            .eq(given.iter().map(String::as_str))
                    }) =>
                {
                    given = vec![first];
                }
                Some(have) => {
                    let text = format!("Invalid value: [\"{have}\"]: first value must match `clusterIP`");
                    return Err(cause("spec.clusterIPs", text));
                }
            }
        }
        let headless = given.first().is_some_and(|ip| ip == "None");
        let selects = spec.get("selector").and_then(Value::as_object).is_some_and(|s| !s.is_empty());
        let dual = self.ranges.len() > 1;
        let named: Vec<String> = strings(spec.get("ipFamilies"));
        let both = (headless && !selects && dual) || named.len() > 1 || given.len() > 1;
        let default_policy = if both { "RequireDualStack" } else { "SingleStack" };
        object::default(spec, "ipFamilyPolicy", default_policy);
        let policy = spec.get("ipFamilyPolicy").and_then(Value::as_str).unwrap_or("").to_owned();
        let mut families = named;
        for ip in given.iter().filter(|_| !headless) {
            let Some(family) = family(ip) else {
                return Err(cause("spec.clusterIPs", format!("Invalid value: \"{ip}\": must be a valid IP address")));
            };
            if !families.iter().any(|f| f == family) {
                families.push(family.to_owned());
            }
        }
        let before = old.map(|old| strings(old.pointer("/spec/ipFamilies"))).unwrap_or_default();
        for family in before.iter().cloned().chain(self.ranges.iter().map(|r| r.family().to_owned())) {
            let enough = families.len() >= if policy == "SingleStack" { 1 } else { 2 };
            if !enough && !families.contains(&family) {
                families.push(family);
            }
        }
        if policy == "SingleStack" {
            families.truncate(1);
        }
        for family in &families {
            if self.range(family).is_none() {
                let text = format!("Invalid value: \"{family}\": not configured on this cluster");
                return Err(cause("spec.ipFamilies", text));
            }
        }
        if policy == "RequireDualStack" && families.len() < 2 {
            let text = "Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services";
            return Err(cause("spec.ipFamilyPolicy", text.into()));
        }
        let mut ips = Vec::new();
        if headless {
            ips.push("None".to_owned());
        } else {
            let had = old.map(|old| strings(old.pointer("/spec/clusterIPs"))).unwrap_or_default();
            for wanted in &families {
                let chosen = given.iter().chain(&had).find(|ip| family(ip) == Some(wanted.as_str())).cloned();
                ips.push(match chosen {
                    Some(ip) => self.claim(&ip, wanted, &had)?,
                    None => self.allocate(wanted)?,
                });
            }
        }
        let spec = map_mut(new, &["spec"]);
        spec.insert("clusterIP".into(), json!(ips.first()));
        spec.insert("clusterIPs".into(), json!(ips));
        spec.insert("ipFamilies".into(), json!(families));
        Ok(())
    }

    fn claim(&mut self, ip: &str, family: &str, had: &[String]) -> Result<String, Vec<Cause>> {
        let range = self.range(family);
        let address: Option<IpAddr> = ip.parse().ok();
        let (Some(range), Some(address)) = (range, address) else {
            return Err(cause("spec.clusterIPs", format!("Invalid value: [\"{ip}\"]: must be a valid IP address")));
        };
        if !range.net.contains(&address) {
            let text = format!(
                "Invalid value: [\"{ip}\"]: failed to allocate IP {ip}: the provided IP is not in the valid range. \
                 The range of valid IPs is {}",
                range.net
            );
            return Err(cause("spec.clusterIPs", text));
        }
        if range.used.contains(&address) && !had.iter().any(|h| h == ip) {
            let text =
                format!("Invalid value: [\"{ip}\"]: failed to allocate IP {ip}: provided IP is already allocated");
            return Err(cause("spec.clusterIPs", text));
        }
        Ok(address.to_string())
    }

    fn allocate(&mut self, family: &str) -> Result<String, Vec<Cause>> {
        let free = self.range(family).and_then(Range::free);
        free.map(|ip| ip.to_string())
            .ok_or_else(|| cause("spec.clusterIPs", "failed to allocate a serviceIP: range is full".into()))
    }

    fn node_ports(&mut self, old: Option<&Value>, new: &mut Value) -> Result<(), Vec<Cause>> {
        let before: Vec<Value> = old.map(|old| list(old, "/spec/ports").to_vec()).unwrap_or_default();
        let had = |port: u16, protocol: &str| {
            before
                .iter()
                .any(|p| object::int(p, "/nodePort") == Some(i64::from(port)) && text(p, "/protocol") == protocol)
        };
        let mut mine: HashSet<(u16, String)> = HashSet::new();
        let mut ports = list(new, "/spec/ports").to_vec();
        for (index, port) in ports.iter_mut().enumerate() {
            let field = format!("spec.ports[{index}].nodePort");
            let protocol = text(port, "/protocol").to_owned();
            let same = |p: &&Value| p.get("port") == port.get("port") && text(p, "/protocol") == protocol;
            let asked = object::int(port, "/nodePort").filter(|p| *p != 0);
            let kept = before.iter().find(same).and_then(|p| object::int(p, "/nodePort"));
            let number = match asked.or(kept) {
                None => {
                    let taken: HashSet<u16> = mine.iter().map(|(port, _)| *port).collect();
                    self.free_port(&protocol, &taken)?
                }
                Some(number) => {
                    let number = u16::try_from(number).ok().filter(|n| self.ports.contains(n)).ok_or_else(|| {
                        let (low, high) = (self.ports.start(), self.ports.end());
                        let why = format!(
                            "provided port is not in the valid range. The range of valid ports is {low}-{high}"
                        );
                        cause(&field, format!("Invalid value: {number}: {why}"))
                    })?;
                    let used = self.used_ports.contains_key(&(number, protocol.clone())) && !had(number, &protocol);
                    if used || mine.contains(&(number, protocol.clone())) {
                        let text = format!("Invalid value: {number}: provided port is already allocated");
                        return Err(cause(&field, text));
                    }
                    number
                }
            };
            mine.insert((number, protocol));
            map_mut(port, &[]).insert("nodePort".into(), number.into());
        }
        object::set(new, &["spec", "ports"], ports);
        Ok(())
    }

    fn free_port(&mut self, protocol: &str, taken: &HashSet<u16>) -> Result<u16, Vec<Cause>> {
        for _ in self.ports.clone() {
            let port = self.next_port;
            self.next_port = if port >= *self.ports.end() { *self.ports.start() } else { port + 1 };
            if !taken.contains(&port) && !self.used_ports.contains_key(&(port, protocol.to_owned())) {
                return Ok(port);
            }
        }
        Err(cause("spec.ports", "failed to allocate a nodePort: range is full".into()))
    }

    /// `old` became `new` (either may be absent).
    pub fn commit(&mut self, old: Option<&Value>, new: Option<&Value>) {
        if let Some(old) = old {
            self.account(old, false);
        }
        if let Some(new) = new {
            self.account(new, true);
        }
    }

    fn account(&mut self, service: &Value, take: bool) {
        for ip in strings(service.pointer("/spec/clusterIPs")) {
            let (Some(family), Ok(address)) = (family(&ip), ip.parse::<IpAddr>()) else { continue };
            if let Some(range) = self.range(family) {
                if take {
                    range.used.insert(address);
                } else {
                    range.used.remove(&address);
                }
            }
        }
        let health = object::int(service, "/spec/healthCheckNodePort").map(|p| (p, "TCP"));
        let ports = list(service, "/spec/ports")
            .iter()
            .filter_map(|p| Some((object::int(p, "/nodePort")?, text(p, "/protocol"))))
            .chain(health);
        for (port, protocol) in ports.filter(|(port, _)| *port != 0) {
            let Ok(port) = u16::try_from(port) else { continue };
            let key = (port, protocol.to_owned());
            if take {
                *self.used_ports.entry(key).or_default() += 1;
            } else if let Some(count) = self.used_ports.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.used_ports.remove(&key);
                }
            }
        }
    }
}

fn keep(spec: &mut Map<String, Value>, before: &Value, field: &str) {
    if spec.get(field).is_none_or(|v| v.as_str() == Some(""))
        && let Some(value) = before.get(field)
    {
        spec.insert(field.to_owned(), value.clone());
    }
}

fn strings(value: Option<&Value>) -> Vec<String> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}
