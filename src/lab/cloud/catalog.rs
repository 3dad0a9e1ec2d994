//! Instance types: what DescribeInstanceTypes tells and what the quotas are.
//!
//! Purpose: real families with the limits that matter to a pod network. Owner:
//! the account's core reads it. Invariant: `eni_quantity` counts the primary ENI.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One instance type, by the field names of the API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct InstanceType {
    pub instance_type_id: String,
    pub instance_type_family: String,
    pub cpu_core_count: u32,
    pub memory_size: f64,
    pub eni_quantity: u32,
    pub eni_total_quantity: u32,
    pub eni_private_ip_address_quantity: u32,
    pub eni_ipv6_address_quantity: u32,
    pub eni_trunk_supported: bool,
    pub primary_eni_queue_number: u32,
    pub secondary_eni_queue_number: u32,
    pub maximum_queue_number_per_eni: u32,
    pub total_eni_queue_quantity: u32,
    /// kbit/s, each direction.
    pub instance_bandwidth: u32,
    pub instance_pps: u32,
}

/// id, vCPU, GiB, ENIs, ENIs with members, IPv4, IPv6, queues of the primary,
/// of a secondary, most per ENI, of all, Mbit/s, kpps.
type Row = (&'static str, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32);

const ROWS: [Row; 8] = [
    ("ecs.ic5.large", 2, 2, 2, 2, 6, 0, 2, 2, 2, 4, 1000, 300),
    ("ecs.g6.large", 2, 8, 2, 2, 6, 1, 2, 2, 2, 4, 1000, 300),
    ("ecs.g6.xlarge", 4, 16, 3, 3, 10, 10, 4, 2, 4, 8, 1500, 500),
    ("ecs.g7.2xlarge", 8, 32, 4, 10, 15, 15, 8, 4, 8, 20, 3000, 1600),
    ("ecs.g7.4xlarge", 16, 64, 8, 30, 30, 30, 8, 8, 16, 64, 5000, 3000),
    ("ecs.g7.8xlarge", 32, 128, 8, 60, 30, 30, 16, 16, 32, 128, 10_000, 6000),
    ("ecs.g6.16xlarge", 64, 256, 8, 60, 20, 1, 32, 8, 32, 88, 20_000, 6000),
    ("ecs.g8i.24xlarge", 96, 384, 15, 100, 50, 50, 32, 16, 64, 256, 50_000, 9000),
];

/// The built-in types by name, with `extra` added or in their place.
pub fn catalog(extra: &[InstanceType]) -> BTreeMap<String, InstanceType> {
    let built_in = ROWS.iter().map(|row| {
        let (id, cores, memory, enis, total, v4, v6, first, second, most, all, mbit, kpps) = *row;
        InstanceType {
            instance_type_id: id.to_owned(),
            instance_type_family: id.rsplit_once('.').map_or(id, |(family, _)| family).to_owned(),
            cpu_core_count: cores,
            memory_size: f64::from(memory),
            eni_quantity: enis,
            eni_total_quantity: total,
            eni_private_ip_address_quantity: v4,
            eni_ipv6_address_quantity: v6,
            eni_trunk_supported: total > enis,
            primary_eni_queue_number: first,
            secondary_eni_queue_number: second,
            maximum_queue_number_per_eni: most,
            total_eni_queue_quantity: all,
            instance_bandwidth: mbit * 1000,
            instance_pps: kpps * 1000,
        }
    });
    built_in.chain(extra.iter().cloned()).map(|t| (t.instance_type_id.clone(), t)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_sizes_a_pool_is_judged_on_are_there() {
        let types = catalog(&[]);
        let size = |name: &str| {
            let t = &types[name];
            (t.eni_quantity, t.eni_private_ip_address_quantity)
        };
        assert_eq!(size("ecs.g6.xlarge"), (3, 10));
        assert_eq!(size("ecs.g7.2xlarge"), (4, 15));
        assert_eq!(size("ecs.g7.4xlarge"), (8, 30));
        assert_eq!(size("ecs.g8i.24xlarge"), (15, 50));
    }

    #[test]
    fn queues_add_up_within_the_instance() {
        for t in catalog(&[]).values() {
            let used = t.primary_eni_queue_number + (t.eni_quantity - 1) * t.secondary_eni_queue_number;
            assert!(used <= t.total_eni_queue_quantity, "{}: {used}", t.instance_type_id);
            assert!(t.primary_eni_queue_number <= t.maximum_queue_number_per_eni);
        }
    }
}
