//! Fairway's programs on the packet path, one door each.
//!
//! `pod_egress` sees packets that leave a pod, `pod_ingress` packets that enter
//! it by the stack, `eni_ingress` what enters the node on a shared ENI,
//! `node_ingress` and `node_egress` what passes the ENI with the node's own
//! addresses. `node_ingress` and `link_egress` see what a pod with an ENI of its
//! own exchanges with the node. Where they are attached is the loader's business (`src/datapath.rs`). What they have
//! no opinion about passes on to what follows them in the chain.
#![no_std]
#![no_main]

mod account;
mod errors;
mod event;
mod flow;
mod guard;
mod masquerade;
mod outside;
mod packet;
mod policy;
mod refuse;
mod rewrite;
mod sctp;
mod service;
mod short;
mod socket;
mod table;
mod translate;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use fairway_ebpf_abi::{EVENT_SPOOFED, TRANSLATED_REQUESTS};

use packet::Packet;
use translate::Outcome;

/// Under tcx this is "next program", under clsact "next filter": others may
/// follow on the same device.
const NEXT: i32 = TC_ACT_UNSPEC;

#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    let endpoint = account::endpoint(&ctx);
    if let Some(link) = short::link(endpoint) {
        let Some(mut packet) = Packet::parse(&ctx) else {
            let passes = policy::lets_unread_out(&ctx, link);
            account::egress(&ctx, endpoint, false);
            return if passes { NEXT } else { account::drop() };
        };
        if !short::is_own(link, &packet) {
            account::spoofed(&ctx, endpoint);
            event::tell(&ctx, EVENT_SPOOFED);
            return account::drop();
        }
        if let Outcome::Ends(verdict) = translate::leaving(&ctx, link, &mut packet) {
            account::egress(&ctx, endpoint, false);
            return verdict;
        }
        if !policy::lets_out(&ctx, endpoint, link) {
            return account::drop();
        }
        if let Some(verdict) = short::leave(&ctx, link, &mut packet) {
            account::egress(&ctx, endpoint, true);
            return verdict;
        }
    }
    account::egress(&ctx, endpoint, false);
    NEXT
}

#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let endpoint = account::endpoint(&ctx);
    if let Some(link) = short::link(endpoint) {
        let Some(mut packet) = Packet::parse(&ctx) else {
            let passes = policy::lets_unread_in(&ctx, link);
            account::ingress(&ctx, endpoint);
            return if passes { NEXT } else { TC_ACT_SHOT };
        };
        if !policy::lets_in(&ctx, endpoint, link) {
            return TC_ACT_SHOT;
        }
        translate::entering(&ctx, &mut packet, link.translated & TRANSLATED_REQUESTS != 0);
    }
    account::ingress(&ctx, endpoint);
    NEXT
}

#[classifier]
pub fn eni_ingress(ctx: TcContext) -> i32 {
    match Packet::parse(&ctx) {
        Some(mut packet) => short::arrive(&ctx, &mut packet),
        None => NEXT,
    }
}

#[classifier]
pub fn node_ingress(ctx: TcContext) -> i32 {
    let link = short::is_link(&ctx);
    let Some(mut packet) = Packet::parse(&ctx) else { return NEXT };
    if link && !short::may_leave_by_link(&ctx, &packet) {
        return TC_ACT_SHOT;
    }
    match short::pod(&packet.dst) {
        Some(_) => short::arrive(&ctx, &mut packet),
        None => outside::arrive(&ctx, &packet),
    }
}

#[classifier]
pub fn link_egress(ctx: TcContext) -> i32 {
    let Some(packet) = Packet::parse(&ctx) else { return NEXT };
    match short::pod(&packet.dst) {
        Some(pod) if !short::lets_in(&ctx, pod) => TC_ACT_SHOT,
        _ => NEXT,
    }
}

#[classifier]
pub fn node_egress(ctx: TcContext) -> i32 {
    match short::uplink() {
        Some(uplink) if uplink.translated != 0 => outside::leaving(&ctx),
        _ => NEXT,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program that can get here.
    loop {}
}

// Helpers are open only to programs under a licence the kernel calls GPL
// compatible. BTF maps need no version section.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
