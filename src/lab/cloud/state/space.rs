//! AddressSpace: which address of a vSwitch is on which ENI.
//!
//! Purpose: all-or-nothing taking and giving of addresses. Owner: the account.
//! Invariants: an address has one holder; the cloud's own addresses (the first
//! and the last three of the IPv4 block, the first and the last nine of the
//! IPv6 block) are never given; gateways are the last but two (`.253` of a
//! /24) and the last but eight (`…:fff7`).

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use rand::Rng;
use rand::rngs::StdRng;

use super::super::config::VSwitchSpec;
use super::super::error::ApiError;

const RESERVED_TAIL4: u32 = 3;
const RESERVED_TAIL6: u64 = 9;

/// Addresses somebody asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Want<A> {
    #[default]
    Nothing,
    Any(u32),
    These(Vec<A>),
}

impl<A> Want<A> {
    pub fn count(&self) -> u32 {
        match self {
            Want::Nothing => 0,
            Want::Any(n) => *n,
            Want::These(list) => u32::try_from(list.len()).unwrap_or(u32::MAX),
        }
    }
}

/// One vSwitch and the holders of its addresses.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    pub spec: VSwitchSpec,
    used4: BTreeMap<Ipv4Addr, String>,
    used6: BTreeMap<Ipv6Addr, String>,
}

impl AddressSpace {
    pub fn new(spec: VSwitchSpec) -> Self {
        Self { spec, used4: BTreeMap::new(), used6: BTreeMap::new() }
    }

    pub fn gateway4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.spec.cidr4.broadcast()) - 2)
    }

    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.spec.cidr6.map(|cidr| Ipv6Addr::from(u128::from(cidr.broadcast()) - 8))
    }

    /// Addresses that can be given at all.
    pub fn capacity4(&self) -> u32 {
        let all = 1u32 << (32 - u32::from(self.spec.cidr4.prefix_len()));
        all - 1 - RESERVED_TAIL4
    }

    pub fn available4(&self) -> u32 {
        self.capacity4() - u32::try_from(self.used4.len()).unwrap_or(u32::MAX)
    }

    pub fn used4(&self) -> impl Iterator<Item = (&Ipv4Addr, &String)> {
        self.used4.iter()
    }

    pub fn used6(&self) -> impl Iterator<Item = (&Ipv6Addr, &String)> {
        self.used6.iter()
    }

    pub fn usable4(&self, ip: Ipv4Addr) -> bool {
        let first = u32::from(self.spec.cidr4.network());
        let offset = u32::from(ip).wrapping_sub(first);
        self.spec.cidr4.contains(&ip) && (1..=self.capacity4()).contains(&offset)
    }

    pub fn usable6(&self, ip: Ipv6Addr) -> bool {
        self.spec.cidr6.is_some_and(|cidr| cidr.contains(&ip) && usable_suffix(suffix(ip)))
    }

    /// Would [`Self::take4`] succeed?
    pub fn check4(&self, want: &Want<Ipv4Addr>) -> Result<(), ApiError> {
        match want {
            Want::Nothing => Ok(()),
            Want::Any(n) if *n <= self.available4() => Ok(()),
            Want::Any(_) => Err(ApiError::not_enough(&self.spec.id)),
            Want::These(list) => {
                check_repeats(list)?;
                for ip in list {
                    if !self.usable4(*ip) {
                        return Err(ApiError::ip_invalid(ip, &self.spec.id));
                    }
                    if self.used4.contains_key(ip) {
                        return Err(ApiError::ip_assigned(ip));
                    }
                }
                Ok(())
            }
        }
    }

    pub fn check6(&self, want: &Want<Ipv6Addr>) -> Result<(), ApiError> {
        if want.count() > 0 && self.spec.cidr6.is_none() {
            let message = format!("IPv6 is not turned on for the VSwitch \"{}\".", self.spec.id);
            return Err(ApiError::new(403, "InvalidVSwitch.Ipv6NotTurnOn", message));
        }
        if let Want::These(list) = want {
            check_repeats(list)?;
            for ip in list {
                if !self.usable6(*ip) {
                    return Err(ApiError::ip_invalid(ip, &self.spec.id));
                }
                if self.used6.contains_key(ip) {
                    return Err(ApiError::ip_assigned(ip));
                }
            }
        }
        Ok(())
    }

    pub fn take4(&mut self, eni: &str, want: &Want<Ipv4Addr>, rng: &mut StdRng) -> Result<Vec<Ipv4Addr>, ApiError> {
        self.check4(want)?;
        let taken = match want {
            Want::Nothing => Vec::new(),
            Want::These(list) => list.clone(),
            Want::Any(n) => self.pick4(*n, rng),
        };
        for ip in &taken {
            self.used4.insert(*ip, eni.to_owned());
        }
        Ok(taken)
    }

    /// `n` free addresses; the caller has checked that there are as many.
    fn pick4(&self, n: u32, rng: &mut StdRng) -> Vec<Ipv4Addr> {
        let capacity = self.capacity4();
        let first = u32::from(self.spec.cidr4.network()) + 1;
        let mut offset = rng.random_range(0..capacity);
        let mut picked = Vec::new();
        // Pods get addresses in no order worth relying on: a random start for
        // each, then the next free one.
        for _ in 0..n {
            for step in 0..capacity {
                let ip = Ipv4Addr::from(first + (offset + step) % capacity);
                if !self.used4.contains_key(&ip) && !picked.contains(&ip) {
                    picked.push(ip);
                    break;
                }
            }
            offset = rng.random_range(0..capacity);
        }
        picked
    }

    pub fn take6(&mut self, eni: &str, want: &Want<Ipv6Addr>, rng: &mut StdRng) -> Result<Vec<Ipv6Addr>, ApiError> {
        self.check6(want)?;
        let mut taken = match want {
            Want::These(list) => list.clone(),
            _ => Vec::new(),
        };
        if let (Want::Any(n), Some(cidr)) = (want, self.spec.cidr6) {
            let prefix = u128::from(cidr.network());
            while taken.len() < *n as usize {
                let low: u64 = rng.random();
                let ip = Ipv6Addr::from(prefix | u128::from(low));
                if usable_suffix(low) && !self.used6.contains_key(&ip) && !taken.contains(&ip) {
                    taken.push(ip);
                }
            }
        }
        for ip in &taken {
            self.used6.insert(*ip, eni.to_owned());
        }
        Ok(taken)
    }

    pub fn give4(&mut self, ip: Ipv4Addr) {
        self.used4.remove(&ip);
    }

    pub fn give6(&mut self, ip: Ipv6Addr) {
        self.used6.remove(&ip);
    }

    pub fn holder4(&self, ip: Ipv4Addr) -> Option<&str> {
        self.used4.get(&ip).map(String::as_str)
    }

    pub fn holder6(&self, ip: Ipv6Addr) -> Option<&str> {
        self.used6.get(&ip).map(String::as_str)
    }
}

fn suffix(ip: Ipv6Addr) -> u64 {
    u128::from(ip) as u64
}

fn usable_suffix(low: u64) -> bool {
    low != 0 && low <= u64::MAX - RESERVED_TAIL6
}

fn check_repeats<A: PartialEq + std::fmt::Display>(list: &[A]) -> Result<(), ApiError> {
    for (index, ip) in list.iter().enumerate() {
        if list[..index].contains(ip) {
            return Err(ApiError::ip_repeated(ip));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn space() -> AddressSpace {
        let (cidr4, cidr6) = ("10.0.0.0/28".parse().unwrap(), "fd00::/64".parse().ok());
        AddressSpace::new(VSwitchSpec { id: "vsw".into(), zone: "z".into(), cidr4, cidr6, name: String::new() })
    }

    #[test]
    fn the_clouds_own_addresses_are_never_given() {
        let (mut space, mut rng) = (space(), StdRng::seed_from_u64(1));
        assert_eq!(space.capacity4(), 12);
        let all = space.take4("eni", &Want::Any(12), &mut rng).unwrap();
        for ip in ["10.0.0.0", "10.0.0.13", "10.0.0.14", "10.0.0.15"] {
            assert!(!all.contains(&ip.parse().unwrap()), "{ip}");
        }
        assert_eq!(space.take4("eni", &Want::Any(1), &mut rng).unwrap_err().code, "InvalidVSwitchId.IpNotEnough");
        assert_eq!(space.gateway4(), Ipv4Addr::new(10, 0, 0, 13));
        assert_eq!(space.gateway6(), "fd00::ffff:ffff:ffff:fff7".parse().ok());
        assert!(!space.usable6("fd00::ffff:ffff:ffff:fff7".parse().unwrap()));
        assert!(space.usable6("fd00::ffff:ffff:ffff:fff6".parse().unwrap()));
    }

    #[test]
    fn a_refused_request_takes_nothing() {
        let (mut space, mut rng) = (space(), StdRng::seed_from_u64(1));
        let ip = Ipv4Addr::new(10, 0, 0, 5);
        space.take4("a", &Want::These(vec![ip]), &mut rng).unwrap();
        let before = space.available4();
        for (want, code) in [
            (vec![Ipv4Addr::new(10, 0, 0, 6), ip], "InvalidIp.IpAssigned"),
            (vec![Ipv4Addr::new(10, 0, 0, 6); 2], "InvalidIp.IpRepeated"),
            (vec![Ipv4Addr::new(10, 0, 0, 13)], "InvalidVSwitchId.IpInvalid"),
            (vec![Ipv4Addr::new(10, 0, 1, 1)], "InvalidVSwitchId.IpInvalid"),
        ] {
            assert_eq!(space.take4("b", &Want::These(want), &mut rng).unwrap_err().code, code);
            assert_eq!(space.available4(), before);
        }
    }
}
