//! Our layer over actix, and its only importer.
//!
//! actix gives a mailbox on a single-threaded executor. What it does not give,
//! this module does: a gate that carries a permit inside each message, so that
//! depth is exact and "busy" is an answer ([`Handle`]); answers that can be
//! given later ([`Responder`]); deadlines in every message ([`Deadline`]);
//! children rebuilt by a factory after a panic, with back-off and escalation
//! ([`Tree`]); a record of who does what since when ([`Registry`]), and a
//! watchdog outside every executor that reads it.
//!
//! An actor implements [`Actor`] and one [`Handles`] per message. Requests form
//! a DAG (see `actors.md`); facts that change are published through
//! `tokio::sync::watch` and taken up with [`Ctx::on_change`].
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "the one place that wraps actix")]

mod context;
mod gate;
mod message;
mod registry;
mod supervisor;
mod watchdog;
mod worker;

pub use context::{Ctx, Timer};
pub use gate::{Handle, Port};
pub use message::{AskError, Deadline, Message, Responder};
pub use registry::{ActorSnapshot, ActorState, MessageSnapshot, Registry, TypeSnapshot};
pub use supervisor::{ChildPolicy, Escalation, Placement, StartError, Together, Tree, run};
pub use worker::{Worker, WorkerGone, WorkerStartError};

/// An actor: state with one owner, changed only by its messages.
///
/// Built by a factory, afresh after every failure, from the ledger and the
/// kernel, never from the dead value.
pub trait Actor: Sized + Unpin + 'static {
    /// The same word in `actors.md`, metric labels, log targets, and the name of
    /// its thread when that is its own.
    const NAME: &'static str;
    /// How many requests may wait or be in work; one more is refused as busy.
    const CAPACITY: usize = 128;

    /// Called once, before the first message. An error counts as a failure.
    fn started(&mut self, ctx: &mut Ctx<'_, Self>) -> Result<(), StartError> {
        let _ = ctx;
        Ok(())
    }

    /// Called on an orderly stop, after the last message. Must not block.
    fn stopping(&mut self) {}
}

/// How an actor takes one kind of message. `to` may be answered here, moved
/// into work started with [`Ctx::spawn`], or kept until the answer is known;
/// dropped unanswered it tells the caller that the actor is unavailable.
pub trait Handles<M: Message>: Actor {
    fn handle(&mut self, message: M, to: Responder<M>, ctx: &mut Ctx<'_, Self>);
}
