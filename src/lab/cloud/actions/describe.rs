//! The read-only actions: filters, pages, answers.
//!
//! Invariants: a page is bounded; a NextToken names the last item seen, so
//! that ENIs created or deleted between two pages neither repeat nor hide others.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::super::engine::Engine;
use super::super::error::ApiError;
use super::super::params::Params;
use super::super::render;
use super::super::state::{Account, Eni, EniKind, EniStatus};
use super::Api;

pub(super) async fn perform(engine: &Engine, api: Api, params: &Params) -> Result<Value, ApiError> {
    match api.name {
        "DescribeNetworkInterfaces" => interfaces(engine, params).await,
        "DescribeNetworkInterfaceAttribute" => attribute(engine, params).await,
        "DescribeInstanceTypes" => instance_types(engine, params).await,
        "DescribeVSwitches" => vswitches(engine, params).await,
        other => Err(ApiError::internal(format!("{other} is not wired"))),
    }
}

/// Which ENIs are asked for; what is `None` or empty restricts nothing.
struct Filter {
    ids: Vec<String>,
    instance: Option<String>,
    vpc: Option<String>,
    vswitch: Option<String>,
    group: Option<String>,
    name: Option<String>,
    resource_group: Option<String>,
    status: Option<EniStatus>,
    kind: Option<EniKind>,
    primary4: Option<Ipv4Addr>,
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
    tags: BTreeMap<String, String>,
    service_managed: bool,
}

pub(super) fn read_all(params: &Params) -> Result<(), ApiError> {
    Filter::read(params).map(drop)
}

impl Filter {
    fn read(params: &Params) -> Result<Self, ApiError> {
        let owned = |name: &str| params.get(name).map(str::to_owned);
        let status = match params.get("Status") {
            None => None,
            Some(s) => {
                Some(EniStatus::parse(s).ok_or_else(|| ApiError::invalid("Status", "it is not a status of an ENI"))?)
            }
        };
        let kind = match params.get("Type") {
            None => None,
            Some("Primary") => Some(EniKind::Primary),
            Some("Secondary") => Some(EniKind::Secondary),
            Some(_) => return Err(ApiError::invalid("Type", "it must be Primary or Secondary")),
        };
        Ok(Self {
            ids: params.list("NetworkInterfaceId", 100)?.into_iter().map(str::to_owned).collect(),
            instance: owned("InstanceId"),
            vpc: owned("VpcId"),
            vswitch: owned("VSwitchId"),
            group: owned("SecurityGroupId"),
            name: owned("NetworkInterfaceName"),
            resource_group: owned("ResourceGroupId"),
            status,
            kind,
            primary4: params.parsed("PrimaryIpAddress")?,
            v4: params.parsed_list("PrivateIpAddress", 100)?,
            v6: params.parsed_list("Ipv6Address", 100)?,
            tags: params.tags()?,
            service_managed: params.flag("ServiceManaged")?.unwrap_or(false),
        })
    }

    fn wants(&self, account: &Account, eni: &Eni) -> bool {
        fn same(filter: Option<&String>, value: &str) -> bool {
            filter.is_none_or(|wanted| wanted == value)
        }
        let tag = |(key, value): (&String, &String)| eni.tags.get(key).is_some_and(|v| value.is_empty() || v == value);
        (self.ids.is_empty() || self.ids.contains(&eni.id))
            && (self.instance.is_none() || self.instance == eni.instance)
            && same(self.vpc.as_ref(), &account.vpc_id)
            && same(self.vswitch.as_ref(), &eni.vswitch)
            && same(self.name.as_ref(), &eni.name)
            && same(self.resource_group.as_ref(), &eni.resource_group)
            && self.group.as_ref().is_none_or(|group| eni.security_groups.contains(group))
            && self.status.is_none_or(|status| status == eni.status)
            && self.kind.is_none_or(|kind| kind == eni.kind)
            && self.primary4.is_none_or(|ip| ip == eni.primary4())
            && (self.v4.is_empty() || self.v4.iter().any(|ip| eni.v4.contains(ip)))
            && (self.v6.is_empty() || self.v6.iter().any(|ip| eni.v6.contains(ip)))
            && self.tags.iter().all(tag)
            && !self.service_managed
    }
}

/// A page by token: everything after the item that the token names.
fn after<T>(items: &[T], id: impl Fn(&T) -> &str, token: Option<&str>) -> Result<usize, ApiError> {
    let Some(token) = token else { return Ok(0) };
    let bad = || ApiError::new(400, "InvalidNextToken", "The specified NextToken is not one this API has returned.");
    let raw = hex::decode(token).map_err(|_| bad())?;
    let last = std::str::from_utf8(&raw).ok().and_then(|s| s.strip_prefix("after:")).ok_or_else(bad)?;
    Ok(items.partition_point(|item| id(item) <= last))
}

fn token_after(id: &str) -> String {
    hex::encode(format!("after:{id}"))
}

async fn interfaces(engine: &Engine, params: &Params) -> Result<Value, ApiError> {
    let filter = Filter::read(params)?;
    let by_token = params.get("NextToken").is_some() || params.get("MaxResults").is_some();
    let max = params.parsed::<i64>("MaxResults")?.unwrap_or(10).clamp(10, 500) as usize;
    let page = params.int("PageNumber", 1..=100_000)?.unwrap_or(1);
    let size = params.int("PageSize", 1..=500)?.unwrap_or(10);
    engine.delay(|l| l.describe).await?;
    let world = engine.world();
    let account = &world.account;
    let found: Vec<&Eni> = account.enis.values().filter(|eni| filter.wants(account, eni)).collect();
    let (from, take) = if by_token {
        (after(&found, |eni| &eni.id, params.get("NextToken"))?, max)
    } else {
        ((page as usize - 1) * size as usize, size as usize)
    };
    let rest = found.get(from..).unwrap_or_default();
    let shown = &rest[..take.min(rest.len())];
    let items: Vec<Value> = shown.iter().map(|eni| render::listed(account, eni)).collect();
    let next = shown.last().filter(|_| by_token && rest.len() > take).map(|eni| token_after(&eni.id));
    Ok(json!({
        "NetworkInterfaceSets": {"NetworkInterfaceSet": items},
        "NextToken": next.unwrap_or_default(),
        "PageNumber": page,
        "PageSize": if by_token { max } else { size as usize },
        "TotalCount": found.len(),
    }))
}

async fn attribute(engine: &Engine, params: &Params) -> Result<Value, ApiError> {
    let id = params.required("NetworkInterfaceId")?;
    engine.delay(|l| l.describe).await?;
    let world = engine.world();
    Ok(render::attribute(&world.account, world.account.eni(id)?))
}

async fn instance_types(engine: &Engine, params: &Params) -> Result<Value, ApiError> {
    let names = params.list("InstanceTypes", 10)?;
    let families = params.list("InstanceTypeFamilies", 10)?;
    let family = params.get("InstanceTypeFamily");
    let max = params.int("MaxResults", 1..=1600)?.unwrap_or(1600) as usize;
    engine.delay(|l| l.describe).await?;
    let world = engine.world();
    let types = &world.account.types;
    if let Some(unknown) = names.iter().find(|name| !types.contains_key(**name)) {
        let message = format!("The specified InstanceType {unknown:.64} does not exist.");
        return Err(ApiError::new(404, "InvalidInstanceType.NotFound", message));
    }
    let found: Vec<_> = types
        .values()
        .filter(|t| names.is_empty() || names.contains(&t.instance_type_id.as_str()))
        .filter(|t| families.is_empty() || families.contains(&t.instance_type_family.as_str()))
        .filter(|t| family.is_none_or(|family| family == t.instance_type_family))
        .collect();
    let rest = &found[after(&found, |t| &t.instance_type_id, params.get("NextToken"))?..];
    let shown = &rest[..max.min(rest.len())];
    let next = shown.last().filter(|_| rest.len() > max).map(|t| token_after(&t.instance_type_id));
    let items: Vec<Value> = shown.iter().map(|t| render::instance_type(t)).collect();
    Ok(json!({"InstanceTypes": {"InstanceType": items}, "NextToken": next.unwrap_or_default()}))
}

async fn vswitches(engine: &Engine, params: &Params) -> Result<Value, ApiError> {
    // One id, or several separated by commas.
    let ids: Vec<&str> = params.get("VSwitchId").map(|ids| ids.split(',').collect()).unwrap_or_default();
    if ids.len() > 50 {
        return Err(ApiError::invalid("VSwitchId", "at most 50 at a time"));
    }
    let (vpc, zone, name) = (params.get("VpcId"), params.get("ZoneId"), params.get("VSwitchName"));
    let six = params.flag("EnableIpv6")?;
    let page = params.int("PageNumber", 1..=100_000)?.unwrap_or(1) as usize;
    let size = params.int("PageSize", 1..=50)?.unwrap_or(10) as usize;
    if params.flag("DryRun")? == Some(true) {
        return Err(ApiError::new(400, "DryRunOperation", "Request validation has been passed with DryRun flag set."));
    }
    engine.delay(|l| l.describe).await?;
    let created = engine.started_ms();
    let world = engine.world();
    let account = &world.account;
    let found: Vec<_> = account
        .spaces
        .values()
        .filter(|space| ids.is_empty() || ids.contains(&space.spec.id.as_str()))
        .filter(|_| vpc.is_none_or(|vpc| vpc == account.vpc_id))
        .filter(|space| zone.is_none_or(|zone| zone == space.spec.zone))
        .filter(|space| name.is_none_or(|name| name == space.spec.name))
        .filter(|space| six.is_none_or(|six| six == space.spec.cidr6.is_some()))
        .collect();
    let items: Vec<Value> =
        found.iter().skip((page - 1) * size).take(size).map(|space| render::vswitch(account, space, created)).collect();
    Ok(json!({
        "VSwitches": {"VSwitch": items},
        "TotalCount": found.len(),
        "PageNumber": page,
        "PageSize": size,
    }))
}
