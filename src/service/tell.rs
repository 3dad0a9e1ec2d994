//! How ServiceMap says what is wrong: once each, in the log and as an Event; what
//! is the same on every node is told by the one that leads.

use std::collections::BTreeSet;
use std::time::Duration;

use super::ServiceMap;
use super::problem::{Problem, Reason};
use crate::actor::{Ctx, Deadline};
use crate::cluster::{About, RecordEvent};

/// Told one by one; more at a time are told as a number.
const TOLD_AT_ONCE: usize = 20;

impl ServiceMap {
    /// Say what is wrong that was not wrong before.
    pub(super) fn tell(&mut self, problems: Vec<Problem>, ctx: &mut Ctx<'_, Self>) {
        let now: BTreeSet<Problem> = problems.into_iter().collect();
        let leads = *self.deps.leader.borrow();
        let new: Vec<&Problem> = now.difference(&self.told).collect();
        self.tell_new(&new, leads, ctx);
        self.told = now;
    }

    /// Another may have led when these came up, or nobody.
    pub(super) fn tell_as_leader(&self, ctx: &mut Ctx<'_, Self>) {
        let clusters: Vec<&Problem> = self.told.iter().filter(|p| p.reason.of_the_cluster()).collect();
        self.tell_new(&clusters, true, ctx);
    }

    fn tell_new(&self, new: &[&Problem], leads: bool, ctx: &mut Ctx<'_, Self>) {
        for problem in new.iter().take(TOLD_AT_ONCE) {
            tracing::warn!(about = %problem.about, reason = problem.reason.name(), "{}", problem.message);
            if leads || !problem.reason.of_the_cluster() {
                self.record(about(problem), problem.reason.name(), problem.message.clone(), ctx);
            }
        }
        if let Some(more) = new.len().checked_sub(TOLD_AT_ONCE).filter(|n| *n > 0) {
            let note = format!("{more} more Services have problems on this node; `fairway status services` lists them");
            tracing::warn!(more, "More Services have problems");
            self.record(About::Node, "ServiceProblems", note, ctx);
        }
    }

    pub(super) fn record(&self, about: About, reason: &str, note: String, ctx: &mut Ctx<'_, Self>) {
        let port = self.deps.record_event.clone();
        let event =
            RecordEvent { about, warning: true, reason: reason.to_owned(), action: "CarryService".to_owned(), note };
        let work = async move { port.ask(event, Deadline::after(Duration::from_secs(5))).await };
        ctx.spawn(work, |_, told, _| {
            if let Err(error) = told {
                tracing::debug!(%error, "An Event was not recorded");
            }
        });
    }
}

fn about(problem: &Problem) -> About {
    let (name, uid) = (problem.about.clone(), problem.uid.clone());
    match problem.reason {
        Reason::InvalidEndpoints => About::EndpointSlice { name, uid },
        _ => About::Service { name, uid },
    }
}
