//! What an operating system does with its primary network device at boot:
//! address and mask, default route, loopback. Used for nodes and for the VM.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use super::link::{self, LinkError, Links, Via};
use super::ns::Netns;
use crate::lab::fabric::EniPort;
use crate::model::Mac;

pub(super) const CARRIER_WITHIN: Duration = Duration::from_secs(2);

/// The boot configuration of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    pub mac: Mac,
    pub v4: Option<Ipv4Net>,
    pub gateway4: Ipv4Addr,
    /// Assigned as a single address, as DHCPv6 does.
    pub v6: Option<Ipv6Addr>,
    pub gateway6: Option<Ipv6Addr>,
}

impl From<&EniPort> for Boot {
    fn from(port: &EniPort) -> Self {
        let prefix = port.subnet4.prefix_len();
        Self {
            mac: port.mac,
            v4: port.v4.first().and_then(|a| Ipv4Net::new(*a, prefix).ok()),
            gateway4: port.gateway4,
            v6: port.v6.first().copied(),
            gateway6: port.gateway6,
        }
    }
}

/// Bring up the device with the boot's hardware address; returns its name.
pub async fn boot(ns: &Netns, boot: &Boot) -> Result<String, LinkError> {
    let links = Links::open(ns).await?;
    loopback(&links).await?;
    let device = links
        .list()
        .await?
        .into_iter()
        .find(|l| l.mac == Some(boot.mac))
        .ok_or_else(|| LinkError::NoLink(format!("{} (hardware address {})", ns.name(), boot.mac)))?;
    links.set_up(device.index, None).await?;
    // As network daemons do: what is sent before is lost, and repeated only
    // after a second. Without a carrier it is configured all the same.
    link::wait_running(ns, &device.name, CARRIER_WITHIN).await?;
    if let Some(v4) = boot.v4 {
        links.add_address(device.index, IpNet::V4(v4)).await?;
        let gateway = IpAddr::V4(boot.gateway4);
        links.add_route(IpNet::V4(Ipv4Net::default()), Via::Gateway(device.index, gateway)).await?;
    }
    if let Some((v6, gateway)) = boot.v6.zip(boot.gateway6) {
        links.add_address(device.index, IpNet::from(IpAddr::V6(v6))).await?;
        links.add_route(IpNet::from(IpAddr::V6(gateway)), Via::Link(device.index)).await?;
        links.add_route(IpNet::V6(ipnet::Ipv6Net::default()), Via::Gateway(device.index, IpAddr::V6(gateway))).await?;
        link::wait_local(ns, v6, CARRIER_WITHIN).await?;
    }
    Ok(device.name)
}

/// Loopback up: a new namespace has it down.
pub async fn loopback(links: &Links) -> Result<(), LinkError> {
    let lo = links.find("lo").await?;
    links.set_up(lo.index, None).await
}
