//! Messages, deadlines and answers.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::Span;

use super::registry::Ticket;

/// A request to an actor: what is asked, what comes back, how it fails.
pub trait Message: Send + 'static {
    /// As written in `actors.md`, metric labels and `/debug/actors`.
    const NAME: &'static str;
    type Reply: Send + 'static;
    type Error: Send + 'static;
}

/// The moment after which nobody waits for an answer any more. Absolute, so
/// that it can be passed on from message to message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(budget: Duration) -> Self {
        Self(Instant::now() + budget)
    }
    pub fn at(instant: Instant) -> Self {
        Self(instant)
    }
    pub fn instant(self) -> Instant {
        self.0
    }
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
    pub fn passed(self) -> bool {
        Instant::now() >= self.0
    }
    /// Earlier by `reserve`, so that the caller has time left to undo.
    pub fn leaving(self, reserve: Duration) -> Self {
        Self(self.0.checked_sub(reserve).unwrap_or(self.0))
    }
    /// The earlier of this and `budget` from now.
    pub fn within(self, budget: Duration) -> Self {
        Self(self.0.min(Instant::now() + budget))
    }
}

/// Why a request was not answered, or how it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError<E> {
    #[error("{actor} has as many requests in work as it accepts; try again")]
    Busy { actor: &'static str },
    #[error("{actor} did not answer {message} in time")]
    Timeout { actor: &'static str, message: &'static str },
    #[error("{actor} is being restarted; try again")]
    Unavailable { actor: &'static str },
    #[error("{0}")]
    Domain(E),
}

impl<E> AskError<E> {
    pub fn map<F>(self, f: impl FnOnce(E) -> F) -> AskError<F> {
        match self {
            AskError::Busy { actor } => AskError::Busy { actor },
            AskError::Timeout { actor, message } => AskError::Timeout { actor, message },
            AskError::Unavailable { actor } => AskError::Unavailable { actor },
            AskError::Domain(e) => AskError::Domain(f(e)),
        }
    }
    pub fn domain(self) -> Option<E> {
        match self {
            AskError::Domain(e) => Some(e),
            _ => None,
        }
    }
}

type Answered<M> = Result<<M as Message>::Reply, <M as Message>::Error>;

/// The way back to the caller. Holds the mailbox permit: the request counts as
/// in work until this is answered or dropped.
pub struct Responder<M: Message> {
    deadline: Deadline,
    span: Span,
    reply: oneshot::Sender<Answered<M>>,
    ticket: Ticket,
}

impl<M: Message> Responder<M> {
    pub(super) fn new(deadline: Deadline, ticket: Ticket) -> (Self, oneshot::Receiver<Answered<M>>) {
        let (reply, answer) = oneshot::channel();
        (Self { deadline, span: Span::current(), reply, ticket }, answer)
    }

    pub fn deadline(&self) -> Deadline {
        self.deadline
    }
    /// The caller's span: enter it, or instrument work with it.
    pub fn span(&self) -> &Span {
        &self.span
    }
    /// True when nobody waits any more: the caller gave up or is gone.
    pub fn abandoned(&self) -> bool {
        self.reply.is_closed() || self.deadline.passed()
    }
    pub fn answer(self, result: Result<M::Reply, M::Error>) {
        let Self { reply, mut ticket, .. } = self;
        ticket.finish(if result.is_ok() { "ok" } else { "error" });
        // The permit is back before the caller knows, so that who asks one after
        // the other is never refused. A caller that no longer waits is no error.
        drop(ticket);
        let _ = reply.send(result);
    }
    pub fn ok(self, reply: M::Reply) {
        self.answer(Ok(reply));
    }
    pub fn fail(self, error: M::Error) {
        self.answer(Err(error));
    }
    pub(super) fn begin(&mut self) {
        self.ticket.begin();
    }
    pub(super) fn expire(mut self) {
        self.ticket.finish("expired");
    }
}
