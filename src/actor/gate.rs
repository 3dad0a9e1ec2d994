//! Handles and ports: the only way to send an actor a message.
//!
//! A handle stays valid across restarts of its actor. Each request takes a
//! permit; without one the answer is `Busy`, at once.

use std::any::type_name;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::Semaphore;

use super::context::{Cell, Envelope};
use super::message::{AskError, Deadline, Message, Responder};
use super::registry::{Record, Ticket};
use super::{Actor, Handles};

/// The address of an actor, whoever embodies it at the moment.
pub struct Handle<A: Actor> {
    gate: Arc<Gate<A>>,
}

struct Gate<A: Actor> {
    addr: ArcSwapOption<actix::Addr<Cell<A>>>,
    permits: Arc<Semaphore>,
    record: Arc<Record>,
}

impl<A: Actor> Clone for Handle<A> {
    fn clone(&self) -> Self {
        Self { gate: self.gate.clone() }
    }
}

impl<A: Actor> Handle<A> {
    pub(super) fn new(record: Arc<Record>) -> Self {
        Self {
            gate: Arc::new(Gate {
                addr: ArcSwapOption::empty(),
                permits: Arc::new(Semaphore::new(A::CAPACITY)),
                record,
            }),
        }
    }

    pub(super) fn record(&self) -> &Arc<Record> {
        &self.gate.record
    }

    /// From here on requests reach this embodiment, or nobody.
    pub(super) fn attach(&self, addr: Option<actix::Addr<Cell<A>>>) {
        self.gate.addr.store(addr.map(Arc::new));
    }

    /// Ask, and wait for the answer until the deadline.
    pub async fn ask<M: Message>(&self, message: M, deadline: Deadline) -> Result<M::Reply, AskError<M::Error>>
    where
        A: Handles<M>,
    {
        let gate = &self.gate;
        let Ok(permit) = gate.permits.clone().try_acquire_owned() else {
            gate.record.busy(M::NAME);
            return Err(AskError::Busy { actor: A::NAME });
        };
        let Some(addr) = gate.addr.load_full() else {
            return Err(AskError::Unavailable { actor: A::NAME });
        };
        let ticket = Ticket::new(gate.record.clone(), M::NAME, permit);
        let (to, answer) = Responder::new(deadline, ticket);
        // The gate has already bounded the mailbox; an address that is closed
        // drops the envelope, which closes `answer`.
        addr.do_send(Envelope { message, to });
        match tokio::time::timeout_at(deadline.instant(), answer).await {
            Err(_) => Err(AskError::Timeout { actor: A::NAME, message: M::NAME }),
            // Its turn came too late, and it was dropped unhandled.
            Ok(Err(_)) if deadline.passed() => Err(AskError::Timeout { actor: A::NAME, message: M::NAME }),
            Ok(Err(_)) => Err(AskError::Unavailable { actor: A::NAME }),
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err(error))) => Err(AskError::Domain(error)),
        }
    }

    /// The capability to send this actor one kind of message.
    pub fn port<M: Message>(&self) -> Port<M>
    where
        A: Handles<M>,
    {
        let handle = self.clone();
        Port::new(A::NAME, move |message, deadline| {
            let handle = handle.clone();
            Box::pin(async move { handle.ask(message, deadline).await })
        })
    }
}

type Answer<M> = Pin<Box<dyn Future<Output = Result<<M as Message>::Reply, AskError<<M as Message>::Error>>> + Send>>;
type Ask<M> = dyn Fn(M, Deadline) -> Answer<M> + Send + Sync;

/// The capability to send one kind of message, to whom is not said. What an
/// actor needs of others it holds as ports, so that tests can give it probes.
pub struct Port<M: Message> {
    actor: &'static str,
    ask: Arc<Ask<M>>,
}

impl<M: Message> Clone for Port<M> {
    fn clone(&self) -> Self {
        Self { actor: self.actor, ask: self.ask.clone() }
    }
}

impl<M: Message> std::fmt::Debug for Port<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Port<{}> to {}", type_name::<M>(), self.actor)
    }
}

impl<M: Message> Port<M> {
    pub fn new(actor: &'static str, ask: impl Fn(M, Deadline) -> Answer<M> + Send + Sync + 'static) -> Self {
        Self { actor, ask: Arc::new(ask) }
    }

    /// A port that a plain function answers: a probe for tests.
    pub fn probe(answer: impl Fn(M) -> Result<M::Reply, M::Error> + Send + Sync + 'static) -> Self {
        Self::new("probe", move |message, _| {
            let result = answer(message).map_err(AskError::Domain);
            Box::pin(std::future::ready(result))
        })
    }

    pub async fn ask(&self, message: M, deadline: Deadline) -> Result<M::Reply, AskError<M::Error>> {
        (self.ask)(message, deadline).await
    }
}
