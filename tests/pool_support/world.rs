//! A node in a nutshell: the pool's pure cores, driven as the actor drives them,
//! with a model cloud, devices, and pods that really use what they were given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use fairway::cloud::{
    AssignIpv4, AssignIpv6, CreateEni, DescribeEnis, DescribeVSwitches, Lane, UnassignIpv4, UnassignIpv6,
};
use fairway::model::*;
use fairway::netns::{KernelInventory, PreparedEni};
use fairway::pool::demand::{BoundPod, Demand};
use fairway::pool::ledger::{decode, encode};
use fairway::pool::outcome::{Answer, Trouble, meaning};
use fairway::pool::plan::{plan, wake};
use fairway::pool::reconcile::{self, Sight, eni_tags, owner_tags};
use fairway::pool::state::{EniKey, LeasePhase, Meta, Phase, State, Time};
use fairway::pool::step::Step;
use fairway::pool::work::{Subject, Work, due};
use fairway::pool::{Allocate, Config, PoolError};

use super::cloud::ModelCloud;
use super::links::{noted, says};

pub struct World {
    pub state: State,
    pub config: Config,
    pub demand: Demand,
    pub cloud: ModelCloud,
    pub now: Time,
    /// The truth: which attachment uses which address.
    pub pods: BTreeMap<AttachmentId, (Ipv4Addr, Option<Ipv6Addr>, PodKey, AttachMode)>,
    released: BTreeMap<Ipv4Addr, (Time, PodKey)>,
    missed: BTreeSet<EniKey>,
    refused: BTreeMap<AttachmentId, String>,
    retries: BTreeMap<Subject, Time>,
    touched: BTreeMap<EniKey, Time>,
    doubt: bool,
    generation: u64,
}

impl World {
    pub fn new(enis: u32, per_eni: u32, seed: u64, config: Config) -> Self {
        let cloud = ModelCloud::new(enis, per_eni, seed, &[("vsw-a", 1000), ("vsw-b", 2000)]);
        let state = Self::blank(&cloud, &config, 0);
        let mut world = Self {
            state,
            demand: Demand { bound: Some(Arc::default()), ..Demand::default() },
            config,
            cloud,
            now: Time(1_700_000_000_000),
            pods: BTreeMap::new(),
            released: BTreeMap::new(),
            missed: BTreeSet::new(),
            refused: BTreeMap::new(),
            retries: BTreeMap::new(),
            touched: BTreeMap::new(),
            doubt: false,
            generation: 0,
        };
        world.read_vswitches();
        world
    }

    fn blank(cloud: &ModelCloud, config: &Config, generation: u64) -> State {
        let cloud = cloud.0.lock();
        State::new(Meta {
            instance: cloud.instance.clone(),
            cluster: config.cluster_id.clone(),
            nonce: format!("n{generation}"),
            next: 1,
            limits: cloud.limits.clone(),
            ip_stack: config.ip_stack,
            foreign: 0,
        })
    }

    pub fn attachment(n: u32, sandbox: u32) -> AttachmentId {
        AttachmentId { sandbox: format!("sandbox-{n}-{sandbox}").into(), ifname: "eth0".to_owned() }
    }

    pub fn add(&mut self, n: u32, mode: AttachMode, reserve: bool) {
        self.add_sandbox(n, 0, mode, reserve);
    }

    pub fn add_sandbox(&mut self, n: u32, sandbox: u32, mode: AttachMode, reserve: bool) {
        let attachment = Self::attachment(n, sandbox);
        if self.state.lease_of(&attachment).is_some() || self.demand.waiting.iter().any(|w| w.attachment == attachment)
        {
            return;
        }
        self.refused.remove(&attachment);
        self.demand.waiting.push(Allocate {
            netns: format!("/var/run/netns/{}", attachment.sandbox).into(),
            attachment,
            pod: PodKey::new("ns", format!("pod-{n}")),
            pod_uid: Some(format!("uid-{n}")),
            mode,
            bandwidth: Bandwidth::default(),
            traffic: Default::default(),
            reserve: reserve.then_some(self.config.reservation),
        });
    }

    pub fn bind(&mut self, n: u32, mode: AttachMode) {
        self.unbind(n);
        let mut pods = (**self.demand.bound.as_ref().unwrap()).clone();
        let pod = PodKey::new("ns", format!("pod-{n}"));
        pods.push(BoundPod { pod, uid: format!("uid-{n}"), mode, terminated: false, addresses: Vec::new() });
        self.demand.bound = Some(Arc::new(pods));
    }

    pub fn unbind(&mut self, n: u32) {
        let mut pods = (**self.demand.bound.as_ref().unwrap()).clone();
        pods.retain(|p| p.uid != format!("uid-{n}"));
        self.demand.bound = Some(Arc::new(pods));
    }

    /// The DEL of a pod's first sandbox, as CniServer does it.
    pub fn del(&mut self, n: u32) {
        self.unbind(n);
        let attachment = Self::attachment(n, 0);
        self.demand.waiting.retain(|w| w.attachment != attachment);
        let held = self.state.lease_of(&attachment).map(|(v4, h)| (v4, h.going()));
        // After a lost ledger the attachment is unknown: only the pod goes.
        if let Some((v4, going)) = held {
            if !going {
                self.apply(Step::Unwire { v4, collect: false });
            }
            self.unuse(&attachment);
            self.apply(Step::Release { v4, quarantine: self.config.quarantine });
        } else {
            self.unuse(&attachment);
        }
    }

    fn unuse(&mut self, attachment: &AttachmentId) {
        if let Some((ip, _, pod, _)) = self.pods.remove(attachment) {
            self.released.insert(ip, (self.now, pod));
        }
    }

    pub fn plan(&self) -> Vec<Step> {
        plan(&self.state, &self.config, &self.demand, self.now)
    }

    fn apply(&mut self, step: Step) {
        self.state.apply(&step, self.now).unwrap_or_else(|e| panic!("{e}: {step:?}"));
        self.state.check().unwrap_or_else(|e| panic!("{e} after {step:?}"));
        if let Step::Lease { lease, .. } = &step {
            self.begin_use(lease);
        }
    }

    /// A pod takes what it was leased: nobody else may have it, or have had it
    /// moments ago.
    fn begin_use(&mut self, lease: &Lease) {
        for (other, (ip, v6, ..)) in &self.pods {
            let (ours, theirs) = ((lease.v4, lease.v6), (*ip, *v6));
            let shares = ours.0 == theirs.0 || ours.1.is_some() && ours.1 == theirs.1;
            assert!(!shares, "{ours:?} is given to {} while {other} uses {theirs:?}", lease.attachment);
        }
        if let Some((at, pod)) = self.released.get(&lease.v4) {
            let cooled = self.now.since(*at) >= self.config.quarantine;
            assert!(cooled || *pod == lease.pod, "{} was released just now", lease.v4);
        }
        let cloud = self.cloud.0.lock();
        let eni = cloud.enis.get(&lease.eni.id);
        assert!(eni.is_some_and(|e| e.ipv4.contains(&lease.v4)), "{} is not assigned", lease.v4);
        drop(cloud);
        self.pods.insert(lease.attachment.clone(), (lease.v4, lease.v6, lease.pod.clone(), lease.mode));
        let v4 = lease.v4;
        self.state.apply(&Step::Confirm { v4 }, self.now).unwrap();
    }

    /// One turn of the pool with at most `calls` calls answered.
    pub fn turn(&mut self, calls: usize) {
        let steps = self.plan();
        for step in steps {
            self.demand.note_taken(&self.state, &step);
            self.apply(step);
        }
        let again = self.plan();
        assert!(again.is_empty(), "the plan repeats itself: {again:?}");
        self.refuse();
        let state = &self.state;
        self.demand.waiting.retain(|w| state.lease_of(&w.attachment).is_none());
        let retry = |subject| self.retries.get(&subject).copied();
        let works = due(&self.state, &BTreeSet::new(), retry, self.now);
        for work in works.into_iter().take(calls) {
            if let Subject::Eni(key) = work.subject() {
                self.touched.insert(key, self.now);
            }
            let result = self.perform(&work);
            if result.is_err() {
                self.retries.insert(work.subject(), self.now.plus(Duration::from_secs(1)));
            }
            let meaning = meaning(&self.state, &self.config, &work, result, self.now);
            for step in meaning.steps {
                self.apply(step);
            }
            self.doubt |= meaning.doubt;
        }
        let detaching = |p: Phase| matches!(p, Phase::Detaching { accepted: true });
        if calls > 0 && (self.doubt || !self.missed.is_empty() || self.state.enis.values().any(|e| detaching(e.phase)))
        {
            self.doubt = false;
            self.look();
        }
    }

    fn refuse(&mut self) {
        let now = self.now;
        let mut refused = Vec::new();
        for w in &self.demand.waiting {
            if self.state.lease_of(&w.attachment).is_some() {
                continue;
            }
            let why = fairway::pool::why(&self.state, &self.config, &self.demand, w.mode.into(), now);
            match why {
                fairway::pool::Why::Waiting(_) => {}
                fairway::pool::Why::Full { in_use, limit } => {
                    refused.push((w.attachment.clone(), PoolError::NodeFull { in_use, limit }.to_string()));
                }
                fairway::pool::Why::NoPlace { shared, limit } => {
                    refused.push((w.attachment.clone(), PoolError::NoPlace { shared, limit }.to_string()));
                }
                fairway::pool::Why::Refused(reason) => refused.push((w.attachment.clone(), reason)),
            }
        }
        for (attachment, reason) in refused {
            self.demand.waiting.retain(|w| w.attachment != attachment);
            self.refused.insert(attachment, reason);
        }
    }

    fn perform(&mut self, work: &Work) -> Result<Answer, Trouble> {
        let cloud = self.cloud.clone();
        let record = |key: &EniKey| (*self.state.enis[key]).clone();
        let id = |key: &EniKey| record(key).eni.unwrap().id;
        let lane = Lane::Refill;
        let done = match work {
            Work::Create { key } => {
                let record = record(key);
                let Phase::Creating { ipv4, ipv6 } = record.phase else { unreachable!() };
                let tags = eni_tags(&self.config.cluster_id, &self.state.meta.instance, &record.token, record.purpose);
                let message = CreateEni {
                    vswitch: record.vswitch,
                    security_groups: vec!["sg-1".into()],
                    ipv4,
                    ipv6,
                    tags,
                    description: String::new(),
                    token: record.token,
                    lane,
                };
                cloud.call("create", |c| c.create(&message)).map(|eni| {
                    let vswitch = self.demand.vswitches[&eni.vswitch].clone();
                    Answer::Created(Box::new(eni), Box::new(vswitch))
                })
            }
            Work::Attach { key } => cloud.call("attach", |c| c.attach(&id(key))).map(|()| Answer::Done),
            Work::Prepare { key } => {
                let attached = cloud.0.lock().enis.get(&id(key)).is_some_and(|e| e.instance.is_some());
                if !attached {
                    return Err(Trouble::Kernel(format!("no device for {key} yet")));
                }
                let prepared = PreparedEni {
                    ifname: format!("eth{}", key.0),
                    ifindex: 1,
                    rx_queues: 2,
                    mtu: 1500,
                    receive_cores: vec![],
                };
                return Ok(Answer::Prepared(prepared));
            }
            Work::AssignIpv4 { key } => {
                let assign = record(key).assign4.unwrap();
                let message = AssignIpv4 { eni: id(key), count: assign.count, token: assign.token, lane };
                cloud.call("assign4", |c| c.assign4(&message)).map(Answer::Assigned4)
            }
            Work::AssignIpv6 { key } => {
                let assign = record(key).assign6.unwrap();
                let message = AssignIpv6 { eni: id(key), count: assign.count, token: assign.token, lane };
                cloud.call("assign6", |c| c.assign6(&message)).map(Answer::Assigned6)
            }
            Work::UnassignIpv4 { key, addresses } => {
                for ip in addresses {
                    self.assert_unused(*ip);
                }
                let message = UnassignIpv4 { eni: id(key), addresses: addresses.clone(), lane };
                cloud.call("unassign4", |c| c.unassign4(&message)).map(|()| Answer::Done)
            }
            Work::UnassignIpv6 { key, addresses } => {
                let message = UnassignIpv6 { eni: id(key), addresses: addresses.clone(), lane };
                cloud.call("unassign6", |c| c.unassign6(&message)).map(|()| Answer::Done)
            }
            Work::Detach { key } => {
                let eni = cloud.0.lock().enis.get(&id(key)).cloned();
                for ip in eni.into_iter().flat_map(|e| e.ipv4) {
                    self.assert_unused(ip);
                }
                cloud.call("detach", |c| c.detach(&id(key))).map(|()| Answer::Done)
            }
            Work::Delete { key } => cloud.call("delete", |c| c.delete(&id(key))).map(|()| Answer::Done),
            Work::Unwire { v4 } => {
                let held = self.state.addresses[v4].held().unwrap().clone();
                assert_eq!(held.phase, LeasePhase::Collecting);
                let users: Vec<AttachmentId> =
                    self.pods.iter().filter(|(_, (ip, ..))| ip == v4).map(|(a, _)| a.clone()).collect();
                for user in users {
                    self.unuse(&user);
                }
                return Ok(Answer::Done);
            }
        };
        done.map_err(Trouble::Cloud)
    }

    fn assert_unused(&self, ip: Ipv4Addr) {
        let users = self.pods_with(ip);
        assert!(users.is_empty(), "{ip} is taken away from {users:?}");
    }

    pub fn pods_with(&self, ip: Ipv4Addr) -> Vec<AttachmentId> {
        self.pods.iter().filter(|(_, (used, ..))| *used == ip).map(|(a, _)| a.clone()).collect()
    }

    /// Turn until nothing is left to do at this moment or within a few seconds.
    pub fn settle(&mut self) {
        self.settle_for(Duration::from_secs(10));
    }

    /// Let time pass, turning whenever something is due.
    pub fn settle_for(&mut self, span: Duration) {
        let end = self.now.plus(span);
        let mut turns = 0;
        loop {
            let before = (self.state.clone(), self.demand.waiting.len());
            self.turn(usize::MAX);
            turns += 1;
            assert!(turns < 20_000, "it does not come to rest: {:?}", self.plan());
            if before != (self.state.clone(), self.demand.waiting.len()) {
                continue;
            }
            let retry = self.retries.values().copied().filter(|t| *t > self.now).min();
            let wake = wake(&self.state, &self.config, self.now).into_iter().chain(retry).min();
            // Looks happen while something is unsettled.
            let unsettled = !self.missed.is_empty()
                || self.state.enis.values().any(|e| !matches!(e.phase, Phase::Ready | Phase::Lost));
            let look = unsettled.then(|| self.now.plus(Duration::from_secs(2)));
            let resync = Some(self.now.plus(self.config.resync));
            let next = wake.into_iter().chain(look).chain(resync).min().unwrap();
            if next > end {
                self.now = end;
                self.collect_evidence();
                self.turn(usize::MAX);
                return;
            }
            self.now = next;
            self.collect_evidence();
            self.read_vswitches();
            self.look();
        }
    }

    /// What the sweep finds: recovered leases that no pod uses.
    fn collect_evidence(&mut self) {
        let used = |v4: Ipv4Addr, v6: Option<Ipv6Addr>| {
            self.pods.values().any(|(ip, ip6, ..)| *ip == v4 || v6.is_some() && *ip6 == v6)
        };
        let gone = self.state.leases().filter(|(v4, h)| h.recovered && !used(*v4, h.lease.v6));
        self.demand.gone = gone.map(|(_, h)| h.lease.attachment.clone()).collect();
    }

    pub fn read_vswitches(&mut self) {
        let ids = vec!["vsw-a".into(), "vsw-b".into()];
        let read = self.cloud.0.lock().describe_vswitches(&DescribeVSwitches { ids, lane: Lane::Refill });
        self.demand.vswitches = read.into_iter().map(|v| (v.id.clone(), v)).collect();
    }

    pub fn look(&mut self) {
        let tags = owner_tags(&self.config.cluster_id, &self.state.meta.instance);
        let lane = Lane::Refill;
        let query = DescribeEnis { ids: vec![], instance: None, tags, status: None, lane };
        let Ok(enis) = self.cloud.call("describe", |c| Ok(c.describe(&query))) else { return };
        let sight = Sight {
            enis: &enis,
            vswitches: &self.demand.vswitches,
            busy: &|_| false,
            missed: &self.missed,
            quarantine: self.config.quarantine,
        };
        let (steps, missed) = reconcile::with_cloud(&self.state, &sight, self.now);
        self.missed = missed;
        for step in steps {
            self.apply(step);
        }
    }

    pub fn lose_ledger(&mut self) {
        self.generation += 1;
        self.state = Self::blank(&self.cloud, &self.config, self.generation);
    }

    /// The process dies and starts again: what is on disk, nothing else.
    pub fn restart(&mut self, rebuilt: bool) {
        if !rebuilt {
            self.state = decode(&encode(&self.state).unwrap()).unwrap();
        }
        // Requests of the dead process are repeated by kubelet, later.
        self.demand.waiting.clear();
        self.retries.clear();
        self.missed.clear();
        self.demand.gone.clear();
        let chaos = std::mem::take(&mut self.cloud.0.lock().chaos);
        self.look();
        self.cloud.0.lock().chaos = chaos;
        let kernel = self.kernel();
        for step in reconcile::with_node(&self.state, &kernel, &self.demand.bound, rebuilt) {
            self.apply(step);
        }
    }

    fn kernel(&self) -> KernelInventory {
        let in_pods: BTreeSet<Ipv4Addr> =
            self.pods.values().filter(|(.., mode)| *mode == AttachMode::Exclusive).map(|(ip, ..)| *ip).collect();
        let attached = self.cloud.secondary().into_iter().filter(|e| e.instance.is_some());
        let here = attached.filter(|e| !e.ipv4.iter().any(|ip| in_pods.contains(ip)));
        let veth = self.pods.values().filter(|(.., m)| *m == AttachMode::Veth);
        let routed: Vec<IpAddr> =
            veth.flat_map(|(ip, v6, ..)| std::iter::once(IpAddr::V4(*ip)).chain(v6.map(IpAddr::V6))).collect();
        KernelInventory {
            enis: here.map(|e| (e.mac, e.id.to_string())).collect(),
            ruled: routed.clone(),
            routed,
            attached: self
                .pods
                .iter()
                .filter(|(a, _)| noted(a))
                .map(|(a, (ip, v6, pod, _))| says(a, *ip, *v6, pod))
                .collect(),
            ..KernelInventory::default()
        }
    }

    pub fn served(&self) -> usize {
        self.pods.len()
    }

    pub fn idle(&self) -> usize {
        self.state.addresses.values().filter(|a| a.idle_since().is_some()).count()
    }

    pub fn address_of(&self, n: u32) -> Option<Ipv4Addr> {
        let pod = PodKey::new("ns", format!("pod-{n}"));
        self.state.leases().find(|(_, h)| h.lease.pod == pod && !h.going()).map(|(ip, _)| ip)
    }

    pub fn refusal(&self, n: u32) -> Option<&str> {
        self.refused.get(&Self::attachment(n, 0)).map(String::as_str)
    }

    /// What pods use is leased, to them.
    pub fn check_truth(&self) {
        self.state.check().unwrap();
        for (attachment, (ip, v6, ..)) in &self.pods {
            let Some(held) = self.state.addresses.get(ip).and_then(|a| a.held()) else {
                panic!("{attachment} uses {ip}, which is {:?}", self.state.addresses.get(ip));
            };
            let same = held.lease.attachment == *attachment;
            assert!(same || held.recovered && !noted(attachment), "{ip} is leased to {}", held.lease.attachment);
            assert!(!same || held.lease.v6 == *v6, "{ip} is leased with {:?}, and used with {v6:?}", held.lease.v6);
        }
    }

    /// Cloud and ledger agree on every ENI and address.
    pub fn check_accounts(&self) {
        let in_cloud: BTreeSet<EniId> = self.cloud.secondary().into_iter().map(|e| e.id).collect();
        let in_ledger: BTreeSet<EniId> =
            self.state.enis.values().filter_map(|e| e.eni.as_ref().map(|e| e.id.clone())).collect();
        assert_eq!(in_cloud, in_ledger, "ENIs in the cloud and in the ledger");
        let cloud: BTreeSet<Ipv4Addr> = self.cloud.secondary().into_iter().flat_map(|e| e.ipv4).collect();
        let ledger: BTreeSet<Ipv4Addr> = self.state.addresses.keys().copied().collect();
        assert_eq!(cloud, ledger, "addresses in the cloud and in the ledger");
    }
}
