//! One turn: take what is queued, decide, write, answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng as _;

use super::outcome::{Answer, Trouble, meaning};
use super::state::{LeasePhase, Phase, Purpose, State};
use super::step::Step;
use super::work::{Subject, Work};
use super::{Allocate, BeginRelease, Confirm, FinishRelease, Leases, Lookup, Pool, PoolError, Waiting, plan};
use super::{Why, why};
use crate::actor::{Ctx, Responder};
use crate::model::AttachmentId;

/// Answer this long before the deadline, so that the caller hears the reason.
const MARGIN: Duration = Duration::from_millis(500);
/// What was written without a flush is flushed within this time. Whoever comes
/// meanwhile waits for the disk.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);
/// A ledger that could not be written is tried again this soon.
const LEDGER_RETRY: Duration = Duration::from_secs(1);

pub(super) enum Job {
    Confirm(AttachmentId, Responder<Confirm>),
    Begin(AttachmentId, Responder<BeginRelease>),
    Finish(AttachmentId, Responder<FinishRelease>),
    Lookup(AttachmentId, Responder<Lookup>),
    Leases(Responder<Leases>),
    /// A call was answered.
    Answered {
        work: Work,
        result: Result<Answer, Trouble>,
    },
    /// Steps found by a look at the outside; `first` completes the start.
    Found {
        steps: Vec<Step>,
        first: bool,
    },
}

/// What is said when the turn is durable, or why it is not.
type Reply = Box<dyn FnOnce(Result<(), PoolError>)>;

/// What one turn has done so far.
struct Turn {
    next: State,
    taken: Vec<&'static str>,
    replies: Vec<Reply>,
    /// Kept for another try when the ledger cannot be written.
    answered: Vec<Job>,
    ended: Vec<Subject>,
    reconciled: bool,
    doubt: bool,
}

impl Pool {
    /// Decide and write, unless a write is in flight (its end turns again).
    pub(super) fn turn(&mut self, ctx: &mut Ctx<'_, Self>) {
        let found = self.jobs.iter().any(|j| matches!(j, Job::Found { first: true, .. }));
        if self.committing || !(self.reconciled || found) {
            self.again = true;
            return;
        }
        self.again = false;
        let mut turn = Turn {
            next: self.state.clone(),
            taken: Vec::new(),
            replies: Vec::new(),
            answered: Vec::new(),
            ended: Vec::new(),
            reconciled: false,
            doubt: false,
        };
        // The start comes before everything that was queued during it.
        let mut jobs = std::mem::take(&mut self.jobs);
        jobs.sort_by_key(|j| !matches!(j, Job::Found { first: true, .. }));
        for job in jobs {
            self.take_up(job, &mut turn);
        }

        self.waiting.retain(|w| !w.to.abandoned());
        self.demand.waiting = self.unserved();
        self.demand.random = rand::rng().random();
        let now = self.clock.now();
        for step in plan::plan(&turn.next, &self.config, &self.demand, now) {
            self.demand.note_taken(&turn.next, &step);
            self.apply(step, &mut turn);
        }
        self.serve(&mut turn);

        if turn.doubt {
            self.look_soon(super::duties::Scope::Ours, ctx);
        }
        if turn.taken.is_empty() {
            self.finished(turn, Ok(()), ctx);
        } else {
            self.commit(turn, ctx);
        }
    }

    fn take_up(&mut self, job: Job, turn: &mut Turn) {
        match job {
            Job::Lookup(attachment, to) => {
                let lease = turn.next.lease_of(&attachment).map(|(_, h)| h.lease.clone());
                turn.reply(move |_| to.ok(lease));
            }
            Job::Leases(to) => {
                let leases = turn.next.leases().map(|(_, h)| h.lease.clone()).collect();
                turn.reply(move |_| to.ok(leases));
            }
            Job::Confirm(attachment, to) => match turn.next.lease_of(&attachment).map(|(v4, h)| (v4, h.phase)) {
                Some((_, LeasePhase::Wired)) => turn.reply(move |r| to.answer(r)),
                Some((v4, LeasePhase::Wiring)) => {
                    self.apply(Step::Confirm { v4 }, turn);
                    turn.reply(move |r| to.answer(r));
                }
                // Collected meanwhile, or being released: it must not be used.
                _ => to.fail(PoolError::BeingReleased(attachment)),
            },
            Job::Begin(attachment, to) => {
                let Some((v4, held)) = turn.next.lease_of(&attachment).map(|(v4, h)| (v4, h.clone())) else {
                    turn.reply(move |r| to.answer(r.map(|()| None)));
                    return;
                };
                if !held.going() {
                    self.apply(Step::Unwire { v4, collect: false }, turn);
                }
                turn.reply(move |r| to.answer(r.map(|()| Some(held.lease))));
            }
            Job::Finish(attachment, to) => {
                if let Some((v4, _)) = turn.next.lease_of(&attachment) {
                    self.apply(Step::Release { v4, quarantine: self.config.quarantine }, turn);
                }
                turn.reply(move |r| to.answer(r));
            }
            Job::Answered { work, result } => {
                if let Err(Trouble::Cloud(error)) = &result {
                    self.last_error = Some(error.clone());
                }
                let meaning = meaning(&turn.next, &self.config, &work, result.clone(), self.clock.now());
                for step in meaning.steps {
                    self.apply(step, turn);
                }
                turn.doubt |= meaning.doubt;
                turn.ended.push(work.subject());
                turn.answered.push(Job::Answered { work, result });
            }
            Job::Found { steps, first } => {
                for step in steps.iter().cloned() {
                    self.apply(step, turn);
                }
                turn.reconciled |= first;
                turn.answered.push(Job::Found { steps, first });
            }
        }
    }

    /// A step that no longer fits is left out: the state moved on meanwhile.
    fn apply(&self, step: Step, turn: &mut Turn) {
        match turn.next.apply(&step, self.clock.now()) {
            Ok(()) => turn.taken.push(step.name()),
            Err(refused) => tracing::debug!(%refused, "Step left out"),
        }
    }

    /// Requests without a lease, each attachment once.
    fn unserved(&self) -> Vec<Allocate> {
        let mut seen = BTreeSet::new();
        self.waiting.iter().filter(|w| seen.insert(&w.request.attachment)).map(|w| w.request.clone()).collect()
    }

    /// Line up the answers for those who have a lease now, and for those who
    /// never will.
    fn serve(&mut self, turn: &mut Turn) {
        let now = self.clock.now();
        let mut still = Vec::new();
        let mut whys = BTreeMap::new();
        for Waiting { request, to } in std::mem::take(&mut self.waiting) {
            if let Some((v4, held)) = turn.next.lease_of(&request.attachment) {
                if held.going() {
                    to.fail(PoolError::BeingReleased(request.attachment));
                } else if is_lost(&turn.next, v4) {
                    let eni = &held.lease.eni.id;
                    let reason = format!("{eni}, which holds this sandbox's address, is gone; a new sandbox is needed");
                    to.fail(PoolError::Waiting { reason });
                } else {
                    let lease = held.lease.clone();
                    turn.reply(move |r| to.answer(r.map(|()| lease)));
                }
                continue;
            }
            let purpose = Purpose::from(request.mode);
            let reason =
                whys.entry(purpose).or_insert_with(|| why(&turn.next, &self.config, &self.demand, purpose, now));
            match reason.clone() {
                Why::Waiting(_) => still.push(Waiting { request, to }),
                Why::Full { in_use, limit } => to.fail(PoolError::NodeFull { in_use, limit }),
                Why::NoPlace { shared, limit } => to.fail(PoolError::NoPlace { shared, limit }),
                Why::Refused(reason) => to.fail(match &self.last_error {
                    Some(error) => PoolError::Cloud(error.clone()),
                    None => PoolError::Waiting { reason },
                }),
            }
        }
        self.waiting = still;
    }

    fn commit(&mut self, mut turn: Turn, ctx: &mut Ctx<'_, Self>) {
        self.committing = true;
        let (state, names) = (turn.next.clone(), std::mem::take(&mut turn.taken));
        for name in &names {
            *self.steps.entry(name).or_default() += 1;
        }
        let written = self.desk.commit(state, names);
        self.settle_soon(ctx);
        ctx.spawn(written, move |pool, written, ctx| {
            pool.committing = false;
            match written {
                Ok(written) => pool.finished(turn, written.map_err(|e| e.to_string()), ctx),
                Err(gone) => ctx.fail(format!("the ledger's thread: {gone}")),
            }
        });
    }

    fn settle_soon(&mut self, ctx: &mut Ctx<'_, Self>) {
        if std::mem::replace(&mut self.settling, true) {
            return;
        }
        ctx.after(SETTLE_WITHIN, |pool, ctx| {
            pool.settling = false;
            let settled = pool.desk.settle();
            ctx.spawn(settled, |_, settled, ctx| match settled {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "The ledger cannot be flushed; its next write will be"),
                Err(gone) => ctx.fail(format!("the ledger's thread: {gone}")),
            });
        });
    }

    fn finished(&mut self, turn: Turn, written: Result<(), String>, ctx: &mut Ctx<'_, Self>) {
        let Turn { next, replies, answered, ended, reconciled, .. } = turn;
        match written {
            Ok(()) => {
                self.state = next;
                self.ledger_error = None;
                self.reconciled |= reconciled;
                for subject in ended {
                    self.end_call(subject);
                }
                for reply in replies {
                    reply(Ok(()));
                }
                self.start_calls(ctx);
            }
            Err(cause) => {
                if self.ledger_error.is_none() {
                    tracing::error!(cause, "The ledger cannot be written; nothing is handed out until it can");
                }
                for reply in replies {
                    reply(Err(PoolError::Ledger(cause.clone())));
                }
                self.ledger_error = Some(cause);
                // What the cloud has answered is not forgotten.
                let queued = std::mem::take(&mut self.jobs);
                self.jobs = answered.into_iter().chain(queued).collect();
                ctx.after(LEDGER_RETRY, |pool, ctx| pool.turn(ctx));
                self.publish(ctx);
                return;
            }
        }
        self.expire_waiting(ctx);
        self.wake_in_time(ctx);
        self.publish(ctx);
        if self.again {
            self.turn(ctx);
        }
    }

    fn wake_in_time(&mut self, ctx: &mut Ctx<'_, Self>) {
        if let Some(timer) = self.waker.take() {
            ctx.cancel(timer);
        }
        let now = self.clock.now();
        let retries = self.retries.values().map(|(at, _)| *at).filter(|at| *at > now);
        let next = retries.chain(plan::wake(&self.state, &self.config, now)).min();
        if let Some(at) = next {
            let delay = at.since(now).max(Duration::from_millis(1));
            self.waker = Some(ctx.after(delay, |pool, ctx| {
                pool.waker = None;
                pool.turn(ctx);
            }));
        }
    }

    /// Answer those whose deadline is near with the reason, and come back in
    /// time for the next.
    pub(super) fn expire_waiting(&mut self, ctx: &mut Ctx<'_, Self>) {
        if let Some(timer) = self.expiry.take() {
            ctx.cancel(timer);
        }
        let margin = |w: &Waiting| w.to.deadline().remaining() <= MARGIN;
        let (late, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting).into_iter().partition(margin);
        self.waiting = waiting;
        for Waiting { request, to } in late {
            to.fail(if self.reconciled { self.waiting_error(request.mode.into()) } else { PoolError::Reconciling });
        }
        let next = self.waiting.iter().map(|w| w.to.deadline().remaining()).min();
        if let Some(remaining) = next {
            let delay = remaining.saturating_sub(MARGIN).max(Duration::from_millis(1));
            self.expiry = Some(ctx.after(delay, |pool, ctx| {
                pool.expiry = None;
                pool.expire_waiting(ctx);
            }));
        }
    }

    fn waiting_error(&self, purpose: Purpose) -> PoolError {
        if let Some(cause) = &self.ledger_error {
            return PoolError::Ledger(cause.clone());
        }
        PoolError::Waiting { reason: self.why_waiting(purpose) }
    }

    pub(super) fn why_waiting(&self, purpose: Purpose) -> String {
        match why(&self.state, &self.config, &self.demand, purpose, self.clock.now()) {
            Why::Waiting(reason) | Why::Refused(reason) => reason,
            Why::Full { in_use, limit } => format!("{in_use} of {limit} addresses are in use"),
            Why::NoPlace { limit, .. } => format!("all {limit} places for ENIs are taken"),
        }
    }
}

fn is_lost(state: &State, v4: std::net::Ipv4Addr) -> bool {
    let eni = state.addresses.get(&v4).and_then(|a| state.enis.get(&a.eni));
    eni.is_none_or(|e| e.phase == Phase::Lost)
}

impl Turn {
    fn reply(&mut self, reply: impl FnOnce(Result<(), PoolError>) + 'static) {
        self.replies.push(Box::new(reply));
    }
}
