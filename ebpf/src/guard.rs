//! What a pod may not do to its own device, where its policies are enforced.
//!
//! Programs inside a pod sit between its sockets and its ENI. Two kinds of sockets
//! pass by there, both open to CAP_NET_RAW, which container runtimes give: packet
//! sockets that skip queueing (PACKET_QDISC_BYPASS), and AF_XDP. Their options are
//! refused in such pods. Where programs sit on the node's side of a link nothing of
//! a pod's passes by.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sockopt;
use aya_ebpf::programs::SockoptContext;
use fairway_ebpf_abi::NETNS_GUARDED;

use crate::socket;

const REFUSE: i32 = 0;
const ALLOW: i32 = 1;
const SOL_PACKET: i32 = 263;
const PACKET_QDISC_BYPASS: i32 = 20;
const SOL_XDP: i32 = 283;

#[cgroup_sockopt(setsockopt)]
pub fn sock_setsockopt(ctx: SockoptContext) -> i32 {
    // SAFETY: the context is the kernel's and valid while the program runs; the
    // length may be written. 0: the option as the process has given it, of which a
    // long one is not here.
    let (level, name) = unsafe {
        (*ctx.sockopt).optlen = 0;
        ((*ctx.sockopt).level, (*ctx.sockopt).optname)
    };
    if !(level == SOL_XDP || level == SOL_PACKET && name == PACKET_QDISC_BYPASS) {
        return ALLOW;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    match socket::flags_of(cookie) {
        Some(flags) if flags & NETNS_GUARDED != 0 => REFUSE,
        _ => ALLOW,
    }
}
