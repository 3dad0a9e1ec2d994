//! Answers read. Pure; lenient on what is unknown, strict on what is used.
//!
//! A field that is used and makes no sense fails the whole answer: half a
//! listing would look like ENIs that are gone.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Deserializer};

use crate::cloud::provider::Page;
use crate::cloud::{Eni, EniKind, EniStatus, InstanceLimits, VSwitch};
use crate::model::{EniId, InstanceId, Mac, SecurityGroupId, VSwitchId};

#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field} of {of}: {value:?} makes no sense")]
    Senseless { field: &'static str, of: String, value: String },
}

type Read<T> = Result<T, DecodeError>;

/// Null counts as absent, everywhere.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

macro_rules! raw {
    ($($name:ident { $($field:ident : $ty:ty $(= $rename:literal)?),* $(,)? })*) => {$(
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        struct $name { $(#[serde(deserialize_with = "or_default" $(, rename = $rename)?)] $field: $ty,)* }
    )*};
}

raw! {
    RawDone { request_id: String }
    RawEni {
        network_interface_id: String,
        mac_address: String,
        status: String,
        r#type: String = "Type",
        instance_id: String,
        attachment: RawAttachment,
        v_switch_id: String,
        vpc_id: String,
        zone_id: String,
        security_group_ids: RawGroups,
        private_ip_address: String,
        private_ip_sets: RawV4Sets,
        ipv6_sets: RawV6Sets = "Ipv6Sets",
        tags: RawTags,
        queue_number: u32,
        delete_on_release: bool,
        description: String,
        creation_time: String,
    }
    RawAttachment { instance_id: String }
    RawGroups { security_group_id: Vec<String> }
    RawV4Sets { private_ip_set: Vec<RawV4> }
    RawV4 { private_ip_address: String, primary: bool }
    RawV6Sets { ipv6_set: Vec<RawV6> = "Ipv6Set" }
    RawV6 { ipv6_address: String = "Ipv6Address" }
    RawTags { tag: Vec<RawTag> }
    RawTag { tag_key: String, tag_value: String }
    RawEnis { network_interface_sets: RawEniSets, next_token: String }
    RawEniSets { network_interface_set: Option<Vec<RawEni>> }
    RawAssigned4 { assigned_private_ip_addresses_set: RawAssigned4Set }
    RawAssigned4Set { private_ip_set: RawAssigned4List }
    RawAssigned4List { private_ip_address: Vec<String> }
    RawAssigned6 { ipv6_sets: RawAssigned6List = "Ipv6Sets" }
    RawAssigned6List { ipv6_address: Vec<String> = "Ipv6Address" }
    RawTypes { instance_types: RawTypeList }
    RawTypeList { instance_type: Option<Vec<RawType>> }
    RawType {
        instance_type_id: String,
        eni_quantity: Option<u32>,
        eni_private_ip_address_quantity: Option<u32>,
        eni_ipv6_address_quantity: u32 = "EniIpv6AddressQuantity",
        secondary_eni_queue_number: u32,
    }
    RawVSwitches { v_switches: RawVSwitchList, page_number: u64, page_size: u64, total_count: u64 }
    RawVSwitchList { v_switch: Option<Vec<RawVSwitch>> }
    RawVSwitch {
        v_switch_id: String,
        zone_id: String,
        cidr_block: String,
        ipv6_cidr_block: String = "Ipv6CidrBlock",
        available_ip_address_count: Option<u32>,
    }
}

/// Calls that answer nothing but their request id. Without it this is not an
/// answer of the cloud's, and no proof that the call was made.
pub fn done(body: &[u8]) -> Read<()> {
    let raw: RawDone = serde_json::from_slice(body)?;
    if raw.request_id.is_empty() { Err(DecodeError::Missing("RequestId")) } else { Ok(()) }
}

/// CreateNetworkInterface: the ENI as created.
pub fn created_eni(body: &[u8]) -> Read<Eni> {
    let mut raw: RawEni = serde_json::from_slice(body)?;
    // Left out by the answer, but certain.
    raw.delete_on_release = true;
    if raw.r#type.is_empty() {
        raw.r#type = "Secondary".to_owned();
    }
    raw.into_eni()
}

/// DescribeNetworkInterfaces: one page.
pub fn enis(body: &[u8]) -> Read<Page<Eni>> {
    let raw: RawEnis = serde_json::from_slice(body)?;
    let list = raw.network_interface_sets.network_interface_set.ok_or(DecodeError::Missing("NetworkInterfaceSet"))?;
    let items = list.into_iter().filter(|eni| !eni.is_half_made()).map(RawEni::into_eni).collect::<Read<_>>()?;
    Ok(Page { items, next: Some(raw.next_token).filter(|next| !next.is_empty()) })
}

/// AssignPrivateIpAddresses: the new addresses, at least one.
pub fn assigned_ipv4(body: &[u8]) -> Read<Vec<Ipv4Addr>> {
    let raw: RawAssigned4 = serde_json::from_slice(body)?;
    let list = raw.assigned_private_ip_addresses_set.private_ip_set.private_ip_address;
    at_least_one(parse_all("PrivateIpAddress", "the new addresses", list)?, "PrivateIpSet.PrivateIpAddress")
}

/// AssignIpv6Addresses: the new addresses, at least one.
pub fn assigned_ipv6(body: &[u8]) -> Read<Vec<Ipv6Addr>> {
    let raw: RawAssigned6 = serde_json::from_slice(body)?;
    at_least_one(parse_all("Ipv6Address", "the new addresses", raw.ipv6_sets.ipv6_address)?, "Ipv6Sets.Ipv6Address")
}

/// DescribeInstanceTypes: the type asked for, if it is there.
pub fn instance_limits(body: &[u8], type_name: &str) -> Read<Option<InstanceLimits>> {
    let raw: RawTypes = serde_json::from_slice(body)?;
    let list = raw.instance_types.instance_type.ok_or(DecodeError::Missing("InstanceTypes.InstanceType"))?;
    let Some(found) = list.into_iter().find(|t| t.instance_type_id == type_name) else {
        return Ok(None);
    };
    let sane = |field, value: Option<u32>, least| match value {
        None => Err(DecodeError::Missing(field)),
        Some(n) if (least..=4_096).contains(&n) => Ok(n),
        Some(n) => Err(DecodeError::Senseless { field, of: type_name.to_owned(), value: n.to_string() }),
    };
    Ok(Some(InstanceLimits {
        enis: sane("EniQuantity", found.eni_quantity, 1)?,
        ipv4_per_eni: sane("EniPrivateIpAddressQuantity", found.eni_private_ip_address_quantity, 1)?,
        ipv6_per_eni: sane("EniIpv6AddressQuantity", Some(found.eni_ipv6_address_quantity), 0)?,
        queues_per_secondary_eni: found.secondary_eni_queue_number.clamp(1, 2_048),
        type_name: found.instance_type_id,
    }))
}

/// DescribeVSwitches: one page.
pub fn vswitches(body: &[u8]) -> Read<Page<VSwitch>> {
    let raw: RawVSwitches = serde_json::from_slice(body)?;
    let list = raw.v_switches.v_switch.ok_or(DecodeError::Missing("VSwitches.VSwitch"))?;
    let page = raw.page_number.max(1);
    let more = !list.is_empty() && page.saturating_mul(raw.page_size) < raw.total_count;
    let items = list.into_iter().map(RawVSwitch::into_vswitch).collect::<Read<_>>()?;
    Ok(Page { items, next: more.then(|| (page.saturating_add(1)).to_string()) })
}

impl RawEni {
    /// Being made or unmade, it may lack what all others have; nobody can use
    /// it then, and nobody should fail for it.
    fn is_half_made(&self) -> bool {
        matches!(self.status.as_str(), "Creating" | "Deleting" | "CreateFailed")
            && (self.mac_address.is_empty() || self.private_ip_address.is_empty())
    }

    fn into_eni(self) -> Read<Eni> {
        let id = identifier("NetworkInterfaceId", self.network_interface_id)?;
        let primary4 = parse("PrivateIpAddress", &id, &self.private_ip_address)?;
        let mut sets = self.private_ip_sets.private_ip_set;
        sets.sort_by_key(|set| !set.primary);
        let mut ipv4 = vec![primary4];
        for set in sets {
            let address = parse("PrivateIpSet", &id, &set.private_ip_address)?;
            if !ipv4.contains(&address) {
                ipv4.push(address);
            }
        }
        let v6 = self.ipv6_sets.ipv6_set.into_iter().map(|set| set.ipv6_address).collect();
        let instance = Some(self.instance_id)
            .filter(|i| !i.is_empty())
            .or(Some(self.attachment.instance_id).filter(|i| !i.is_empty()));
        Ok(Eni {
            mac: parse::<Mac>("MacAddress", &id, &self.mac_address)?,
            status: word(&self.status, EniStatus::Unknown),
            kind: word(&self.r#type, EniKind::Other),
            instance: instance.map(InstanceId),
            vswitch: VSwitchId(identifier("VSwitchId", self.v_switch_id)?),
            vpc: self.vpc_id,
            zone: self.zone_id,
            security_groups: self.security_group_ids.security_group_id.into_iter().map(SecurityGroupId).collect(),
            primary4,
            ipv4,
            ipv6: parse_all("Ipv6Address", &id, v6)?,
            tags: self.tags.tag.into_iter().map(|t| (t.tag_key, t.tag_value)).collect::<BTreeMap<_, _>>(),
            queues: Some(self.queue_number).filter(|n| *n > 0),
            delete_on_release: self.delete_on_release,
            description: self.description,
            created: self.creation_time,
            id: EniId(id),
        })
    }
}

impl RawVSwitch {
    fn into_vswitch(self) -> Read<VSwitch> {
        let id = identifier("VSwitchId", self.v_switch_id)?;
        Ok(VSwitch {
            cidr4: parse("CidrBlock", &id, &self.cidr_block)?,
            cidr6: match self.ipv6_cidr_block.as_str() {
                "" => None,
                text => Some(parse("Ipv6CidrBlock", &id, text)?),
            },
            available: self.available_ip_address_count.ok_or(DecodeError::Missing("AvailableIpAddressCount"))?,
            zone: self.zone_id,
            id: VSwitchId(id),
        })
    }
}

/// Ids become keys, paths of metrics and parameters of calls.
pub(super) fn identifier(field: &'static str, text: String) -> Read<String> {
    if text.is_empty() {
        return Err(DecodeError::Missing(field));
    }
    let ok = text.len() <= 128 && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    match ok {
        true => Ok(text),
        false => {
            let value = super::errors::printable(&text, 64);
            Err(DecodeError::Senseless { field, of: "the answer".to_owned(), value })
        }
    }
}

fn parse<T: std::str::FromStr>(field: &'static str, of: &str, text: &str) -> Read<T> {
    text.parse().map_err(|_| DecodeError::Senseless {
        field,
        of: of.to_owned(),
        value: super::errors::printable(text, 64),
    })
}

fn parse_all<T: std::str::FromStr>(field: &'static str, of: &str, list: Vec<String>) -> Read<Vec<T>> {
    list.iter().map(|text| parse(field, of, text)).collect()
}

fn at_least_one<T>(list: Vec<T>, field: &'static str) -> Read<Vec<T>> {
    if list.is_empty() { Err(DecodeError::Missing(field)) } else { Ok(list) }
}

/// A word of an enumeration that may grow.
fn word<T: serde::de::DeserializeOwned>(text: &str, unknown: T) -> T {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).unwrap_or(unknown)
}

#[cfg(test)]
mod tests;
