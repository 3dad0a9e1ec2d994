//! ServiceMap's duties beside Services: once a second the tables that programs
//! fill are looked after ([`super::tend`]), and maps that are nearly full are told.
//!
//! One turn at a time, on a worker of its own; a turn that takes long only puts
//! the next one off.

use std::time::Duration;

use super::ServiceMap;
use super::maps::Gone;
use super::tend::{Tended, Tender};
use crate::actor::{Ctx, StartError, Worker, WorkerGone};
use crate::cluster::About;

const PERIOD: Duration = Duration::from_secs(1);

pub(super) type Tending = Worker<Tender>;

/// Starts the worker, which opens the tables.
pub(super) async fn start(open: Option<super::OpenFlows>) -> Result<Option<Tending>, StartError> {
    let Some(open) = open else { return Ok(None) };
    let worker = Worker::start("flows", 64, move || open().map(Tender::new)).await;
    worker.map(Some).map_err(StartError::new)
}

impl ServiceMap {
    pub(super) fn tend_regularly(&mut self, ctx: &mut Ctx<'_, Self>) {
        if self.tending.is_some() {
            ctx.every(PERIOD, |actor, ctx| actor.tend(ctx));
        }
    }

    fn tend(&mut self, ctx: &mut Ctx<'_, Self>) {
        let Some(tending) = &self.tending else { return };
        if std::mem::replace(&mut self.tends, true) {
            return;
        }
        let work = tending.call(Tender::turn);
        ctx.spawn(work, |actor, tended, ctx| {
            actor.tends = false;
            actor.tended(tended, ctx);
        });
    }

    /// Told after their ids have gone from the maps.
    pub(super) fn backends_gone(&mut self, gone: Vec<Gone>, ctx: &mut Ctx<'_, Self>) {
        let Some(tending) = self.tending.as_ref().filter(|_| !gone.is_empty()) else { return };
        let work = tending.call(move |tender| tender.backends_gone(&gone));
        ctx.spawn(work, |actor, tended, ctx| actor.tended(tended, ctx));
    }

    fn tended(&mut self, tended: Result<Tended, WorkerGone>, ctx: &mut Ctx<'_, Self>) {
        let tended = match tended {
            Ok(tended) => tended,
            // Behind by a minute: the next turn says how things are.
            Err(WorkerGone::Full) => return,
            Err(gone) => return ctx.fail(gone.to_string()),
        };
        let was = &self.snapshot.tended;
        if let Some(error) = tended.error.as_ref().filter(|e| was.error.as_ref() != Some(e)) {
            tracing::warn!(error, "Flows cannot be looked through");
        }
        if let Some(why) = tended.sockets_unable.as_ref().filter(|w| was.sockets_unable.as_ref() != Some(w)) {
            tracing::warn!(why, "Connected UDP sockets stay with backends that are gone");
        }
        self.snapshot.tended = tended;
        self.read_pressure(ctx);
        self.publish();
    }

    /// Says which maps have become nearly full.
    pub(super) fn read_pressure(&mut self, ctx: &mut Ctx<'_, Self>) {
        for u in self.snapshot.uses() {
            let Some(note) = self.pressure.read(&u.map, u.entries, u.capacity) else { continue };
            tracing::warn!(
                map = u.map,
                entries = u.entries,
                capacity = u.capacity,
                "A map of the kernel is nearly full"
            );
            self.record(About::Node, "ServiceMapNearlyFull", note, ctx);
        }
        self.snapshot.nearly_full = self.pressure.maps().map(str::to_owned).collect();
    }
}
