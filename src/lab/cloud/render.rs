//! The shapes of the API's answers.
//!
//! Purpose: the account's data under the real field names, nested as the real
//! answers are. Owner: `actions`. Invariant: every field is one that the
//! recorded shapes have, with the type they have (tested).

use serde_json::{Value, json};

use super::catalog::InstanceType;
use super::state::{Account, AddressSpace, Eni, Millis};

fn time(ms: Millis) -> String {
    let at = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Fields that all three answers about an ENI share.
fn common(account: &Account, eni: &Eni) -> Value {
    let tags: Vec<_> = eni.tags.iter().map(|(k, v)| json!({"TagKey": k, "TagValue": v})).collect();
    let six: Vec<_> = eni.v6.iter().map(|ip| json!({"Ipv6Address": ip, "Primary": false})).collect();
    json!({
        "Description": eni.description,
        "Ipv4PrefixSets": {"Ipv4PrefixSet": []},
        "Ipv6PrefixSets": {"Ipv6PrefixSet": []},
        "Ipv6Sets": {"Ipv6Set": six},
        "MacAddress": eni.mac.to_string(),
        "NetworkInterfaceId": eni.id,
        "NetworkInterfaceName": eni.name,
        "OwnerId": account.account_id.to_string(),
        "PrivateIpAddress": eni.primary4(),
        "ResourceGroupId": eni.resource_group,
        "SecurityGroupIds": {"SecurityGroupId": eni.security_groups},
        "ServiceManaged": false,
        "SourceDestCheck": eni.source_dest_check,
        "Status": eni.status.as_str(),
        "Tags": {"Tag": tags},
        "Type": eni.kind.as_str(),
        "VSwitchId": eni.vswitch,
        "VpcId": account.vpc_id,
        "ZoneId": eni.zone,
    })
}

fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

/// CreateNetworkInterface.
pub fn created(account: &Account, eni: &Eni) -> Value {
    let ips: Vec<_> =
        eni.v4.iter().map(|ip| json!({"PrivateIpAddress": ip, "Primary": *ip == eni.primary4()})).collect();
    with(common(account, eni), json!({"PrivateIpSets": {"PrivateIpSet": ips}}))
}

fn described(account: &Account, eni: &Eni, dns_names: bool) -> Value {
    let ip = |ip: &std::net::Ipv4Addr| {
        let mut item = json!({
            "PrivateIpAddress": ip,
            "Primary": *ip == eni.primary4(),
            "AssociatedPublicIp": {},
        });
        if dns_names {
            let dashed = ip.to_string().replace('.', "-");
            item["PrivateDnsName"] = json!(format!("ip-{dashed}.{}.ecs.internal", account.region));
        }
        item
    };
    let ips: Vec<_> = eni.v4.iter().map(ip).collect();
    let mut more = json!({
        "AssociatedPublicIp": {},
        "CreationTime": time(eni.created_ms),
        "DeleteOnRelease": eni.delete_on_release,
        "InstanceId": eni.instance.clone().unwrap_or_default(),
        "NetworkInterfaceTrafficMode": "Standard",
        "PrivateIpSets": {"PrivateIpSet": ips},
        "Attachment": {},
    });
    if let Some(instance) = &eni.instance {
        more["Attachment"] = json!({"InstanceId": instance, "DeviceIndex": eni.device_index, "NetworkCardIndex": 0});
    }
    if let Some(queues) = eni.queues.or(eni.queues_asked) {
        more["QueueNumber"] = json!(queues);
    }
    with(common(account, eni), more)
}

/// One item of DescribeNetworkInterfaces.
pub fn listed(account: &Account, eni: &Eni) -> Value {
    described(account, eni, true)
}

/// DescribeNetworkInterfaceAttribute.
pub fn attribute(account: &Account, eni: &Eni) -> Value {
    let traffic = match eni.queues.or(eni.queues_asked) {
        Some(queues) => json!({"NetworkInterfaceTrafficMode": "Standard", "QueueNumber": queues}),
        None => json!({"NetworkInterfaceTrafficMode": "Standard"}),
    };
    let more = json!({
        "ConnectionTrackingConfiguration": {
            "TcpClosedAndTimeWaitTimeout": 3, "TcpEstablishedTimeout": 910, "UdpTimeout": 30,
        },
        "EnhancedNetwork": {},
        "NetworkInterfaceTrafficConfig": traffic,
    });
    with(described(account, eni, false), more)
}

/// One item of DescribeInstanceTypes.
pub fn instance_type(t: &InstanceType) -> Value {
    json!({
        "InstanceTypeId": t.instance_type_id,
        "InstanceTypeFamily": t.instance_type_family,
        "InstanceFamilyLevel": "EnterpriseLevel",
        "InstanceCategory": "General-purpose",
        "CpuArchitecture": "X86",
        "CpuCoreCount": t.cpu_core_count,
        "CpuSpeedFrequency": 2.7,
        "CpuTurboFrequency": 3.5,
        "CpuOptions": {"Core": (t.cpu_core_count / 2).max(1), "ThreadsPerCore": 2, "HyperThreadingAdjustable": true},
        "PhysicalProcessorModel": "Intel(R) Xeon(R) Platinum",
        "MemorySize": t.memory_size,
        "DiskQuantity": 17,
        "NvmeSupport": "supported",
        "JumboFrameSupport": false,
        "NetworkEncryptionSupport": false,
        "GPUAmount": 0,
        "GPUSpec": "",
        "LocalStorageCategory": "",
        "BaselineCredit": 0,
        "InitialCredit": 0,
        "EniQuantity": t.eni_quantity,
        "EniTotalQuantity": t.eni_total_quantity,
        "EniPrivateIpAddressQuantity": t.eni_private_ip_address_quantity,
        "EniIpv6AddressQuantity": t.eni_ipv6_address_quantity,
        "EniTrunkSupported": t.eni_trunk_supported,
        "EriQuantity": 0,
        "QueuePairNumber": 0,
        "PrimaryEniQueueNumber": t.primary_eni_queue_number,
        "SecondaryEniQueueNumber": t.secondary_eni_queue_number,
        "MaximumQueueNumberPerEni": t.maximum_queue_number_per_eni,
        "TotalEniQueueQuantity": t.total_eni_queue_quantity,
        "InstanceBandwidthRx": t.instance_bandwidth,
        "InstanceBandwidthTx": t.instance_bandwidth,
        "InstancePpsRx": t.instance_pps,
        "InstancePpsTx": t.instance_pps,
        "NetworkCardQuantity": 1,
        "NetworkCards": {"NetworkCardInfo": [{"NetworkCardIndex": 0}]},
        "SupportedBootModes": {"SupportedBootMode": ["BIOS", "UEFI"]},
        "Attributes": {"Attribute": []},
    })
}

/// One item of DescribeVSwitches.
pub fn vswitch(account: &Account, space: &AddressSpace, created: Millis) -> Value {
    json!({
        "VSwitchId": space.spec.id,
        "VSwitchName": space.spec.name,
        "VpcId": account.vpc_id,
        "ZoneId": space.spec.zone,
        "CidrBlock": space.spec.cidr4,
        "Ipv6CidrBlock": space.spec.cidr6.map(|c| c.to_string()).unwrap_or_default(),
        "EnabledIpv6": space.spec.cidr6.is_some(),
        "AvailableIpAddressCount": account.available4(&space.spec.id),
        "Status": "Available",
        "IsDefault": false,
        "Description": "",
        "NetworkAclId": "",
        "OwnerId": account.account_id,
        "ResourceGroupId": "",
        "ShareType": "",
        "CreationTime": time(created),
        "RouteTable": {"RouteTableId": format!("vtb-{}", account.vpc_id), "RouteTableType": "System"},
        "Tags": {"Tag": []},
    })
}
