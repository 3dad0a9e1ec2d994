//! What an actor may do while it handles a message.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::{ActorContext as _, ActorFutureExt as _, AsyncContext as _};
use tokio::sync::watch;

use super::gate::Handle;
use super::message::{Message, Responder};
use super::{Actor, Handles};

/// The actix actor around one of ours.
pub(super) struct Cell<A: Actor> {
    actor: A,
    handle: Handle<A>,
    ended: Ended,
}

/// Why the embodiment ended; `None` after an orderly stop.
pub(super) type Ended = Rc<RefCell<Option<String>>>;

impl<A: Actor> Cell<A> {
    pub(super) fn new(actor: A, handle: Handle<A>, ended: Ended) -> Self {
        Self { actor, handle, ended }
    }
}

type Actx<A> = actix::Context<Cell<A>>;

fn with<A: Actor, R>(cell: &mut Cell<A>, actx: &mut Actx<A>, f: impl FnOnce(&mut A, &mut Ctx<'_, A>) -> R) -> R {
    let mut ctx = Ctx { actx, handle: &cell.handle, ended: &cell.ended };
    f(&mut cell.actor, &mut ctx)
}

impl<A: Actor> actix::Actor for Cell<A> {
    type Context = Actx<A>;

    fn started(&mut self, actx: &mut Actx<A>) {
        self.handle.record().beat();
        actx.run_interval(Duration::from_millis(250), |cell, _| cell.handle.record().beat());
        if let Err(e) = with(self, actx, |actor, ctx| actor.started(ctx)) {
            *self.ended.borrow_mut() = Some(e.to_string());
            actx.stop();
        }
    }

    fn stopped(&mut self, _: &mut Actx<A>) {
        // Also runs while a panic unwinds, when the state may be broken.
        if !std::thread::panicking() {
            self.actor.stopping();
        }
    }
}

pub(super) struct Envelope<M: Message> {
    pub(super) message: M,
    pub(super) to: Responder<M>,
}

impl<M: Message> actix::Message for Envelope<M> {
    type Result = ();
}

impl<A: Handles<M>, M: Message> actix::Handler<Envelope<M>> for Cell<A> {
    type Result = ();

    fn handle(&mut self, Envelope { message, mut to }: Envelope<M>, actx: &mut Actx<A>) {
        self.handle.record().beat();
        if to.abandoned() {
            to.expire();
            return;
        }
        to.begin();
        let span = to.span().clone();
        let _in_caller = span.enter();
        with(self, actx, |actor, ctx| actor.handle(message, to, ctx));
    }
}

/// Orderly stop, from the supervisor.
pub(super) struct Stop;

impl actix::Message for Stop {
    type Result = ();
}

impl<A: Actor> actix::Handler<Stop> for Cell<A> {
    type Result = ();
    fn handle(&mut self, _: Stop, actx: &mut Actx<A>) {
        actx.stop();
    }
}

/// The actor's side of its executor: work, timers, its own handle.
pub struct Ctx<'a, A: Actor> {
    actx: &'a mut Actx<A>,
    handle: &'a Handle<A>,
    ended: &'a Ended,
}

impl<A: Actor> Ctx<'_, A> {
    /// Run `work` beside other messages; `then` takes its result up with the
    /// actor's state at hand. Dropped when the actor dies.
    pub fn spawn<T: 'static>(
        &mut self,
        work: impl Future<Output = T> + 'static,
        then: impl FnOnce(&mut A, T, &mut Ctx<'_, A>) + 'static,
    ) {
        let done =
            actix::fut::wrap_future::<_, Cell<A>>(work).map(move |out, cell: &mut Cell<A>, actx: &mut Actx<A>| {
                with(cell, actx, |actor, ctx| then(actor, out, ctx));
            });
        self.actx.spawn(done);
    }

    /// Answer a request with work that needs no state of the actor.
    pub fn answer<M: Message>(
        &mut self,
        to: Responder<M>,
        work: impl Future<Output = Result<M::Reply, M::Error>> + 'static,
    ) {
        let span = to.span().clone();
        let work = tracing::Instrument::instrument(work, span);
        self.spawn(work, move |_, result, _| to.answer(result));
    }

    pub fn after(&mut self, delay: Duration, f: impl FnOnce(&mut A, &mut Ctx<'_, A>) + 'static) -> Timer {
        Timer(self.actx.run_later(delay, move |cell, actx| with(cell, actx, f)))
    }

    pub fn cancel(&mut self, timer: Timer) {
        self.actx.cancel_future(timer.0);
    }

    pub fn every(&mut self, period: Duration, mut f: impl FnMut(&mut A, &mut Ctx<'_, A>) + 'static) {
        self.actx.run_interval(period, move |cell, actx| with(cell, actx, &mut f));
    }

    /// Call `f` with the current value of a fact and with each later one; values
    /// in between may be skipped, the newest never is.
    pub fn on_change<T: Clone + 'static>(
        &mut self,
        mut fact: watch::Receiver<T>,
        f: impl Fn(&mut A, T, &mut Ctx<'_, A>) + 'static,
    ) {
        fact.mark_changed();
        follow(self, fact, Rc::new(f));
    }

    pub fn handle(&self) -> Handle<A> {
        self.handle.clone()
    }

    /// Give up this embodiment: the supervisor builds a new one after a while.
    pub fn fail(&mut self, reason: impl Into<String>) {
        *self.ended.borrow_mut() = Some(reason.into());
        self.actx.stop();
    }
}

/// A pending [`Ctx::after`].
#[derive(Clone, Copy, Debug)]
pub struct Timer(actix::SpawnHandle);

type OnChange<A, T> = Rc<dyn Fn(&mut A, T, &mut Ctx<'_, A>)>;

fn follow<A: Actor, T: Clone + 'static>(ctx: &mut Ctx<'_, A>, mut fact: watch::Receiver<T>, f: OnChange<A, T>) {
    let next = async move {
        let changed = fact.changed().await.is_ok();
        (changed, fact)
    };
    ctx.spawn(next, move |actor, (changed, mut fact), ctx| {
        // A publisher that is gone will not change its mind any more.
        if changed {
            let value = fact.borrow_and_update().clone();
            f(actor, value, ctx);
            follow(ctx, fact, f);
        }
    });
}
