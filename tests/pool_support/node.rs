//! A node around the real Pool actor: model cloud and kernel behind ports, with
//! latency on paused time, and a kubelet that adds, retries and deletes. A node
//! can die at any moment; what it had sent to the cloud still takes effect.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fairway::actor::{ChildPolicy, Deadline, Handle, Message, Placement, Port, Registry, Tree};
use fairway::cloud::*;
use fairway::model::*;
use fairway::netns::*;
use fairway::pool::ledger::MemoryStore;
use fairway::pool::{
    Allocate, Audit, AuditReport, BeginRelease, BoundPod, BoundPods, CloudPorts, Config, Confirm, Deps, FinishRelease,
    Leases, LedgerPlace, Lookup, NetnsPorts, Pool, PoolSnapshot,
};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use super::cloud::ModelCloud;
use super::links::{noted, says};

/// What pods really use, and what the host really has.
#[derive(Default)]
pub struct Kernel {
    /// Which sandbox uses which address.
    pub wired: BTreeMap<Ipv4Addr, (AttachmentId, AttachMode, Mac)>,
}

#[derive(Clone)]
pub struct Node {
    pub cloud: ModelCloud,
    pub kernel: Arc<Mutex<Kernel>>,
    pub store: MemoryStore,
    /// A ledger on disk instead of the one in memory.
    pub folder: Option<PathBuf>,
    pub config: Config,
    pub latency: Duration,
    pub bound: watch::Sender<BoundPods>,
    pub elected: watch::Sender<bool>,
    pub snapshots: watch::Sender<Arc<PoolSnapshot>>,
    /// Where sandboxes' namespaces are; files stand for them.
    pub netns: Arc<tempfile::TempDir>,
    /// Set by tests of a single death.
    pub died_once: Arc<AtomicBool>,
    /// Promises broken where a panic would go unseen.
    pub violations: Arc<Mutex<Vec<String>>>,
    /// Lives of the agent: a dead one's calls come to nothing.
    life: Arc<AtomicU64>,
}

/// One life of the agent.
pub struct Agent {
    pub tree: Tree,
    pub pool: Handle<Pool>,
}

impl Node {
    pub fn new(cloud: ModelCloud, config: Config) -> Self {
        Self {
            cloud,
            kernel: Arc::default(),
            store: MemoryStore::default(),
            folder: None,
            config,
            latency: Duration::from_millis(800),
            bound: watch::Sender::new(Some(Arc::default())),
            elected: watch::Sender::new(false),
            snapshots: watch::Sender::new(Arc::default()),
            netns: Arc::new(tempfile::tempdir().unwrap()),
            died_once: Arc::default(),
            violations: Arc::default(),
            life: Arc::default(),
        }
    }

    /// A port whose calls take time and outlive the caller, but not a dead
    /// agent's wish to make them.
    fn port<M: Message>(
        &self,
        latency: Duration,
        effect: impl Fn(&Node, M) -> Result<M::Reply, M::Error> + Send + Sync + 'static,
    ) -> Port<M> {
        let (node, life, effect) = (self.clone(), self.life.load(Ordering::Relaxed), Arc::new(effect));
        Port::new("model", move |message, deadline| {
            let (node, effect) = (node.clone(), effect.clone());
            let (tell, told) = oneshot::channel();
            let alive = node.life.load(Ordering::Relaxed) == life;
            if alive {
                tokio::spawn(async move {
                    tokio::time::sleep(latency / 2).await;
                    let result = effect(&node, message);
                    tokio::time::sleep(latency / 2).await;
                    let _ = tell.send(result);
                });
            }
            Box::pin(async move {
                let timeout = fairway::actor::AskError::Timeout { actor: "model", message: M::NAME };
                match tokio::time::timeout_at(deadline.instant(), told).await {
                    Ok(Ok(result)) => result.map_err(fairway::actor::AskError::Domain),
                    _ => Err(timeout),
                }
            })
        })
    }

    fn deps(&self) -> Deps {
        let slow = self.latency;
        let quick = Duration::from_millis(2);
        let cloud = CloudPorts {
            who_am_i: self.port(quick, |n: &Node, _: WhoAmI| {
                let cloud = n.cloud.0.lock();
                Ok(Identity {
                    instance: cloud.instance.clone(),
                    instance_type: cloud.limits.type_name.clone(),
                    region: "r".to_owned(),
                    zone: "z".to_owned(),
                    vpc: "vpc-1".to_owned(),
                    vswitch: "vsw-a".into(),
                    primary_mac: Mac([0, 0x16, 0x3e, 0, 0, 1]),
                })
            }),
            instance_type: self.port(quick, |n: &Node, _: DescribeInstanceType| {
                n.cloud.call("describe-type", |c| Ok(c.limits.clone()))
            }),
            vswitches: self.port(quick, |n: &Node, m: DescribeVSwitches| {
                n.cloud.call("describe-vswitches", |c| Ok(c.describe_vswitches(&m)))
            }),
            enis: self.port(quick, |n: &Node, m: DescribeEnis| n.cloud.call("describe", |c| Ok(c.describe(&m)))),
            create: self.port(slow, |n: &Node, m: CreateEni| n.cloud.call("create", |c| c.create(&m))),
            attach: self.port(slow, |n: &Node, m: AttachEni| n.cloud.call("attach", |c| c.attach(&m.eni))),
            detach: self.port(slow, |n: &Node, m: DetachEni| {
                n.assert_unused(&m.eni);
                n.cloud.call("detach", |c| c.detach(&m.eni))
            }),
            delete: self.port(slow, |n: &Node, m: DeleteEni| n.cloud.call("delete", |c| c.delete(&m.eni))),
            assign4: self.port(slow, |n: &Node, m: AssignIpv4| n.cloud.call("assign4", |c| c.assign4(&m))),
            unassign4: self.port(slow, |n: &Node, m: UnassignIpv4| {
                let mac = n.cloud.0.lock().enis.get(&m.eni).map(|e| e.mac);
                let used = |ip: &Ipv4Addr| n.kernel.lock().wired.get(ip).is_some_and(|(.., on)| Some(*on) == mac);
                if m.addresses.iter().any(used) {
                    n.violations.lock().push(format!("{:?} taken away from pods", m.addresses));
                }
                n.cloud.call("unassign4", |c| c.unassign4(&m))
            }),
            assign6: self.port(slow, |n: &Node, m: AssignIpv6| n.cloud.call("assign6", |c| c.assign6(&m))),
            unassign6: self.port(slow, |n: &Node, m: UnassignIpv6| n.cloud.call("unassign6", |c| c.unassign6(&m))),
        };
        let netns = NetnsPorts {
            prepare: self.port(quick, |n: &Node, m: PrepareEni| {
                let attached = n.cloud.0.lock().enis.get(&m.eni.id).is_some_and(|e| e.instance.is_some());
                let in_pod = n
                    .kernel
                    .lock()
                    .wired
                    .values()
                    .any(|(_, mode, mac)| *mode == AttachMode::Exclusive && *mac == m.eni.mac);
                match attached && !in_pod {
                    true => {
                        let ifname = format!("eth{}", m.eni.mac.0[5]);
                        Ok(PreparedEni { ifname, ifindex: 2, rx_queues: 2, mtu: 1500, receive_cores: vec![] })
                    }
                    false => Err(WireError::DeviceMissing(m.eni.id)),
                }
            }),
            forget: self.port(quick, |_: &Node, _: ForgetEni| Ok(())),
            unwire: self.port(quick, |n: &Node, m: Unwire| {
                n.unwire(&m.lease);
                Ok(())
            }),
            inventory: self.port(quick, |n: &Node, _: Inventory| Ok(n.inventory())),
        };
        Deps {
            config: self.config.clone(),
            ledger: LedgerPlace::Memory(self.store.clone()),
            cloud,
            netns,
            bound: self.bound.subscribe(),
            elected: self.elected.subscribe(),
            snapshots: self.snapshots.clone(),
        }
    }

    fn assert_unused(&self, eni: &EniId) {
        let Some(mac) = self.cloud.0.lock().enis.get(eni).map(|e| e.mac) else { return };
        let used = self.kernel.lock().wired.iter().find(|(_, (.., on))| *on == mac).map(|(ip, _)| *ip);
        if let Some(ip) = used {
            self.violations.lock().push(format!("{eni} is detached while {ip} is in use"));
        }
    }

    /// What a host link says.
    fn says(&self, attachment: &AttachmentId, ip: Ipv4Addr) -> Attached {
        let n = attachment.sandbox.as_str().rsplit('-').next().unwrap_or_default();
        let mut said = says(attachment, ip, None, &PodKey::new("ns", format!("pod-{n}")));
        said.note.netns = Some(self.netns.path().join(attachment.sandbox.as_str()));
        said
    }

    pub fn inventory(&self) -> KernelInventory {
        let kernel = self.kernel.lock();
        let in_pods: BTreeSet<Mac> =
            kernel.wired.values().filter(|(_, m, _)| *m == AttachMode::Exclusive).map(|(.., mac)| *mac).collect();
        let attached = self.cloud.secondary().into_iter().filter(|e| e.instance.is_some());
        let veth = || kernel.wired.iter().filter(|(_, (_, m, _))| *m == AttachMode::Veth);
        let routed: Vec<IpAddr> = veth().map(|(ip, _)| IpAddr::V4(*ip)).collect();
        KernelInventory {
            enis: attached.filter(|e| !in_pods.contains(&e.mac)).map(|e| (e.mac, e.id.to_string())).collect(),
            host_links: kernel.wired.values().map(|(a, ..)| a.to_string()).collect(),
            ruled: routed.clone(),
            routed,
            attached: kernel
                .wired
                .iter()
                .filter(|(_, (a, ..))| noted(a))
                .map(|(ip, (a, ..))| self.says(a, *ip))
                .collect(),
            ..KernelInventory::default()
        }
    }

    /// Start the agent; a previous life is over.
    pub async fn start(&self) -> Agent {
        let agent = self.start_now();
        for _ in 0..100 {
            let lookup = Lookup { attachment: Self::attachment(0) };
            if agent.pool.ask(lookup, Deadline::after(Duration::from_secs(20))).await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        agent
    }

    pub fn start_now(&self) -> Agent {
        self.life.fetch_add(1, Ordering::Relaxed);
        let mut deps = self.deps();
        deps.ledger = match &self.folder {
            Some(folder) => LedgerPlace::Folder(folder.clone()),
            None => LedgerPlace::Memory(self.store.next_life()),
        };
        let mut tree = Tree::new(Registry::default(), Placement::Here, ChildPolicy::default());
        let pool = tree.child(move || Pool::start(deps.clone()));
        Agent { tree, pool }
    }

    /// kill -9: nothing it still wanted to do happens.
    pub fn kill(&self) {
        self.life.fetch_add(1, Ordering::Relaxed);
        self.store.next_life();
    }

    pub fn attachment(n: u32) -> AttachmentId {
        AttachmentId { sandbox: format!("sandbox-{n}").into(), ifname: "eth0".to_owned() }
    }

    fn netns_of(&self, n: u32) -> PathBuf {
        self.netns.path().join(format!("sandbox-{n}"))
    }

    /// One CNI ADD; the pod uses its address afterwards.
    pub async fn add(&self, pool: &Handle<Pool>, n: u32, mode: AttachMode, budget: Duration) -> Result<Lease, String> {
        let netns = self.netns_of(n);
        std::fs::write(&netns, "").unwrap();
        let request = Allocate {
            attachment: Self::attachment(n),
            pod: PodKey::new("ns", format!("pod-{n}")),
            pod_uid: Some(format!("uid-{n}")),
            mode,
            netns,
            bandwidth: Bandwidth::default(),
            traffic: Default::default(),
            reserve: n.is_multiple_of(5).then_some(self.config.reservation),
        };
        let deadline = Deadline::after(budget);
        let lease = pool.ask(request, deadline).await.map_err(|e| e.to_string())?;
        self.wire(&lease)?;
        pool.ask(Confirm { attachment: Self::attachment(n) }, deadline).await.map_err(|e| e.to_string())?;
        Ok(lease)
    }

    fn wire(&self, lease: &Lease) -> Result<(), String> {
        let cloud = self.cloud.0.lock();
        // Somebody may have taken it away behind the pool's back.
        let eni = cloud.enis.get(&lease.eni.id).filter(|e| e.instance.is_some()).ok_or("no such device")?;
        assert!(eni.ipv4.contains(&lease.v4), "{} is not assigned here", lease.v4);
        drop(cloud);
        let user = (lease.attachment.clone(), lease.mode, lease.eni.mac);
        let before = self.kernel.lock().wired.insert(lease.v4, user.clone());
        let same = before.as_ref().is_none_or(|b| *b == user);
        assert!(same, "{} on {} is given to {}, and used by {before:?}", lease.v4, lease.eni.mac, lease.attachment);
        Ok(())
    }

    fn unwire(&self, lease: &Lease) {
        let mut kernel = self.kernel.lock();
        // A recovered lease does not know its attachment.
        let theirs = |(a, ..): &(AttachmentId, AttachMode, Mac)| {
            *a == lease.attachment || lease.attachment.sandbox.as_str().starts_with("recovered-")
        };
        if kernel.wired.get(&lease.v4).is_some_and(theirs) {
            kernel.wired.remove(&lease.v4);
        }
    }

    /// One CNI DEL.
    pub async fn del(&self, pool: &Handle<Pool>, n: u32, budget: Duration) -> Result<(), String> {
        let deadline = Deadline::after(budget);
        let attachment = Self::attachment(n);
        let begun = pool.ask(BeginRelease { attachment: attachment.clone() }, deadline).await;
        if let Some(lease) = begun.map_err(|e| e.to_string())? {
            self.unwire(&lease);
            pool.ask(FinishRelease { attachment }, deadline).await.map_err(|e| e.to_string())?;
        }
        self.remove_sandbox(n);
        Ok(())
    }

    /// The runtime removes the namespace; what is in it goes with it.
    pub fn remove_sandbox(&self, n: u32) {
        let _ = std::fs::remove_file(self.netns_of(n));
        let attachment = Self::attachment(n);
        self.kernel.lock().wired.retain(|_, (a, ..)| *a != attachment);
    }

    /// kubelet: try until it works.
    pub async fn insist_add(&self, pool: &Handle<Pool>, n: u32, mode: AttachMode) -> Lease {
        for _ in 0..200 {
            match self.add(pool, n, mode, Duration::from_secs(20)).await {
                Ok(lease) => return lease,
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
        panic!("pod {n} never got an address")
    }

    pub async fn insist_del(&self, pool: &Handle<Pool>, n: u32) {
        for _ in 0..200 {
            match self.del(pool, n, Duration::from_secs(20)).await {
                Ok(()) => return,
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
        panic!("pod {n} could not be released")
    }

    pub async fn leases(&self, pool: &Handle<Pool>) -> Vec<Lease> {
        pool.ask(Leases {}, Deadline::after(Duration::from_secs(60))).await.unwrap()
    }

    /// Ask for an audit until it is clean; the last report when it never is.
    pub async fn audit(&self, pool: &Handle<Pool>) -> AuditReport {
        let mut report = AuditReport::default();
        for _ in 0..60 {
            match pool.ask(Audit {}, Deadline::after(Duration::from_secs(60))).await {
                Ok(found) if found.clean() => return found,
                Ok(found) => report = found,
                Err(e) => report.unknown = vec![e.to_string()],
            }
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        report
    }

    pub fn bind(&self, pods: &[u32]) {
        let pods = pods.iter().map(|n| BoundPod {
            pod: PodKey::new("ns", format!("pod-{n}")),
            uid: format!("uid-{n}"),
            mode: AttachMode::Veth,
            terminated: false,
            addresses: Vec::new(),
        });
        self.bound.send_replace(Some(Arc::new(pods.collect())));
    }

    /// The cluster knows exactly the pods that run.
    pub fn bind_all_wired(&self) {
        let wired: Vec<u32> = self
            .kernel
            .lock()
            .wired
            .values()
            .filter_map(|(a, ..)| a.sandbox.as_str().strip_prefix("sandbox-")?.parse().ok())
            .collect();
        let pods = self.kernel.lock().wired.clone();
        self.bind(&wired);
        let mut bound = (**self.bound.borrow().as_ref().unwrap()).clone();
        for pod in &mut bound {
            let mine = |(_, (a, ..)): &(&Ipv4Addr, &(AttachmentId, AttachMode, Mac))| {
                a.sandbox.as_str().strip_prefix("sandbox-") == pod.pod.name.strip_prefix("pod-")
            };
            pod.addresses = pods.iter().filter(mine).map(|(ip, _)| IpAddr::V4(*ip)).collect();
            if pods.iter().find(mine).is_some_and(|(_, (_, mode, _))| *mode == AttachMode::Exclusive) {
                pod.mode = AttachMode::Exclusive;
            }
        }
        self.bound.send_replace(Some(Arc::new(bound)));
    }

    pub fn snapshot(&self) -> Arc<PoolSnapshot> {
        self.snapshots.borrow().clone()
    }
}
