//! kube-proxy's rules, in both its forms, on both nodes of a place.
//!
//! As it lays them out, in the order of the fleet: what is left out is only what
//! it leaves out itself. Its rules are on the servers' node too, where a new
//! connection that arrives for a pod is looked up as well.

mod iptables;
mod names;
mod nftables;

use anyhow::Context as _;

use super::fleet::{Fleet, Probe};
use super::place::Place;

/// Which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Iptables,
    /// As of 1.36.
    Nftables,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Iptables => "iptables",
            Mode::Nftables => "nftables",
        }
    }
}

/// Put the rules for this fleet on both nodes, in the place of any before.
pub fn load(mode: Mode, place: &Place, fleet: &Fleet) -> anyhow::Result<()> {
    let texts = match mode {
        Mode::Iptables => vec![iptables::rules(fleet)],
        Mode::Nftables => nftables::rules(fleet),
    };
    let put = |node: &super::place::Node| {
        node.space.run(|| {
            texts.iter().try_for_each(|text| match mode {
                Mode::Iptables => iptables::restore(text),
                Mode::Nftables => nftables::apply(text),
            })
        })
    };
    let both = || match mode {
        // One lock for the whole machine.
        Mode::Iptables => put(&place.near).and_then(|()| put(&place.far)),
        Mode::Nftables => std::thread::scope(|scope| {
            let far = scope.spawn(|| put(&place.far));
            put(&place.near)?;
            far.join().unwrap_or_else(|_| anyhow::bail!("the thread that loads rules panicked"))
        }),
    };
    both().with_context(|| format!("{} rules of {} Services", mode.name(), fleet.services))
}

/// How many packets the rules of each probed Service, for both its ports, have
/// translated since `before` was read: the first of each flow.
pub fn translated(mode: Mode, place: &Place, probes: &[Probe], before: &[u64]) -> anyhow::Result<Vec<u64>> {
    place.near.space.run(|| match mode {
        Mode::Iptables => {
            let now = iptables::translated(probes)?;
            let before = before.iter().copied().chain(std::iter::repeat(0));
            Ok(now.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect())
        }
        // Reading them sets them back.
        Mode::Nftables => nftables::translated(probes),
    })
}
