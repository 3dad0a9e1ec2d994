//! Attaching by a filter of the device's clsact qdisc, which belongs to the device
//! and goes with it: devices that stay where they are, and kernels without tcx.
//!
//! Runs in the device's network namespace. Our filters have a fixed place in the
//! chain, so that they are found and replaced in place after a restart.

use std::io;

use aya::programs::links::Link as _;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{self as wire, TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::sys::bpf::TcxChain;

/// First to run.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0xfa1);
/// The same, as the kernel's messages have it.
const WIRE_HANDLE: wire::TcHandle = wire::TcHandle { major: 0, minor: 0xfa1 };

/// Puts the program into the device's clsact chain, in the place of our earlier
/// one if there is one. The filter belongs to the device and goes with it.
pub(super) fn attach(program: &mut SchedClassifier, ifindex: u32, chain: TcxChain) -> io::Result<()> {
    let device = nix::net::if_::if_indextoname(ifindex)?;
    let device = device.to_str().map_err(io::Error::other)?;
    let side = side(chain);
    if let Err(e) = tc::qdisc_add_clsact(device)
        && errno_of_tc(&e) != Some(libc::EEXIST)
    {
        return Err(io::Error::other(e));
    }
    let ours = SchedClassifierLink::attached(device, side, PRIORITY, HANDLE, None)?;
    let link = match program.attach_to_link(ours) {
        Ok(link) => link,
        Err(_) => {
            let place = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program.attach_with_options(device, side, TcAttachOptions::Netlink(place)).map_err(errno_first)?
        }
    };
    // The filter must outlive the value, which would detach it when dropped; it
    // holds no descriptor.
    std::mem::forget(program.take_link(link).map_err(io::Error::other)?);
    Ok(())
}

/// Removes our filter. Success when there is none, or no such device.
pub(super) fn detach(ifindex: u32, chain: TcxChain) -> io::Result<()> {
    let Ok(device) = nix::net::if_::if_indextoname(ifindex) else { return Ok(()) };
    if program_on(ifindex, chain)?.is_none() {
        return Ok(());
    }
    let device = device.to_str().map_err(io::Error::other)?;
    let ours = SchedClassifierLink::attached(device, side(chain), PRIORITY, HANDLE, None)?;
    ours.detach().map_err(io::Error::other)
}

fn side(chain: TcxChain) -> TcAttachType {
    match chain {
        TcxChain::Ingress => TcAttachType::Ingress,
        TcxChain::Egress => TcAttachType::Egress,
    }
}

fn errno_of_tc(e: &TcError) -> Option<i32> {
    match e {
        TcError::NetlinkError(e) => e.raw_os_error(),
        TcError::IoError(e) => e.raw_os_error(),
        TcError::AlreadyAttached => Some(libc::EEXIST),
        _ => None,
    }
}

fn errno_first(e: ProgramError) -> io::Error {
    match &e {
        ProgramError::TcError(tc) => match errno_of_tc(tc) {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(e),
        },
        _ => io::Error::other(e),
    }
}

/// The kernel id of the program that our filter on this chain runs, if there is
/// such a filter.
pub(super) fn program_on(ifindex: u32, chain: TcxChain) -> io::Result<Option<u32>> {
    let minor = match chain {
        TcxChain::Ingress => 0xfff2,
        TcxChain::Egress => 0xfff3,
    };
    let mut request = TcMessage::with_index(i32::try_from(ifindex).map_err(io::Error::other)?);
    request.header.parent = wire::TcHandle { major: 0xffff, minor };
    let ours =
        |filter: &TcMessage| filter.header.handle == WIRE_HANDLE && filter.header.info >> 16 == u32::from(PRIORITY);
    let found = dump_filters(request)?.into_iter().find(ours);
    Ok(found.and_then(|filter| filter.attributes.iter().find_map(program_id)))
}

fn program_id(attribute: &TcAttribute) -> Option<u32> {
    let TcAttribute::Options(options) = attribute else { return None };
    options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })
}

fn dump_filters(request: TcMessage) -> io::Result<Vec<TcMessage>> {
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetTrafficFilter(request));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;

    let mut filters = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(filter)) => filters.push(filter),
                NetlinkPayload::Done(_) => return Ok(filters),
                NetlinkPayload::Error(e) => return Err(e.to_io()),
                _ => {}
            }
            // Messages are aligned to four bytes in the datagram.
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}
