//! Taking down what was wired.
//!
//! Purpose: removes everything of an attachment and goes on after errors. Owner:
//! the wiring thread that serves the request, but for the veth pair, whose
//! removal waits for others' on a thread of its own.
//!
//! A shared ENI's pod has nothing but two rules per address that does not go
//! with its pair: nothing needs to be read. Everything else is read first.

use std::net::IpAddr;
use std::sync::Arc;

use netlink_packet_route::link::InfoKind;

use super::desk::{Desk, Shared, fault, ips, kernel};
use super::message::{self, Devices};
use super::names::{self, link_names};
use super::nl::{GONE, NlError};
use super::objects::{Key, LinkKind, Selector, State, Value};
use super::plan::{self, Op};
use super::programs::Placed;
use super::read::{self, Device};
use super::unlink;
use super::{Config, WireError};
use crate::model::{AttachMode, AttachmentId, Lease};

/// What an unwire has left to do, and what went wrong so far.
#[derive(Debug)]
pub(super) struct Undone {
    pub(super) returned: Returned,
    /// The host link: its pair is still there.
    pub(super) pair: Option<u32>,
    pub(super) causes: Vec<String>,
}

/// After an unwire: whether an exclusive ENI is where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Returned {
    Yes,
    /// Its namespace died and the kernel has not put it back yet.
    NotYet,
}

impl Desk {
    /// All but the removal of the pair, which is the caller's to ask for.
    /// `reused`: the ENI serves others by now and is not this pod's any more.
    pub(super) fn unwire(&mut self, lease: &Lease, reused: bool) -> Result<Undone, WireError> {
        let shared = self.shared.clone();
        let _held = shared.locks.hold(lease.attachment.to_string());
        self.undo(lease, reused)
    }

    /// Remove everything of the attachment but the pair; goes on after errors and
    /// reports all.
    pub(super) fn undo(&mut self, lease: &Lease, reused: bool) -> Result<Undone, WireError> {
        let shared = self.shared.clone();
        let names = link_names(&shared.config.link_prefix, &lease.attachment);
        let (host, taken) = self.before_undo(lease, &names.host).map_err(|e| kernel(lease, &e))?;
        let pair = host.as_ref().filter(|h| h.kind == Some(InfoKind::Veth)).map(|h| h.index);
        let mut causes = match (lease.mode, pair) {
            // All that is of ours beside the rules is on the pair.
            (AttachMode::Veth, Some(_)) => self.remove_rules(lease, &taken),
            _ => self.remove_all_but_pair(lease, host.as_ref(), &taken),
        };
        let mut returned = Returned::Yes;
        if lease.mode == AttachMode::Exclusive && !reused {
            match self.normalise(lease.eni.mac) {
                Ok(found) => returned = if found { Returned::Yes } else { Returned::NotYet },
                Err(e) => causes.push(e.to_string()),
            }
        }
        if pair.is_none() {
            causes.extend(detach(&shared, &lease.attachment).err().map(|e| e.to_string()));
        }
        Ok(Undone { returned, pair, causes })
    }

    /// The host link, and which of the lease's addresses are reached over another
    /// one: they have been leased again.
    fn before_undo(&mut self, lease: &Lease, own: &str) -> Result<(Option<Device>, Vec<IpAddr>), NlError> {
        let ips = ips(lease);
        let mut ask = vec![message::get_link(own, GONE)];
        ask.extend(ips.iter().map(|ip| message::route_lookup(*ip)));
        let answers = self.nl.all(ask)?;
        let host = answers.first().and_then(|a| read::first_device(a));
        let own = host.as_ref().map(|h| h.index);
        let mut taken = Vec::new();
        for (ip, answer) in ips.iter().zip(answers.iter().skip(1)) {
            let Some(path) = read::first_path(answer).filter(|p| Some(p.index) != own) else { continue };
            let over = self.nl.all(vec![message::get_link_by_index(path.index, GONE)])?;
            let over = over.first().and_then(|a| read::first_device(a));
            if over.is_some_and(|d| names::is_host_link(&self.shared.config.link_prefix, &d.name)) {
                taken.push(*ip);
            }
        }
        Ok((host, taken))
    }

    /// Both rules of each address; where they lead does not matter.
    fn remove_rules(&mut self, lease: &Lease, taken: &[IpAddr]) -> Vec<String> {
        let Config { rule_to_pod, rule_from_pod, .. } = self.shared.config;
        let mut requests = Vec::new();
        for ip in ips(lease).into_iter().filter(|ip| !taken.contains(ip)) {
            for (priority, selector) in [(rule_to_pod, Selector::To(ip)), (rule_from_pod, Selector::From(ip))] {
                let (key, any) = (Key::Rule(priority, selector), Value::Rule(0));
                message::delete(&key, &any, &Devices::default(), &mut requests);
            }
        }
        match self.nl.batch(requests) {
            Ok(answers) => answers.into_iter().filter_map(|a| a.err().map(|e| e.to_string())).collect(),
            Err(e) => vec![e.to_string()],
        }
    }

    fn remove_all_but_pair(&mut self, lease: &Lease, host: Option<&Device>, taken: &[IpAddr]) -> Vec<String> {
        // A path that names nothing, or something else by now, is a dead namespace.
        let pod = self.open_pod(lease).ok();
        let mut site = self.site(lease, pod);
        let read = match site.read(host, &State::new(), &ips(lease)) {
            Ok(actual) => plan::diff(&State::new(), &actual).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        let mut ops = match read {
            Ok(ops) => ops,
            Err(e) => return vec![e],
        };
        ops.retain(|op| match op {
            Op::Delete(Key::Rule(_, s), _) => !taken.contains(&s.address()),
            Op::Delete(Key::Link(_), Value::Link(link)) => !matches!(link.kind, LinkKind::Veth { .. }),
            _ => true,
        });
        let done = site.apply(&ops, &mut |_| Ok(Placed::Yes));
        done.err().into_iter().flatten().map(|e| e.to_string()).collect()
    }

    /// Wait here until the pair is gone.
    pub(super) fn remove_pair(&self, lease: &Lease, undone: Undone) -> Result<(), WireError> {
        let mut causes = undone.causes;
        if let Some(index) = undone.pair {
            let gone = self.unlinker.remove(index, then_detach(&self.shared, lease));
            let gone = gone.blocking_recv().unwrap_or_else(|_| Err(unlink::unanswered()));
            causes.extend(gone.err().map(|e| e.to_string()));
        }
        if causes.is_empty() { Ok(()) } else { Err(fault(lease, "unwire", causes)) }
    }
}

/// The programs' pins, which outlive their device.
fn detach(shared: &Shared, attachment: &AttachmentId) -> Result<(), NlError> {
    let failed = |cause| NlError { what: "program".to_owned(), errno: 0, cause };
    shared.programs.detach(attachment).map_err(failed)
}

/// To be done once the pair is gone.
pub(super) fn then_detach(
    shared: &Arc<Shared>,
    lease: &Lease,
) -> impl FnOnce() -> Result<(), NlError> + Send + 'static + use<> {
    let (shared, attachment) = (shared.clone(), lease.attachment.clone());
    move || detach(&shared, &attachment)
}
