//! One-for-one supervision.
//!
//! Each child has a thread of its own, or shares one with those it talks to most
//! (in tests: the caller's). Its
//! supervisor builds it with a factory, watches its task, sees panics through
//! the join handle, and builds it anew after a back-off. Too many failures in a
//! short time escalate: the process ends with the reason, and the kernel goes
//! on forwarding meanwhile.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use rand::Rng as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Actor;
use super::context::{Cell, Stop};
use super::gate::Handle;
use super::registry::{ActorState, Record, Registry};
use super::watchdog::Watchdog;

/// Why an actor could not start, in words for the log and `/debug/actors`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

impl StartError {
    pub fn new(cause: impl std::fmt::Display) -> Self {
        Self(cause.to_string())
    }
}

/// How failures of a child are met.
#[derive(Clone, Copy, Debug)]
pub struct ChildPolicy {
    pub first_delay: Duration,
    pub max_delay: Duration,
    /// A child that ran this long is well again: its back-off starts over.
    pub healthy_after: Duration,
    /// This many failures within `window` escalate.
    pub max_failures: usize,
    pub window: Duration,
}

impl Default for ChildPolicy {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(30),
            healthy_after: Duration::from_secs(60),
            max_failures: 8,
            window: Duration::from_secs(60),
        }
    }
}

/// Where a child runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A named thread of its own: the rule.
    OwnThread,
    /// The caller's executor: for tests with paused time.
    Here,
}

/// A thread that several children share: what they say to each other wakes no
/// other processor. Nothing else changes, for no actor blocks its thread.
pub struct Together {
    starts: mpsc::UnboundedSender<Start>,
}

/// Called on the shared thread.
type Start = Box<dyn FnOnce() -> JoinHandle<()> + Send>;

/// A child failed too often.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{actor} failed too often, last: {reason}")]
pub struct Escalation {
    pub actor: &'static str,
    pub reason: String,
}

/// Run a future on a fresh single-threaded executor that can host actors.
pub fn run<F: Future>(work: F) -> F::Output {
    actix_rt::System::new().block_on(work)
}

/// The supervised children of the process, in start order. Dropping the tree
/// tells all of them to stop; [`Tree::shutdown`] also waits.
pub struct Tree {
    registry: Registry,
    placement: Placement,
    policy: ChildPolicy,
    children: Vec<Child>,
    escalate: mpsc::UnboundedSender<Escalation>,
    escalations: mpsc::UnboundedReceiver<Escalation>,
    _watchdog: Option<Watchdog>,
}

struct Child {
    name: &'static str,
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<()>,
}

impl Tree {
    pub fn new(registry: Registry, placement: Placement, policy: ChildPolicy) -> Self {
        let (escalate, escalations) = mpsc::unbounded_channel();
        let watchdog = (placement == Placement::OwnThread).then(|| Watchdog::start(registry.clone()));
        Self { registry, placement, policy, children: Vec::new(), escalate, escalations, _watchdog: watchdog }
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// A thread for several children. It ends when they have.
    pub fn together(&mut self, name: &str) -> Together {
        let (starts, mut started) = mpsc::unbounded_channel::<Start>();
        let body = async move {
            let mut children = Vec::new();
            while let Some(start) = started.recv().await {
                children.push(start());
            }
            futures::future::join_all(children).await;
        };
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(body));
        if let Err(e) = spawned {
            tracing::error!(error = %e, name, "No thread for several actors");
        }
        Together { starts }
    }

    /// Start a child on a thread of its own. The handle is good at once: until
    /// the child is up, requests are answered `Unavailable`.
    pub fn child<A, F, Fut>(&mut self, factory: F) -> Handle<A>
    where
        A: Actor,
        F: Fn() -> Fut + Send + 'static,
        Fut: Future<Output = Result<A, StartError>> + 'static,
    {
        self.start(None, factory)
    }

    /// Start a child beside others.
    pub fn child_in<A, F, Fut>(&mut self, thread: &Together, factory: F) -> Handle<A>
    where
        A: Actor,
        F: Fn() -> Fut + Send + 'static,
        Fut: Future<Output = Result<A, StartError>> + 'static,
    {
        self.start(Some(thread), factory)
    }

    fn start<A, F, Fut>(&mut self, together: Option<&Together>, factory: F) -> Handle<A>
    where
        A: Actor,
        F: Fn() -> Fut + Send + 'static,
        Fut: Future<Output = Result<A, StartError>> + 'static,
    {
        let record = Arc::new(Record::new(A::NAME, A::CAPACITY));
        self.registry.add(record.clone());
        let handle = Handle::<A>::new(record);
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = oneshot::channel();
        let supervise = {
            let handle = handle.clone();
            let escalate = self.escalate.clone();
            let policy = self.policy;
            move || async move {
                supervise(handle, factory, policy, stopped, escalate).await;
                let _ = end.send(());
            }
        };
        let failed = match (self.placement, together) {
            (Placement::Here, _) => {
                actix_rt::spawn(supervise());
                None
            }
            (Placement::OwnThread, None) => {
                let spawned = std::thread::Builder::new().name(A::NAME.to_owned()).spawn(move || run(supervise()));
                spawned.err().map(|e| e.to_string())
            }
            (Placement::OwnThread, Some(thread)) => {
                let sent = thread.starts.send(Box::new(move || actix_rt::spawn(supervise())));
                sent.err().map(|_| "the shared one has ended".to_owned())
            }
        };
        if let Some(why) = failed {
            let reason = format!("no thread for it: {why}");
            let _ = self.escalate.send(Escalation { actor: A::NAME, reason });
        }
        self.children.push(Child { name: A::NAME, stop, ended });
        handle
    }

    /// Resolves when some child has failed too often.
    pub async fn escalation(&mut self) -> Escalation {
        match self.escalations.recv().await {
            Some(escalation) => escalation,
            // `self.escalate` keeps the channel open.
            None => std::future::pending().await,
        }
    }

    /// Stop the children in reverse start order, each within what is left of
    /// the budget. Returns the names of those that did not stop in time.
    pub async fn shutdown(mut self, budget: Duration) -> Vec<&'static str> {
        let deadline = Instant::now() + budget;
        let mut late = Vec::new();
        while let Some(child) = self.children.pop() {
            let _ = child.stop.send(true);
            // A child whose thread is stuck must not eat the others' time.
            let share = deadline.min(Instant::now() + budget / 2);
            if tokio::time::timeout_at(share, child.ended).await.is_err() {
                late.push(child.name);
            }
        }
        late
    }
}

async fn supervise<A, F, Fut>(
    handle: Handle<A>,
    factory: F,
    policy: ChildPolicy,
    mut stop: watch::Receiver<bool>,
    escalate: mpsc::UnboundedSender<Escalation>,
) where
    A: Actor,
    F: Fn() -> Fut + 'static,
    Fut: Future<Output = Result<A, StartError>> + 'static,
{
    let record = handle.record().clone();
    let mut failures: VecDeque<Instant> = VecDeque::new();
    let mut streak = 0u32;
    loop {
        record.set_state(ActorState::Starting);
        record.beat();
        let began = Instant::now();
        let outcome = embody(&handle, &factory, &mut stop).await;
        handle.attach(None);
        let Err(reason) = outcome else {
            record.set_state(ActorState::Stopped);
            return;
        };

        record.restarted(reason.clone());
        let now = Instant::now();
        if now - began >= policy.healthy_after {
            streak = 0;
        }
        failures.push_back(now);
        while failures.front().is_some_and(|t| now - *t > policy.window) {
            failures.pop_front();
        }
        if failures.len() >= policy.max_failures {
            record.set_state(ActorState::Escalated);
            tracing::error!(actor = A::NAME, reason, failures = failures.len(), "Actor failed too often; giving up");
            let _ = escalate.send(Escalation { actor: A::NAME, reason });
            return;
        }

        let delay = back_off(&policy, streak);
        streak = streak.saturating_add(1);
        tracing::warn!(actor = A::NAME, reason, delay_ms = delay.as_millis() as u64, "Actor failed; rebuilding it");
        record.set_state(ActorState::BackingOff { millis: delay.as_millis() as u64 });
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = stop.wait_for(|s| *s) => {
                record.set_state(ActorState::Stopped);
                return;
            }
        }
    }
}

/// One life: build, run, end. `Ok` is an orderly stop.
async fn embody<A, F, Fut>(handle: &Handle<A>, factory: &F, stop: &mut watch::Receiver<bool>) -> Result<(), String>
where
    A: Actor,
    F: Fn() -> Fut,
    Fut: Future<Output = Result<A, StartError>>,
{
    let build = std::panic::AssertUnwindSafe(async { factory().await }).catch_unwind();
    let built = tokio::select! {
        built = build => built,
        _ = stop.wait_for(|s| *s) => return Ok(()),
    };
    let actor = match built {
        Ok(Ok(actor)) => actor,
        Ok(Err(e)) => return Err(format!("start: {e}")),
        Err(payload) => return Err(format!("start: panic: {}", panic_text(&*payload))),
    };
    let ended = Rc::new(RefCell::new(None));
    let context = actix::Context::new();
    let addr = actix::prelude::AsyncContext::address(&context);
    let task = actix_rt::spawn(context.into_future(Cell::new(actor, handle.clone(), ended.clone())));
    handle.attach(Some(addr.clone()));
    handle.record().set_state(ActorState::Running);
    let mut task = std::pin::pin!(task);
    let joined = tokio::select! {
        joined = &mut task => joined,
        _ = stop.wait_for(|s| *s) => {
            handle.attach(None);
            addr.do_send(Stop);
            let _ = (&mut task).await;
            return Ok(());
        }
    };
    match joined {
        Err(e) if e.is_panic() => Err(format!("panic: {}", panic_text(&*e.into_panic()))),
        Err(e) => Err(e.to_string()),
        Ok(()) => Err(ended.borrow_mut().take().unwrap_or_else(|| "stopped by itself".to_owned())),
    }
}

fn back_off(policy: &ChildPolicy, streak: u32) -> Duration {
    let full = policy.first_delay.saturating_mul(2u32.saturating_pow(streak.min(20))).min(policy.max_delay);
    full.mul_f64(rand::rng().random_range(0.8..=1.0))
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no text)")
}
