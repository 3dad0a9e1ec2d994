//! What PolicyCompiler's worker thread owns: the compiler and the kernel's tables.
//!
//! Two ways to bring the tables up to date. Ordinarily the compiler's writes are
//! made as they come. At the start, and after a write that the kernel refused, the
//! tables are compared with what they should be: what is missing comes first, pods
//! change over, what is too much goes last. Until the cluster has been seen whole
//! nothing is written but that a new pod is closed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::compile::Compiler;
use super::explain::{Judged, Question};
use super::index::Index;
use super::maps::{Change, PolicyMaps, blocks_of};
use super::memory::Memory;
use super::model::Name;
use super::tables::{Endpoint, Enforced, RuleId, RuleName, Write};
use crate::model::AttachmentId;

pub struct Desk {
    maps: Box<dyn PolicyMaps>,
    index: Index,
    memory: Memory,
    compiler: Compiler,
    /// Whose device it is.
    attachments: BTreeMap<Endpoint, AttachmentId>,
    /// The pods that were here at the start, until their devices have been seen.
    expected: BTreeMap<AttachmentId, Name>,
    /// Rules whose hits are counted, and in how many entries each is.
    counted: HashMap<RuleId, (RuleName, u32)>,
    /// The cluster has been seen whole.
    complete: bool,
    /// The tables are what the compiler takes them for.
    in_step: bool,
}

/// How a pod stands when it has been asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its policies are in force.
    Enforced(Enforced),
    /// The cluster, or this pod, has not been seen yet.
    Unknown,
    /// It has no device.
    Missing,
}

/// How things are after a look at what has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    pub writes: usize,
    pub took_us: u64,
    pub policies: usize,
    pub rules: usize,
    pub addresses: usize,
    pub ranges: usize,
    pub profiles: usize,
    /// Of this node: pods, and those that some policy isolates.
    pub pods: usize,
    pub isolated: usize,
    /// Of these, closed until they are known.
    pub closed: usize,
}

impl Desk {
    pub fn open(maps: Box<dyn PolicyMaps>, index: Index, memory: Memory) -> Self {
        Self {
            maps,
            index,
            memory,
            compiler: Compiler::default(),
            attachments: BTreeMap::new(),
            expected: BTreeMap::new(),
            counted: HashMap::new(),
            complete: false,
            in_step: false,
        }
    }

    /// The pods that were here before: their policies stay in force until the
    /// cluster is known.
    pub fn adopt(&mut self, pods: &[(AttachmentId, Name)]) -> Result<(), String> {
        self.expected = pods.iter().cloned().collect();
        self.place_expected()
    }

    fn place_expected(&mut self) -> Result<(), String> {
        if self.expected.is_empty() {
            return Ok(());
        }
        for (attachment, endpoint, _) in self.maps.pods()? {
            if let Some(name) = self.expected.remove(&attachment) {
                self.place(endpoint, attachment, name);
            }
        }
        Ok(())
    }

    fn place(&mut self, endpoint: Endpoint, attachment: AttachmentId, pod: Name) {
        self.attachments.insert(endpoint, attachment);
        self.compiler.set_endpoint(endpoint, Some(pod));
    }

    fn take_news(&mut self) {
        let was_complete = self.complete;
        let news = self.index.take();
        self.complete |= news.complete;
        for (name, labels) in news.namespaces {
            self.compiler.set_namespace(&name, labels);
        }
        for (name, pod) in news.pods {
            self.compiler.set_pod(name, pod);
        }
        let others = !news.policies.is_empty() || news.complete && !was_complete;
        for (name, policy) in news.policies {
            self.compiler.set_policy(name, policy);
        }
        if self.complete && others {
            self.memory.put(self.compiler.guarded_namespaces());
        }
    }

    /// Bring the tables up to date; `None` while the cluster is not known whole.
    pub fn settle(&mut self) -> Result<Option<Settled>, String> {
        let began = Instant::now();
        self.take_news();
        if !self.complete {
            return Ok(None);
        }
        let writes = match self.in_step {
            true => self.go_on()?,
            false => self.compare()?,
        };
        if writes > 0 {
            self.maps.next_generation()?;
        }
        Ok(Some(self.settled(writes, began.elapsed())))
    }

    /// The compiler's own writes, in its order.
    fn go_on(&mut self) -> Result<usize, String> {
        let writes = self.compiler.settle();
        self.in_step = false;
        for write in &writes {
            self.write(write)?;
        }
        self.in_step = true;
        Ok(writes.len())
    }

    fn write(&mut self, write: &Write) -> Result<(), String> {
        match write {
            Write::Rule(profile, class, Some(open)) => {
                self.count(open.iter().map(|o| &o.by))?;
                self.maps.apply(&Change::PutRules(*profile, *class, open.clone()))
            }
            Write::Rule(profile, class, None) => {
                let Some(open) = self.compiler.dropped(*profile, *class) else { return Ok(()) };
                self.maps.apply(&Change::DropRules(*profile, *class, blocks_of(&open)))?;
                self.discount(open.iter().map(|o| &o.by))
            }
            Write::Address(ip, class) => self.maps.apply(&Change::Address(*ip, *class)),
            Write::Net(net, class) => self.maps.apply(&Change::Net(*net, *class)),
            Write::Endpoint(endpoint, how) => self.enforce(*endpoint, how.unwrap_or_default()),
        }
    }

    /// A pod that is gone meanwhile needs none.
    fn enforce(&mut self, endpoint: Endpoint, how: Enforced) -> Result<(), String> {
        let Some(attachment) = self.attachments.get(&endpoint).cloned() else { return Ok(()) };
        self.maps.enforce(&attachment, how).map(drop)
    }

    fn count<'a>(&mut self, rules: impl Iterator<Item = &'a RuleName>) -> Result<(), String> {
        for name in rules {
            let id = name.id();
            let (_, uses) = self.counted.entry(id).or_insert_with(|| (name.clone(), 0));
            *uses += 1;
            if *uses == 1 {
                self.maps.apply(&Change::Count(id, true))?;
            }
        }
        Ok(())
    }

    fn discount<'a>(&mut self, rules: impl Iterator<Item = &'a RuleName>) -> Result<(), String> {
        for name in rules {
            let id = name.id();
            let Some((_, uses)) = self.counted.get_mut(&id) else { continue };
            *uses -= 1;
            if *uses == 0 {
                self.counted.remove(&id);
                self.maps.apply(&Change::Count(id, false))?;
            }
        }
        Ok(())
    }

    /// What the tables lack and what they have too much of.
    fn compare(&mut self) -> Result<usize, String> {
        let _ = self.compiler.settle();
        let wanted = self.compiler.tables();
        let found = self.maps.read()?;
        let mut writes = 0;
        let mut apply = |maps: &mut Box<dyn PolicyMaps>, change: Change| {
            writes += 1;
            maps.apply(&change)
        };
        self.counted.clear();
        for open in wanted.rules.values().flat_map(|open| open.iter()) {
            self.counted.entry(open.by.id()).or_insert_with(|| (open.by.clone(), 0)).1 += 1;
        }
        for rule in self.counted.keys().filter(|rule| !found.counted.contains(rule)) {
            apply(&mut self.maps, Change::Count(*rule, true))?;
        }
        for ((profile, class), open) in &wanted.rules {
            // What a pair says is in its name.
            if found.rules.get(&(*profile, *class)) != Some(&blocks_of(open)) {
                apply(&mut self.maps, Change::PutRules(*profile, *class, open.clone()))?;
            }
        }
        for (ip, class) in wanted.addresses.iter().filter(|(ip, class)| found.addresses.get(ip) != Some(class)) {
            apply(&mut self.maps, Change::Address(*ip, Some(*class)))?;
        }
        for (net, class) in wanted.nets.iter().filter(|(net, class)| found.nets.get(net) != Some(class)) {
            apply(&mut self.maps, Change::Net(*net, Some(*class)))?;
        }
        let mut moved = 0;
        for (attachment, endpoint, how) in self.maps.pods()? {
            let wanted = wanted.endpoints.get(&endpoint).copied().unwrap_or_default();
            // Of a pod that nobody has named yet nothing is known.
            if self.attachments.get(&endpoint) == Some(&attachment) && wanted != how {
                self.maps.enforce(&attachment, wanted)?;
                moved += 1;
            }
        }
        for ip in found.addresses.keys().filter(|ip| !wanted.addresses.contains_key(ip)) {
            apply(&mut self.maps, Change::Address(*ip, None))?;
        }
        for net in found.nets.keys().filter(|net| !wanted.nets.contains_key(net)) {
            apply(&mut self.maps, Change::Net(*net, None))?;
        }
        // Of a pod that nobody has named yet the profile may be in force.
        let held: BTreeSet<u64> =
            self.maps.pods()?.iter().flat_map(|(_, _, how)| [how.ingress, how.egress]).flatten().collect();
        let left =
            |(profile, class): &(u64, u64)| !wanted.rules.contains_key(&(*profile, *class)) && !held.contains(profile);
        for ((profile, class), blocks) in found.rules.iter().filter(|(pair, _)| left(pair)) {
            apply(&mut self.maps, Change::DropRules(*profile, *class, *blocks))?;
        }
        for rule in found.counted.iter().filter(|rule| !self.counted.contains_key(rule)) {
            apply(&mut self.maps, Change::Count(*rule, false))?;
        }
        self.in_step = true;
        Ok(writes + moved)
    }

    /// Put a pod under its policies, if both are known. `uid`: of this pod and no
    /// earlier one of its name.
    pub fn try_enforce(&mut self, attachment: &AttachmentId, pod: &Name, uid: Option<u64>) -> Result<Standing, String> {
        self.take_news();
        let known = self.compiler.uid(pod);
        let shown = known.is_some() && uid.is_none_or(|uid| known == Some(uid));
        // Where there is no policy nothing about the pod matters.
        if !self.complete || !shown && self.compiler.guarded(&pod.namespace) != Enforced::default() {
            return Ok(Standing::Unknown);
        }
        self.enforce_now(attachment, pod)
    }

    /// Whatever is known by now: a pod that is not is closed where a policy may be
    /// meant for it, as its namespace had policies while they are not known.
    pub fn enforce_now(&mut self, attachment: &AttachmentId, pod: &Name) -> Result<Standing, String> {
        let Some(endpoint) = self.maps.endpoint(attachment)? else { return Ok(Standing::Missing) };
        self.expected.remove(attachment);
        self.place(endpoint, attachment.clone(), pod.clone());
        if self.settle()?.is_none() {
            let how = self.memory.closed(&pod.namespace);
            return Ok(self.maps.enforce(attachment, how)?.map_or(Standing::Missing, |_| Standing::Enforced(how)));
        }
        Ok(Standing::Enforced(self.compiler.enforced(endpoint)))
    }

    /// Forget the pods whose devices are gone, and see that the others are as they
    /// should be.
    pub fn sweep(&mut self) -> Result<Option<Settled>, String> {
        self.place_expected()?;
        let pods = self.maps.pods()?;
        let differs = |(attachment, endpoint, how): &(AttachmentId, Endpoint, Enforced)| {
            self.attachments.get(endpoint) == Some(attachment) && self.compiler.enforced(*endpoint) != *how
        };
        if pods.iter().any(differs) {
            self.in_step = false;
        }
        let there: BTreeMap<Endpoint, AttachmentId> =
            pods.into_iter().map(|(attachment, endpoint, _)| (endpoint, attachment)).collect();
        let gone: Vec<Endpoint> =
            self.attachments.iter().filter(|(e, id)| there.get(e) != Some(*id)).map(|(e, _)| *e).collect();
        for endpoint in gone {
            self.attachments.remove(&endpoint);
            self.compiler.set_endpoint(endpoint, None);
        }
        self.settle()
    }

    fn settled(&self, writes: usize, took: Duration) -> Settled {
        let sizes = self.compiler.sizes();
        Settled {
            writes,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            policies: sizes.policies,
            rules: sizes.rules,
            addresses: sizes.addresses,
            ranges: sizes.ranges,
            profiles: sizes.profiles,
            pods: self.attachments.len(),
            isolated: sizes.isolated,
            closed: sizes.closed,
        }
    }

    /// How a pod of this node is isolated.
    pub fn isolation(&self, attachment: &AttachmentId) -> Option<Enforced> {
        let (endpoint, _) = self.attachments.iter().find(|(_, id)| *id == attachment)?;
        Some(self.compiler.enforced(*endpoint))
    }

    /// How often each rule has let somebody in or out.
    pub fn hits(&mut self) -> Result<Vec<(RuleName, u64)>, String> {
        let hits = self.maps.hits()?;
        let mut named: Vec<(RuleName, u64)> =
            hits.iter().filter_map(|(id, count)| Some((self.counted.get(id)?.0.clone(), *count))).collect();
        named.sort();
        Ok(named)
    }

    pub fn judge(&self, question: &Question) -> Result<Vec<Judged>, Name> {
        super::explain::judge(&self.compiler, question)
    }
}
