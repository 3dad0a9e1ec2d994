//! Requests as query parameters. Pure.

use std::fmt::Display;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::sign;
use crate::cloud::{CreateEni, DescribeEnis, EniStatus};
use crate::model::{ClientToken, EniId, InstanceId, VSwitchId};

/// DescribeNetworkInterfaces: the largest page.
const ENIS_PER_PAGE: u32 = 500;
/// DescribeVSwitches: the largest page.
pub(super) const VSWITCHES_PER_PAGE: u32 = 50;

/// The parameters of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params(Vec<(String, String)>);

impl Params {
    pub fn add(&mut self, key: &str, value: impl Display) {
        self.0.push((key.to_owned(), value.to_string()));
    }

    fn with(mut self, key: &str, value: impl Display) -> Self {
        self.add(key, value);
        self
    }

    fn list<T: Display>(mut self, key: &str, values: impl IntoIterator<Item = T>) -> Self {
        for (i, value) in values.into_iter().enumerate() {
            self.add(&format!("{key}.{}", i + 1), value);
        }
        self
    }

    fn tags<'a>(mut self, tags: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        for (i, (key, value)) in tags.into_iter().enumerate() {
            self.add(&format!("Tag.{}.Key", i + 1), key);
            self.add(&format!("Tag.{}.Value", i + 1), value);
        }
        self
    }

    /// Sorted and encoded: what is signed and what is sent.
    pub fn canonical(&self) -> String {
        let mut sorted: Vec<&(String, String)> = self.0.iter().collect();
        sorted.sort();
        let pairs: Vec<String> =
            sorted.iter().map(|(key, value)| format!("{}={}", sign::encode(key), sign::encode(value))).collect();
        pairs.join("&")
    }
}

pub fn create_eni(m: &CreateEni) -> Params {
    let mut params = Params::default()
        .with("VSwitchId", &m.vswitch)
        .with("InstanceType", "Secondary")
        .with("DeleteOnRelease", true)
        .with("Description", &m.description)
        .with("ClientToken", &m.token)
        .list("SecurityGroupIds", &m.security_groups)
        .tags(&m.tags);
    if m.ipv4 > 1 {
        params.add("SecondaryPrivateIpAddressCount", m.ipv4 - 1);
    }
    if m.ipv6 > 0 {
        params.add("Ipv6AddressCount", m.ipv6);
    }
    params
}

pub fn eni(eni: &EniId) -> Params {
    Params::default().with("NetworkInterfaceId", eni)
}

pub fn eni_and_instance(id: &EniId, instance: &InstanceId) -> Params {
    eni(id).with("InstanceId", instance)
}

pub fn assign_ipv4(id: &EniId, count: u32, token: &ClientToken) -> Params {
    eni(id).with("SecondaryPrivateIpAddressCount", count).with("ClientToken", token)
}

pub fn unassign_ipv4(id: &EniId, addresses: &[Ipv4Addr]) -> Params {
    eni(id).list("PrivateIpAddress", addresses)
}

pub fn assign_ipv6(id: &EniId, count: u32, token: &ClientToken) -> Params {
    eni(id).with("Ipv6AddressCount", count).with("ClientToken", token)
}

pub fn unassign_ipv6(id: &EniId, addresses: &[Ipv6Addr]) -> Params {
    eni(id).list("Ipv6Address", addresses)
}

pub fn describe_enis(filter: &DescribeEnis, ids: &[EniId], page: Option<&str>) -> Params {
    let mut params =
        Params::default().with("MaxResults", ENIS_PER_PAGE).list("NetworkInterfaceId", ids).tags(&filter.tags);
    if let Some(instance) = &filter.instance {
        params.add("InstanceId", instance);
    }
    if let Some(status) = filter.status.and_then(status) {
        params.add("Status", status);
    }
    if let Some(next) = page {
        params.add("NextToken", next);
    }
    params
}

/// The states the API can filter by.
fn status(status: EniStatus) -> Option<&'static str> {
    match status {
        EniStatus::Available => Some("Available"),
        EniStatus::Attaching => Some("Attaching"),
        EniStatus::InUse => Some("InUse"),
        EniStatus::Detaching => Some("Detaching"),
        EniStatus::Deleting => Some("Deleting"),
        EniStatus::Creating | EniStatus::Unknown => None,
    }
}

pub fn describe_instance_type(type_name: &str) -> Params {
    Params::default().list("InstanceTypes", [type_name]).with("MaxResults", 100)
}

/// Pages are numbered here; `page` is the number as text.
pub fn describe_vswitches(id: Option<&VSwitchId>, page: Option<&str>) -> Params {
    let mut params = Params::default().with("PageSize", VSWITCHES_PER_PAGE).with("PageNumber", page.unwrap_or("1"));
    if let Some(id) = id {
        params.add("VSwitchId", id);
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Lane;

    #[test]
    fn an_eni_is_created_with_all_its_addresses_tags_and_token_in_one_call() {
        let create = CreateEni {
            vswitch: "vsw-1".into(),
            security_groups: vec!["sg-1".into(), "sg-2".into()],
            ipv4: 10,
            ipv6: 3,
            tags: [("creator", "fairway"), ("k2", "v 2")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            description: "a b+c*~/中文".to_owned(),
            token: "tok-1".into(),
            lane: Lane::PodWaiting,
        };
        assert_eq!(
            create_eni(&create).canonical(),
            "ClientToken=tok-1&DeleteOnRelease=true&Description=a%20b%2Bc%2A~%2F%E4%B8%AD%E6%96%87\
             &InstanceType=Secondary&Ipv6AddressCount=3&SecondaryPrivateIpAddressCount=9&SecurityGroupIds.1=sg-1\
             &SecurityGroupIds.2=sg-2&Tag.1.Key=creator&Tag.1.Value=fairway&Tag.2.Key=k2&Tag.2.Value=v%202\
             &VSwitchId=vsw-1"
        );
        let one = create_eni(&CreateEni { ipv4: 1, ipv6: 0, ..create }).canonical();
        assert!(!one.contains("SecondaryPrivateIpAddressCount") && !one.contains("Ipv6AddressCount"), "{one}");
    }

    #[test]
    fn a_listing_asks_for_full_pages_and_passes_the_filters() {
        let filter = DescribeEnis {
            ids: vec![],
            instance: Some("i-1".into()),
            tags: [("creator".to_owned(), "fairway".to_owned())].into(),
            status: Some(EniStatus::InUse),
            lane: Lane::Refill,
        };
        assert_eq!(
            describe_enis(&filter, &["eni-1".into(), "eni-2".into()], Some("n-1")).canonical(),
            "InstanceId=i-1&MaxResults=500&NetworkInterfaceId.1=eni-1&NetworkInterfaceId.2=eni-2&NextToken=n-1\
             &Status=InUse&Tag.1.Key=creator&Tag.1.Value=fairway"
        );
    }
}
