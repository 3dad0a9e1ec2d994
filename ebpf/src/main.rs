//! Fairway's programs on the packet path, one door each.
//!
//! `pod_egress` sees packets that leave a pod, `pod_ingress` packets that enter
//! it by the stack, `eni_ingress` what enters the node on a shared ENI,
//! `node_ingress` and `node_egress` what passes the ENI with the node's own
//! addresses. Where they are attached is the loader's business (`src/datapath.rs`). What they have
//! no opinion about passes on to what follows them in the chain.
#![no_std]
#![no_main]

mod account;
mod errors;
mod event;
mod flow;
mod masquerade;
mod outside;
mod packet;
mod refuse;
mod rewrite;
mod sctp;
mod service;
mod short;
mod socket;
mod table;
mod translate;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
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
    if let Some(link) = short::link(endpoint)
        && let Some(mut packet) = Packet::parse(&ctx)
    {
        if !short::is_own(link, &packet) {
            account::spoofed(&ctx, endpoint);
            event::tell(&ctx, EVENT_SPOOFED);
            return account::drop();
        }
        if let Outcome::Ends(verdict) = translate::leaving(&ctx, link, &mut packet) {
            account::egress(&ctx, endpoint, false);
            return verdict;
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
    if let Some(link) = short::link(endpoint)
        && let Some(mut packet) = Packet::parse(&ctx)
    {
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
    let Some(mut packet) = Packet::parse(&ctx) else { return NEXT };
    match short::pod(&packet.dst) {
        Some(_) => short::arrive(&ctx, &mut packet),
        None => outside::arrive(&ctx, &packet),
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
