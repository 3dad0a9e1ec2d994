//! Attaching by a filter of the device's clsact qdisc, which belongs to the device
//! and goes with it: devices that stay where they are, and kernels without tcx.
//!
//! Runs in the device's network namespace. Our filters have a fixed place in the
//! chain, so that they are found and replaced in place after a restart.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{self as wire, TcAttribute, TcBpfFlags, TcFilterBpfOption, TcMessage, TcOption};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::sys::bpf::TcxChain;

/// First to run.
const PRIORITY: u16 = 1;
const HANDLE: wire::TcHandle = wire::TcHandle { major: 0, minor: 0xfa1 };

/// Puts programs into the device's clsact chains, each in the place of our earlier
/// one if there is one: one system call for all. The filters belong to the device
/// and go with it.
pub(super) fn attach(programs: &[(BorrowedFd<'_>, TcxChain)], ifindex: u32) -> io::Result<()> {
    let mut requests = vec![(RouteNetlinkMessage::NewQueueDiscipline(qdisc(ifindex)?), NLM_F_CREATE | NLM_F_EXCL)];
    for (program, chain) in programs {
        let options = [
            TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32),
            TcFilterBpfOption::ProgName("fairway".to_owned()),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        ];
        let mut filter = filter(ifindex, *chain)?;
        filter.attributes.push(TcAttribute::Options(options.map(TcOption::Bpf).into()));
        // Without NLM_F_EXCL one that is there is replaced.
        requests.push((RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE));
    }
    for (n, result) in exchange(requests)?.into_iter().enumerate() {
        match result {
            Err(e) if n == 0 && e.raw_os_error() == Some(libc::EEXIST) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Removes our filter. Success when there is none, or no such device.
pub(super) fn detach(ifindex: u32, chain: TcxChain) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelTrafficFilter(filter(ifindex, chain)?);
    for result in exchange(vec![(request, 0)])? {
        match result {
            // No such device, no clsact on it, no such filter.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => {}
            result => result?,
        }
    }
    Ok(())
}

fn qdisc(ifindex: u32) -> io::Result<TcMessage> {
    let mut message = TcMessage::with_index(i32::try_from(ifindex).map_err(io::Error::other)?);
    message.header.handle = wire::TcHandle { major: 0xffff, minor: 0 };
    message.header.parent = wire::TcHandle::CLSACT;
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    Ok(message)
}

/// Our place in a chain of a device.
fn filter(ifindex: u32, chain: TcxChain) -> io::Result<TcMessage> {
    let mut message = TcMessage::with_index(i32::try_from(ifindex).map_err(io::Error::other)?);
    message.header.handle = HANDLE;
    message.header.parent = parent(chain);
    message.header.info = u32::from(PRIORITY) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    Ok(message)
}

fn parent(chain: TcxChain) -> wire::TcHandle {
    let minor = match chain {
        TcxChain::Ingress => 0xfff2,
        TcxChain::Egress => 0xfff3,
    };
    wire::TcHandle { major: 0xffff, minor }
}

/// The kernel id of the program that our filter on this chain runs, if there is
/// such a filter.
pub(super) fn program_on(ifindex: u32, chain: TcxChain) -> io::Result<Option<u32>> {
    let mut request = TcMessage::with_index(i32::try_from(ifindex).map_err(io::Error::other)?);
    request.header.parent = parent(chain);
    let ours = |filter: &TcMessage| filter.header.handle == HANDLE && filter.header.info >> 16 == u32::from(PRIORITY);
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

/// Sends all requests at once; the answers in their order.
fn exchange(requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<io::Result<()>>> {
    let mut bytes = Vec::new();
    let count = requests.len();
    for (sequence, (request, flags)) in (0..).zip(requests) {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = sequence;
        message.finalize();
        let at = bytes.len();
        bytes.resize(at + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[at..at + message.buffer_len()]);
    }
    let socket = open()?;
    socket.send(&bytes, 0)?;
    let mut answers = Vec::with_capacity(count);
    while answers.len() < count {
        for message in receive(&socket)? {
            if let NetlinkPayload::Error(e) = message.payload {
                answers.push(match e.code {
                    None => Ok(()),
                    Some(_) => Err(e.to_io()),
                });
            }
        }
    }
    Ok(answers)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn receive(socket: &Socket) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let (datagram, _) = socket.recv_from_full()?;
    let mut messages = Vec::new();
    let mut rest = datagram.as_slice();
    while !rest.is_empty() {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
        // Messages are aligned to four bytes in the datagram.
        let length = (message.header.length as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}

fn dump_filters(request: TcMessage) -> io::Result<Vec<TcMessage>> {
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetTrafficFilter(request));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = open()?;
    socket.send(&bytes, 0)?;
    let mut filters = Vec::new();
    loop {
        for message in receive(&socket)? {
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(filter)) => filters.push(filter),
                NetlinkPayload::Done(_) => return Ok(filters),
                NetlinkPayload::Error(e) => return Err(e.to_io()),
                _ => {}
            }
        }
    }
}
