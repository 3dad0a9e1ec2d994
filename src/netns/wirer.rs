//! The actor: takes requests, gives them to wiring threads, waits for devices.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tracing::Instrument as _;

use super::desk::{self, Desk, Locks, Shared};
use super::monitor::{self, Monitor, Watched};
use super::nl::NlError;
use super::undo::{self, Returned, Undone};
use super::unlink::{self, Unlinker};
use super::{
    BadConfig, Config, ForgetEni, Inventory, KernelInventory, PodPrograms, PrepareEni, PreparedEni, Unwire, Verify,
    Wire, WireError, queues,
};
use crate::actor::{Actor, Ctx, Deadline, Handles, Message, Responder, StartError, Worker, WorkerGone};
use crate::model::{AttachMode, EniRef, Lease, Mac};

/// How long an exclusive ENI may take to come back from a namespace that died.
const RETURN: Duration = Duration::from_secs(3);
/// Left of a deadline for the answer to travel.
const RESERVE: Duration = Duration::from_millis(50);

/// What every embodiment of the actor is built from.
pub struct Wiring {
    shared: Arc<Shared>,
}

impl Wiring {
    pub fn new(config: Config, programs: Arc<dyn PodPrograms>) -> Result<Arc<Self>, BadConfig> {
        config.validate()?;
        let shared = Shared { config, programs, locks: Locks::default(), eni_index: Default::default() };
        Ok(Arc::new(Self { shared: Arc::new(shared) }))
    }
}

/// The actor. Works in the network namespace of the thread it is built on.
pub struct NetnsWirer {
    shared: Arc<Shared>,
    crew: Crew,
    unlinker: Unlinker,
    monitor: Rc<Monitor>,
    /// Shared ENIs as last prepared; made right again when their device changes.
    prepared: HashMap<Mac, (EniRef, Watched)>,
}

impl NetnsWirer {
    /// For the supervisor's factory.
    pub async fn open(wiring: Arc<Wiring>) -> Result<Self, StartError> {
        let shared = wiring.shared.clone();
        let monitor = Monitor::start(&shared.config.link_prefix).map_err(StartError::new)?;
        let unlinker = Unlinker::start().map_err(StartError::new)?;
        let crew = Crew::start(&shared, &unlinker).await?;
        // Before any pod's packets rely on it.
        let told = crew.call("addresses", Desk::tell_addresses).await.map_err(StartError::new)?;
        told.map_err(StartError::new)?;
        Ok(Self { shared, crew, unlinker, monitor: Rc::new(monitor), prepared: HashMap::new() })
    }

    /// Answer with a wiring thread's work; a thread that ended fails the actor.
    fn answer<M: Message<Error = WireError>>(
        &self,
        to: Responder<M>,
        ctx: &mut Ctx<'_, Self>,
        work: impl Future<Output = Result<Result<M::Reply, WireError>, WorkerGone>> + 'static,
        then: impl FnOnce(&mut Self, &Result<M::Reply, WireError>) + 'static,
    ) {
        let span = to.span().clone();
        ctx.spawn(work.instrument(span), move |actor, outcome, ctx| {
            let result = match outcome {
                Ok(result) => result,
                Err(gone) => {
                    if gone == WorkerGone::Ended {
                        ctx.fail("a wiring thread has ended");
                    }
                    Err(WireError::Unavailable)
                }
            };
            then(actor, &result);
            to.answer(result);
        });
    }

    /// A shared ENI's device has changed: routes may have gone with its link. Or
    /// the node's addresses have.
    fn restore(&mut self, ctx: &mut Ctx<'_, Self>) {
        if self.monitor.take_addresses() {
            let work = self.crew.call("addresses", Desk::tell_addresses);
            ctx.spawn(work, |_, outcome, _| {
                if let Ok(Err(error)) = outcome {
                    tracing::warn!(%error, "The node's addresses changed and the programs could not be told");
                }
            });
        }
        for mac in self.monitor.take_changed() {
            let Some((eni, _)) = self.prepared.get(&mac) else { continue };
            let eni = eni.clone();
            let work = self.crew.call(&eni.id.to_string(), move |desk| desk.prepare(&eni, true));
            ctx.spawn(work, |_, outcome, _| {
                if let Ok(Err(error)) = outcome {
                    tracing::warn!(%error, "ENI changed and could not be prepared again");
                }
            });
        }
    }
}

impl Actor for NetnsWirer {
    const NAME: &'static str = "NetnsWirer";
    const CAPACITY: usize = 512;

    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        ctx.on_change(self.monitor.changes(), |actor: &mut Self, _, ctx| actor.restore(ctx));
        Ok(())
    }
}

impl Handles<Wire> for NetnsWirer {
    fn handle(&mut self, Wire { lease }: Wire, to: Responder<Wire>, ctx: &mut Ctx<'_, Self>) {
        let deadline = to.deadline();
        let attachment = lease.attachment.clone();
        let work = self.crew.call(&attachment.to_string(), move |desk| {
            // Whoever asked has begun to undo it: making it now would leave it behind.
            if deadline.passed() {
                let cause = "its turn came after the deadline".to_owned();
                return Err(WireError::Kernel { attachment, step: "wire".to_owned(), cause });
            }
            desk.wire(&lease)
        });
        self.answer(to, ctx, work, |_, _| {});
    }
}

impl Handles<Unwire> for NetnsWirer {
    fn handle(&mut self, Unwire { lease }: Unwire, to: Responder<Unwire>, ctx: &mut Ctx<'_, Self>) {
        let deadline = to.deadline().leaving(RESERVE).within(RETURN);
        // A DEL repeated after its ENI was given to shared pods.
        let reused = self.prepared.contains_key(&lease.eni.mac);
        let unlink = {
            let (unlinker, shared) = (self.unlinker.clone(), self.shared.clone());
            move |lease: &Lease, index| unlinker.remove(index, undo::then_detach(&shared, lease))
        };
        let work = unwire(self.crew.clone(), self.monitor.clone(), unlink, lease, reused, deadline);
        self.answer(to, ctx, work, |_, _| {});
    }
}

impl Handles<Verify> for NetnsWirer {
    fn handle(&mut self, Verify { lease }: Verify, to: Responder<Verify>, ctx: &mut Ctx<'_, Self>) {
        let work = self.crew.call(&lease.attachment.to_string(), move |desk| desk.verify(&lease));
        self.answer(to, ctx, work, |_, _| {});
    }
}

impl Handles<PrepareEni> for NetnsWirer {
    fn handle(&mut self, ask: PrepareEni, to: Responder<PrepareEni>, ctx: &mut Ctx<'_, Self>) {
        let deadline = to.deadline().leaving(RESERVE);
        let watched = self.monitor.watch(ask.eni.mac);
        let kept = ask.clone();
        let work = prepare(self.crew.clone(), self.monitor.changes(), ask, deadline);
        self.answer(to, ctx, work, move |actor, result| {
            if kept.shared && result.is_ok() {
                actor.prepared.insert(kept.eni.mac, (kept.eni, watched));
            }
        });
    }
}

impl Handles<ForgetEni> for NetnsWirer {
    fn handle(&mut self, ForgetEni { eni }: ForgetEni, to: Responder<ForgetEni>, ctx: &mut Ctx<'_, Self>) {
        self.prepared.remove(&eni.mac);
        let work = self.crew.call(&eni.id.to_string(), move |desk| desk.forget(&eni));
        self.answer(to, ctx, work, |_, _| {});
    }
}

impl Handles<Inventory> for NetnsWirer {
    fn handle(&mut self, _: Inventory, to: Responder<Inventory>, ctx: &mut Ctx<'_, Self>) {
        let work = inventory(self.crew.clone(), self.monitor.handle(), self.shared.clone());
        self.answer(to, ctx, work, |_, _| {});
    }
}

type Outcome<T> = Result<Result<T, WireError>, WorkerGone>;

async fn prepare(
    crew: Crew,
    mut changes: watch::Receiver<u64>,
    ask: PrepareEni,
    deadline: Deadline,
) -> Outcome<PreparedEni> {
    loop {
        // Before looking: what happens from here on wakes us.
        changes.mark_unchanged();
        let PrepareEni { eni, shared } = ask.clone();
        match crew.call(&eni.id.to_string(), move |desk| desk.prepare(&eni, shared)).await? {
            Err(WireError::DeviceMissing(id)) => {
                if tokio::time::timeout_at(deadline.instant(), changes.changed()).await.is_err() {
                    return Ok(Err(WireError::DeviceMissing(id)));
                }
            }
            result => return Ok(result),
        }
    }
}

async fn unwire(
    crew: Crew,
    monitor: Rc<Monitor>,
    unlink: impl FnOnce(&Lease, u32) -> oneshot::Receiver<Result<(), NlError>>,
    lease: Lease,
    reused: bool,
    deadline: Deadline,
) -> Outcome<()> {
    let mac = lease.eni.mac;
    let _watched = (lease.mode == AttachMode::Exclusive).then(|| monitor.watch(mac));
    let mut changes = monitor.changes();
    let attachment = lease.attachment.to_string();
    changes.mark_unchanged();
    let undoing = crew.call(&attachment, {
        let lease = lease.clone();
        move |desk| desk.unwire(&lease, reused)
    });
    let Undone { mut returned, pair, mut causes } = match undoing.await? {
        Ok(undone) => undone,
        Err(e) => return Ok(Err(e)),
    };
    if let Some(index) = pair {
        let gone = unlink(&lease, index).await.unwrap_or_else(|_| Err(unlink::unanswered()));
        causes.extend(gone.err().map(|e| e.to_string()));
    }
    if !causes.is_empty() {
        return Ok(Err(desk::fault(&lease, "unwire", causes)));
    }
    while returned == Returned::NotYet {
        if tokio::time::timeout_at(deadline.instant(), changes.changed()).await.is_err() {
            // Detached meanwhile, or held by a process that outlives its pod:
            // PrepareEni will say when it is missed.
            tracing::warn!(eni = %lease.eni.id, %attachment, "ENI has not come back to the node");
            break;
        }
        match crew.call(&attachment, move |desk| desk.normalise(mac)).await? {
            Ok(true) => returned = Returned::Yes,
            Ok(false) => {}
            Err(e) => return Ok(Err(desk::kernel(&lease, &e))),
        }
    }
    Ok(Ok(()))
}

async fn inventory(crew: Crew, handle: rtnetlink::Handle, shared: Arc<Shared>) -> Outcome<KernelInventory> {
    let fault = |step: &str, cause: String| {
        let attachment = crate::model::AttachmentId { sandbox: "node".into(), ifname: "*".to_owned() };
        WireError::Kernel { attachment, step: step.to_owned(), cause }
    };
    let mut found = match monitor::inventory(handle, &shared.config).await {
        Ok(found) => found,
        Err(e) => return Ok(Err(fault("inventory", e.to_string()))),
    };
    let names: Vec<String> = found.enis.iter().map(|(_, name)| name.clone()).collect();
    let rest = crew.call("inventory", move |desk| {
        let Shared { config, programs, .. } = &*desk.shared;
        let spread = |name: String| (queues::report(&config.sysfs, &name), name);
        let receive: Vec<_> = names.into_iter().map(spread).filter(|(cores, _)| !cores.is_empty()).collect();
        programs.pinned().map(|pinned| (pinned, receive))
    });
    match rest.await? {
        Ok((pinned, receive)) => {
            found.pinned = pinned;
            found.receive = receive.into_iter().map(|(cores, name)| (name, cores)).collect();
            Ok(Ok(found))
        }
        Err(cause) => Ok(Err(fault("program", cause))),
    }
}

/// The wiring threads. A request goes to the one with the least to do, unless
/// another about the same attachment or ENI is in work: then it follows that one,
/// so that an undo never overtakes what it undoes.
#[derive(Clone)]
struct Crew {
    hands: Rc<[Hand]>,
    in_work: Rc<RefCell<HashMap<String, InWork>>>,
}

struct Hand {
    worker: Worker<Desk>,
    /// Requests given to it and not answered.
    load: Cell<usize>,
}

/// Requests about one thing: with which hand, how many.
struct InWork {
    hand: usize,
    requests: usize,
}

impl Crew {
    async fn start(shared: &Arc<Shared>, unlinker: &Unlinker) -> Result<Self, StartError> {
        let mut hands = Vec::new();
        for n in 0..shared.config.threads {
            let (shared, unlinker) = (shared.clone(), unlinker.clone());
            let open = move || Desk::open(shared, unlinker);
            let worker = Worker::start(format!("wiring-{n}"), NetnsWirer::CAPACITY * 2, open);
            hands.push(Hand { worker: worker.await.map_err(StartError::new)?, load: Cell::new(0) });
        }
        Ok(Self { hands: hands.into(), in_work: Rc::default() })
    }

    fn call<R, F>(&self, about: &str, job: F) -> impl Future<Output = Result<R, WorkerGone>> + use<R, F> + 'static
    where
        R: Send + 'static,
        F: FnOnce(&mut Desk) -> R + Send + 'static,
    {
        let freest = || (0..self.hands.len()).min_by_key(|n| self.hands[*n].load.get()).unwrap_or(0);
        let hand = {
            let mut in_work = self.in_work.borrow_mut();
            let entry = in_work.entry(about.to_owned()).or_insert_with(|| InWork { hand: freest(), requests: 0 });
            entry.requests += 1;
            entry.hand
        };
        self.hands[hand].load.set(self.hands[hand].load.get() + 1);
        let result = self.hands[hand].worker.call(job);
        let booked = Booked { crew: self.clone(), hand, about: about.to_owned() };
        async move {
            let result = result.await;
            drop(booked);
            result
        }
    }
}

/// Takes a request out of the books, answered or given up.
struct Booked {
    crew: Crew,
    hand: usize,
    about: String,
}

impl Drop for Booked {
    fn drop(&mut self) {
        let load = &self.crew.hands[self.hand].load;
        load.set(load.get() - 1);
        let mut in_work = self.crew.in_work.borrow_mut();
        if let Some(entry) = in_work.get_mut(&self.about) {
            entry.requests -= 1;
            if entry.requests == 0 {
                in_work.remove(&self.about);
            }
        }
    }
}
