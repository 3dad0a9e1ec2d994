//! What each step does to the state. A step that does not fit the state is
//! refused and changes nothing: answers of the cloud may come late.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::model::ClientToken;

use super::state::{Address, AddressState, Assign, Eni, EniKey, Held, LeasePhase, Meta, Phase, State, Time};
use super::step::Step;

/// The step does not fit the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {why}")]
pub struct Refused {
    pub step: &'static str,
    pub why: String,
}

type Applied = Result<(), String>;

impl State {
    pub fn apply(&mut self, step: &Step, now: Time) -> Result<(), Refused> {
        self.try_apply(step, now).map_err(|why| Refused { step: step.name(), why })
    }

    fn try_apply(&mut self, step: &Step, now: Time) -> Applied {
        match step {
            Step::Lease { lease, reserve } => {
                if self.lease_of(&lease.attachment).is_some() {
                    return Err(format!("{} holds an address already", lease.attachment));
                }
                let address = self.addresses.get(&lease.v4).ok_or_else(|| unknown(lease.v4))?;
                let free = match &address.state {
                    AddressState::Idle { .. } => true,
                    AddressState::Reserved { pod, .. } => *pod == lease.pod,
                    _ => false,
                };
                let eni = self.enis.get(&address.eni).ok_or("its ENI is unknown")?;
                if !free || !eni.ready() || eni.purpose.mode() != lease.mode {
                    return Err(format!("{} cannot be leased now", lease.v4));
                }
                if address.v6 != lease.v6 || (self.dual() && address.v6.is_none()) {
                    return Err(format!("{} is not paired with {:?}", lease.v4, lease.v6));
                }
                let held = Held {
                    lease: (**lease).clone(),
                    phase: LeasePhase::Wiring,
                    since: now,
                    reserve: *reserve,
                    recovered: false,
                };
                self.address(lease.v4)?.state = AddressState::Leased(Box::new(held));
            }
            Step::Confirm { v4 } => {
                let held = self.held(*v4)?;
                if held.going() {
                    return Err(format!("{v4} is being released"));
                }
                held.phase = LeasePhase::Wired;
            }
            Step::Unwire { v4, collect } => {
                let held = self.held(*v4)?;
                held.phase = if *collect { LeasePhase::Collecting } else { LeasePhase::Unwiring };
                held.since = now;
            }
            Step::Release { v4, quarantine } => self.release(*v4, *quarantine, now)?,
            Step::Settle { v4 } => {
                let address = self.address(*v4)?;
                match address.state {
                    AddressState::Cooling { until } | AddressState::Reserved { until, .. } if until <= now => {
                        address.state = AddressState::Idle { since: now };
                    }
                    _ => return Err(format!("{v4} has nothing to wait out")),
                }
            }
            Step::Recover { lease, collect } => {
                let address = self.addresses.get(&lease.v4).ok_or_else(|| unknown(lease.v4))?;
                if address.held().is_some() {
                    return Err(format!("{} is leased already", lease.v4));
                }
                if let Some(v6) = lease.v6 {
                    self.pair(lease.v4, v6)?;
                }
                let phase = if *collect { LeasePhase::Collecting } else { LeasePhase::Wired };
                let mut lease = (**lease).clone();
                lease.v6 = self.address(lease.v4)?.v6;
                if self.lease_of(&lease.attachment).is_some() {
                    return Err(format!("{} holds an address already", lease.attachment));
                }
                let recovered = lease.netns.as_os_str().is_empty() || lease.pod.namespace.is_empty();
                let held = Held { lease, phase, since: now, reserve: None, recovered };
                let v4 = held.lease.v4;
                self.address(v4)?.state = AddressState::Leased(Box::new(held));
            }

            Step::CreateEni { key, purpose, vswitch, ipv4, ipv6 } => {
                let token = self.take_number(*key)?;
                let eni = Eni {
                    purpose: *purpose,
                    vswitch: vswitch.clone(),
                    token,
                    phase: Phase::Creating { ipv4: *ipv4, ipv6: *ipv6 },
                    eni: None,
                    device: None,
                    assign4: None,
                    assign6: None,
                    spare6: Default::default(),
                };
                self.enis.insert(*key, Arc::new(eni));
            }
            Step::EniCreated { key, eni, ipv4, ipv6 } => {
                if self.enis.values().any(|e| e.eni.as_ref().is_some_and(|e| e.id == eni.id)) {
                    return Err(format!("{} is known already", eni.id));
                }
                let record = self.eni(*key)?;
                if !matches!(record.phase, Phase::Creating { .. }) {
                    return Err("it is created already".to_owned());
                }
                record.phase = Phase::Attaching { accepted: false };
                record.vswitch = eni.vswitch.clone();
                record.eni = Some((**eni).clone());
                self.add(*key, ipv4, ipv6, now)?;
            }
            Step::CreateFailed { key } => {
                if !matches!(self.eni(*key)?.phase, Phase::Creating { .. }) {
                    return Err("it was created".to_owned());
                }
                self.forget(*key);
            }
            Step::EniAttaching { key, accepted } => {
                let record = self.eni(*key)?;
                if !matches!(record.phase, Phase::Attaching { .. } | Phase::Ready) {
                    return Err(format!("it is {:?}", record.phase));
                }
                record.phase = Phase::Attaching { accepted: *accepted };
            }
            Step::EniReady { key, device } => {
                let record = self.eni(*key)?;
                if !matches!(record.phase, Phase::Attaching { .. } | Phase::Ready) {
                    return Err(format!("it is {:?}", record.phase));
                }
                record.phase = Phase::Ready;
                record.device = Some(device.clone());
            }
            Step::DrainEni { key } => {
                let record = self.eni(*key)?;
                if !record.ready() && !matches!(record.phase, Phase::Attaching { .. }) {
                    return Err(format!("it is {:?}", record.phase));
                }
                record.phase = Phase::Draining;
            }
            Step::DetachEni { key } => {
                if self.of_eni(*key).any(|(_, a)| in_use(a)) {
                    return Err("its addresses are in use".to_owned());
                }
                let record = self.eni(*key)?;
                if record.phase != Phase::Draining {
                    return Err(format!("it is {:?}", record.phase));
                }
                record.phase = Phase::Detaching { accepted: false };
                (record.assign4, record.assign6) = (None, None);
            }
            Step::EniDetaching { key, accepted } => {
                let record = self.eni(*key)?;
                if !matches!(record.phase, Phase::Detaching { .. } | Phase::Deleting) {
                    return Err(format!("it is {:?}", record.phase));
                }
                record.phase = Phase::Detaching { accepted: *accepted };
            }
            Step::EniDetached { key } => {
                if self.of_eni(*key).any(|(_, a)| in_use(a)) {
                    return Err("its addresses are in use".to_owned());
                }
                let record = self.eni(*key)?;
                if matches!(record.phase, Phase::Creating { .. }) {
                    return Err("it does not exist yet".to_owned());
                }
                record.phase = Phase::Deleting;
            }
            Step::EniDeleted { key } => {
                if self.eni(*key)?.phase != Phase::Deleting {
                    return Err("it is not being deleted".to_owned());
                }
                self.forget(*key);
            }
            Step::EniLost { key } => self.lose(*key)?,
            Step::AdoptEni { key, purpose, token, phase, eni, ipv4, ipv6, quarantine } => {
                if self.enis.values().any(|e| e.eni.as_ref().is_some_and(|e| e.id == eni.id)) {
                    return Err(format!("{} is known already", eni.id));
                }
                self.take_number(*key)?;
                let record = Eni {
                    purpose: *purpose,
                    vswitch: eni.vswitch.clone(),
                    token: token.clone(),
                    phase: *phase,
                    eni: Some((**eni).clone()),
                    device: None,
                    assign4: None,
                    assign6: None,
                    spare6: Default::default(),
                };
                self.enis.insert(*key, Arc::new(record));
                self.add(*key, ipv4, ipv6, now)?;
                let added: Vec<Ipv4Addr> = self.of_eni(*key).map(|(ip, _)| ip).collect();
                for ip in added {
                    self.address(ip)?.state = AddressState::Cooling { until: now.plus(*quarantine) };
                }
            }

            Step::AssignIpv4 { key, count } => {
                let busy =
                    |e: &mut Eni| (e.ready() && e.assign4.is_none()).then_some(()).ok_or("it is busy".to_owned());
                busy(self.eni(*key)?)?;
                let token = self.token();
                self.eni(*key)?.assign4 = Some(Assign { token, count: *count });
            }
            Step::AssignIpv6 { key, count } => {
                let busy =
                    |e: &mut Eni| (e.ready() && e.assign6.is_none()).then_some(()).ok_or("it is busy".to_owned());
                busy(self.eni(*key)?)?;
                let token = self.token();
                self.eni(*key)?.assign6 = Some(Assign { token, count: *count });
            }
            Step::Ipv4Assigned { key, addresses } => {
                self.eni(*key)?.assign4 = None;
                self.add(*key, addresses, &[], now)?;
            }
            Step::Ipv6Assigned { key, addresses } => {
                self.eni(*key)?.assign6 = None;
                self.add(*key, &[], addresses, now)?;
            }
            Step::AssignFailed { key, ipv6 } => {
                let record = self.eni(*key)?;
                *(if *ipv6 { &mut record.assign6 } else { &mut record.assign4 }) = None;
            }
            Step::ReleaseAddresses { addresses } => {
                for ip in addresses {
                    let address = self.addresses.get(ip).ok_or_else(|| unknown(*ip))?;
                    let primary = self.enis.get(&address.eni).is_none_or(|e| e.is_primary_address(*ip));
                    if address.idle_since().is_none() || primary {
                        return Err(format!("{ip} cannot be given back"));
                    }
                }
                for ip in addresses {
                    self.address(*ip)?.state = AddressState::Releasing { since: now };
                }
            }
            Step::Ipv6Released { key, addresses } => {
                self.eni(*key)?.spare6.retain(|ip| !addresses.contains(ip));
                for ip in self.releasing(*key) {
                    let address = self.address(ip)?;
                    address.v6 = address.v6.filter(|ip6| !addresses.contains(ip6));
                }
            }
            Step::Ipv4Released { key, addresses } => {
                for ip in self.releasing(*key).into_iter().filter(|ip| addresses.contains(ip)) {
                    // An IPv6 address that is still there stays known.
                    if let Some(ip6) = self.addresses.remove(&ip).and_then(|a| a.v6) {
                        self.eni(*key)?.spare6.insert(ip6);
                    }
                }
            }
            Step::SyncEni { key, add4, add6, drop4, drop6 } => {
                for ip in drop4 {
                    let idle = self.addresses.get(ip).is_some_and(|a| a.eni == *key && a.held().is_none());
                    if let Some(ip6) = idle.then(|| self.addresses.remove(ip)).flatten().and_then(|a| a.v6) {
                        self.eni(*key)?.spare6.insert(ip6);
                    }
                }
                let unpaired: Vec<Ipv4Addr> = self.of_eni(*key).map(|(ip, _)| ip).collect();
                for ip in unpaired {
                    let address = self.address(ip)?;
                    if address.held().is_none() {
                        address.v6 = address.v6.filter(|ip6| !drop6.contains(ip6));
                    }
                }
                self.eni(*key)?.spare6.retain(|ip| !drop6.contains(ip));
                self.add(*key, add4, add6, now)?;
            }

            Step::Hold { key, hold } => {
                self.holds.insert(key.clone(), Arc::new(hold.clone()));
            }
            Step::Unhold { key } => {
                self.holds.remove(key).ok_or("nothing is held")?;
            }
            Step::Learn { limits, foreign } => {
                let meta = Arc::make_mut(&mut self.meta);
                meta.limits = limits.clone();
                meta.foreign = *foreign;
            }
        }
        Ok(())
    }

    fn eni(&mut self, key: EniKey) -> Result<&mut Eni, String> {
        self.enis.get_mut(&key).map(Arc::make_mut).ok_or_else(|| format!("no ENI {key}"))
    }

    fn address(&mut self, ip: Ipv4Addr) -> Result<&mut Address, String> {
        self.addresses.get_mut(&ip).map(Arc::make_mut).ok_or_else(|| unknown(ip))
    }

    fn held(&mut self, ip: Ipv4Addr) -> Result<&mut Held, String> {
        match &mut self.address(ip)?.state {
            AddressState::Leased(held) => Ok(held),
            _ => Err(format!("{ip} is not leased")),
        }
    }

    fn meta(&mut self) -> &mut Meta {
        Arc::make_mut(&mut self.meta)
    }

    fn token(&mut self) -> ClientToken {
        let meta = self.meta();
        let token = ClientToken(format!("fw-{}-{}", meta.nonce, meta.next));
        meta.next += 1;
        token
    }

    fn take_number(&mut self, key: EniKey) -> Result<ClientToken, String> {
        if key.0 != self.meta.next {
            return Err(format!("number {key} is not the next one, {}", self.meta.next));
        }
        Ok(self.token())
    }

    fn releasing(&self, key: EniKey) -> Vec<Ipv4Addr> {
        let releasing = |a: &Address| matches!(a.state, AddressState::Releasing { .. });
        self.of_eni(key).filter(|(_, a)| releasing(a)).map(|(ip, _)| ip).collect()
    }

    fn release(&mut self, v4: Ipv4Addr, quarantine: std::time::Duration, now: Time) -> Applied {
        let held = self.held(v4)?.clone();
        let key = self.address(v4)?.eni;
        if self.enis.get(&key).is_none_or(|e| e.phase == Phase::Lost) {
            self.addresses.remove(&v4);
            return Ok(());
        }
        // A pod whose new sandbox has an address already needs none kept.
        let pod = held.lease.pod;
        let served = self.addresses.iter().any(|(ip, a)| {
            *ip != v4
                && match &a.state {
                    AddressState::Leased(other) => other.lease.pod == pod,
                    AddressState::Reserved { pod: other, .. } => *other == pod,
                    _ => false,
                }
        });
        self.address(v4)?.state = match held.reserve {
            Some(reserve) if !served => AddressState::Reserved { pod, until: now.plus(reserve.max(quarantine)) },
            _ => AddressState::Cooling { until: now.plus(quarantine) },
        };
        Ok(())
    }

    /// Take up addresses of an ENI as idle, and pair the families.
    fn add(&mut self, key: EniKey, v4: &[Ipv4Addr], v6: &[Ipv6Addr], now: Time) -> Applied {
        self.eni(key)?;
        for ip in v4 {
            // The answer to a repeated call names what is known already. An
            // address that moved while it was leased stays with its lease.
            if self.addresses.get(ip).is_none_or(|known| known.eni != key && known.held().is_none()) {
                let state = AddressState::Idle { since: now };
                self.addresses.insert(*ip, Arc::new(Address { eni: key, v6: None, state }));
            }
        }
        let known = |s: &State, ip: &Ipv6Addr| {
            s.addresses.values().any(|a| a.v6 == Some(*ip)) || s.enis.values().any(|e| e.spare6.contains(ip))
        };
        let new: Vec<Ipv6Addr> = v6.iter().filter(|ip| !known(self, ip)).copied().collect();
        self.eni(key)?.spare6.extend(new);
        let unpaired: Vec<Ipv4Addr> =
            self.of_eni(key).filter(|(_, a)| a.v6.is_none() && !leaves(a)).map(|(ip, _)| ip).collect();
        for ip in unpaired {
            let Some(ip6) = self.eni(key)?.spare6.pop_first() else { break };
            let address = self.address(ip)?;
            address.v6 = Some(ip6);
        }
        Ok(())
    }

    /// An IPv6 address is known to go with this IPv4 address: exchanged with the
    /// one it was paired with. One that is leased stays with its lease.
    fn pair(&mut self, v4: Ipv4Addr, v6: Ipv6Addr) -> Applied {
        let Some((key, old)) = self.addresses.get(&v4).map(|a| (a.eni, a.v6)) else { return Err(unknown(v4)) };
        let with = self.of_eni(key).find(|(_, a)| a.v6 == Some(v6)).map(|(ip, a)| (ip, a.held().is_some()));
        match with {
            Some((ip, _)) if ip == v4 => return Ok(()),
            Some((_, true)) => return Ok(()),
            Some((other, false)) => self.address(other)?.v6 = old,
            None => {
                let spare = &mut self.eni(key)?.spare6;
                if !spare.remove(&v6) {
                    return Ok(());
                }
                spare.extend(old);
            }
        }
        self.address(v4)?.v6 = Some(v6);
        Ok(())
    }

    fn forget(&mut self, key: EniKey) {
        self.addresses.retain(|_, a| a.eni != key);
        self.enis.remove(&key);
        self.holds.remove(&super::state::HoldKey::Eni(key));
    }

    fn lose(&mut self, key: EniKey) -> Applied {
        if self.eni(key)?.eni.is_none() {
            return Err("it has not been created yet".to_owned());
        }
        self.addresses.retain(|_, a| a.eni != key || a.held().is_some());
        if self.of_eni(key).next().is_none() {
            self.forget(key);
            return Ok(());
        }
        let record = self.eni(key)?;
        record.phase = Phase::Lost;
        (record.assign4, record.assign6) = (None, None);
        record.spare6.clear();
        Ok(())
    }
}

/// Somebody uses it, may still be reached under it, or was promised it.
pub fn in_use(a: &Address) -> bool {
    matches!(a.state, AddressState::Leased(_) | AddressState::Cooling { .. } | AddressState::Reserved { .. })
}

/// Not a candidate for pairing: its lease is told to others, or it goes.
fn leaves(a: &Address) -> bool {
    matches!(a.state, AddressState::Leased(_) | AddressState::Releasing { .. })
}

fn unknown(ip: Ipv4Addr) -> String {
    format!("{ip} is not in the ledger")
}
