//! Fairway's programs on the packet path, one door each.
//!
//! `pod_egress` sees packets that leave a pod, `pod_ingress` packets that enter
//! it. Where they are attached is the loader's business (`src/datapath.rs`).
//! Both let every packet pass on to what follows them in the chain.
#![no_std]
#![no_main]

mod account;

use account::Direction;
use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};

/// Under tcx this is "next program", under clsact "next filter": others may
/// follow on the same device.
const NEXT: i32 = TC_ACT_UNSPEC;

#[classifier]
pub fn pod_egress(ctx: TcContext) -> i32 {
    account::count(&ctx, Direction::Egress);
    NEXT
}

#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    account::count(&ctx, Direction::Ingress);
    NEXT
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
