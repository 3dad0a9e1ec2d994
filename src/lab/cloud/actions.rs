//! The actions of the API: parameters in, answer out.
//!
//! Purpose: validate each parameter as the API documents it, do the action,
//! render the answer. Owner: the API server, after it has checked who asks.
//! Invariant: a parameter error is found before anything happens.
//!
//! - `describe`: the read-only actions

use std::sync::Arc;

use serde_json::{Value, json};

use super::engine::Engine;
use super::error::ApiError;
use super::idempotency::Begin;
use super::params::Params;
use super::render;
use super::state::{CreateEni, Want};

mod describe;

/// An action and the API version it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Api {
    pub name: &'static str,
    pub product: &'static str,
    version: &'static str,
}

const ECS: [&str; 11] = [
    "CreateNetworkInterface",
    "AttachNetworkInterface",
    "DetachNetworkInterface",
    "DeleteNetworkInterface",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
    "AssignIpv6Addresses",
    "UnassignIpv6Addresses",
    "DescribeNetworkInterfaces",
    "DescribeNetworkInterfaceAttribute",
    "DescribeInstanceTypes",
];
const VPC: [&str; 1] = ["DescribeVSwitches"];

impl Api {
    pub fn find(action: &str, version: &str) -> Result<Self, ApiError> {
        let ecs = ECS.iter().map(|name| Api { name, product: "Ecs", version: "2014-05-26" });
        let vpc = VPC.iter().map(|name| Api { name, product: "Vpc", version: "2016-04-28" });
        let found = ecs.chain(vpc).find(|api| api.name == action && api.version == version);
        found.ok_or_else(|| {
            let message = "Specified api is not found, please check your url and method.";
            ApiError::new(404, "InvalidAction.NotFound", message)
        })
    }
}

/// Does the action. The answer has no request id yet.
pub async fn perform(engine: &Arc<Engine>, api: Api, params: &Params) -> Result<Value, ApiError> {
    check_region(engine, api, params)?;
    match api.name {
        "CreateNetworkInterface" => create(engine, api, params).await,
        "AttachNetworkInterface" => attach(engine, params).await,
        "DetachNetworkInterface" => detach(engine, params).await,
        "DeleteNetworkInterface" => delete(engine, params).await,
        "AssignPrivateIpAddresses" => assign4(engine, api, params).await,
        "UnassignPrivateIpAddresses" => unassign4(engine, params).await,
        "AssignIpv6Addresses" => assign6(engine, api, params).await,
        "UnassignIpv6Addresses" => unassign6(engine, params).await,
        _ => describe::perform(engine, api, params).await,
    }
}

fn check_region(engine: &Engine, api: Api, params: &Params) -> Result<(), ApiError> {
    let optional = match api.name {
        "DescribeInstanceTypes" => true,
        "DescribeVSwitches" => params.get("VpcId").is_some(),
        _ => false,
    };
    match params.get("RegionId") {
        Some(region) if region == engine.config.region => Ok(()),
        Some(_) => Err(ApiError::new(404, "InvalidRegionId.NotFound", "The specified RegionId does not exist.")),
        None if optional => Ok(()),
        None => Err(ApiError::missing("RegionId")),
    }
}

/// Runs `work` once per client token.
async fn once<F>(engine: &Engine, api: Api, params: &Params, work: F) -> Result<Value, ApiError>
where
    F: Future<Output = Result<Value, ApiError>>,
{
    let Some(token) = params.get("ClientToken") else { return work.await };
    if token.len() > 64 || !token.is_ascii() {
        return Err(ApiError::invalid("ClientToken", "at most 64 ASCII characters"));
    }
    let key = format!("{}/{token}", api.name);
    let begun = engine.world().tokens.begin(&key, &params.fingerprint())?;
    if let Begin::Repeat(answer) = begun {
        engine.delay(|l| l.describe).await?;
        return Ok(answer);
    }
    let result = work.await;
    engine.world().tokens.finish(&key, &result);
    result
}

/// One of `Name.N` and `NameCount`, or neither.
fn want<A: std::str::FromStr>(params: &Params, list: (&str, u32), count: (&str, u32)) -> Result<Want<A>, ApiError> {
    let these = params.parsed_list(list.0, list.1)?;
    match (these.is_empty(), params.int(count.0, 1..=count.1)?) {
        (true, None) => Ok(Want::Nothing),
        (true, Some(n)) => Ok(Want::Any(n)),
        (false, None) => Ok(Want::These(these)),
        (false, Some(_)) => Err(ApiError::both(list.0, count.0)),
    }
}

/// Prefixes are not part of this cloud.
fn no_prefixes(params: &Params) -> Result<(), ApiError> {
    for name in ["Ipv4PrefixCount", "Ipv6PrefixCount", "Ipv4Prefix.1", "Ipv6Prefix.1"] {
        if params.get(name).is_some() {
            return Err(ApiError::unsupported(name));
        }
    }
    Ok(())
}

fn described_text(params: &Params, name: &str, max: usize) -> Result<String, ApiError> {
    let text = params.text(name, max)?;
    let bad = text.chars().count() == 1 || text.starts_with("http://") || text.starts_with("https://");
    if bad {
        return Err(ApiError::invalid(
            name,
            format!("2 to {max} characters that do not start with http:// or https://"),
        ));
    }
    Ok(text)
}

/// Every reader of parameters, without an account to do anything with.
pub(crate) fn read_all(params: &Params) -> Result<(), ApiError> {
    let created = read_create(params).map(drop);
    created.and(describe::read_all(params))
}

fn read_create(params: &Params) -> Result<CreateEni, ApiError> {
    let vswitch = params.required("VSwitchId")?.to_owned();
    let listed = params.list("SecurityGroupIds", 16)?;
    let security_groups: Vec<String> = match params.get("SecurityGroupId") {
        Some(_) if !listed.is_empty() => return Err(ApiError::both("SecurityGroupId", "SecurityGroupIds.N")),
        Some(one) => vec![one.to_owned()],
        None => listed.into_iter().map(str::to_owned).collect(),
    };
    no_prefixes(params)?;
    match params.get("InstanceType") {
        None | Some("Secondary") => {}
        Some("Trunk") => return Err(ApiError::unsupported("InstanceType=Trunk")),
        Some(_) => return Err(ApiError::invalid("InstanceType", "it must be Secondary or Trunk")),
    }
    match params.get("NetworkInterfaceTrafficMode") {
        None | Some("Standard") => {}
        Some("HighPerformance") => return Err(ApiError::unsupported("NetworkInterfaceTrafficMode=HighPerformance")),
        Some(_) => return Err(ApiError::invalid("NetworkInterfaceTrafficMode", "it must be Standard")),
    }
    Ok(CreateEni {
        vswitch,
        security_groups,
        primary4: params.parsed("PrimaryIpAddress")?,
        secondary4: want(params, ("PrivateIpAddress", 10), ("SecondaryPrivateIpAddressCount", 49))?,
        v6: want(params, ("Ipv6Address", 10), ("Ipv6AddressCount", 10))?,
        queues: params.int("QueueNumber", 1..=2048)?,
        tags: params.tags()?,
        name: described_text(params, "NetworkInterfaceName", 128)?,
        description: described_text(params, "Description", 256)?,
        resource_group: params.text("ResourceGroupId", 128)?,
        delete_on_release: params.flag("DeleteOnRelease")?.unwrap_or(true),
        source_dest_check: params.flag("SourceDestCheck")?.unwrap_or(false),
    })
}

async fn create(engine: &Arc<Engine>, api: Api, params: &Params) -> Result<Value, ApiError> {
    let spec = read_create(params)?;
    once(engine, api, params, async {
        let id = engine.create(&spec).await?;
        let world = engine.world();
        Ok(render::created(&world.account, world.account.eni(&id)?))
    })
    .await
}

async fn attach(engine: &Arc<Engine>, params: &Params) -> Result<Value, ApiError> {
    let (eni, instance) = (params.required("NetworkInterfaceId")?, params.required("InstanceId")?);
    if params.get("TrunkNetworkInstanceId").is_some() {
        return Err(ApiError::unsupported("TrunkNetworkInstanceId"));
    }
    params.int("NetworkCardIndex", 0..=0)?;
    engine.attach(eni, instance).await?;
    Ok(json!({}))
}

async fn detach(engine: &Arc<Engine>, params: &Params) -> Result<Value, ApiError> {
    let (eni, instance) = (params.required("NetworkInterfaceId")?, params.required("InstanceId")?);
    engine.detach(eni, instance).await?;
    Ok(json!({}))
}

async fn delete(engine: &Arc<Engine>, params: &Params) -> Result<Value, ApiError> {
    engine.delete(params.required("NetworkInterfaceId")?).await?;
    Ok(json!({}))
}

async fn assign4(engine: &Arc<Engine>, api: Api, params: &Params) -> Result<Value, ApiError> {
    let eni = params.required("NetworkInterfaceId")?;
    no_prefixes(params)?;
    let want = want(params, ("PrivateIpAddress", 100), ("SecondaryPrivateIpAddressCount", 100))?;
    if want == Want::Nothing {
        return Err(ApiError::missing("SecondaryPrivateIpAddressCount"));
    }
    once(engine, api, params, async {
        let taken = engine.assign4(eni, &want).await?;
        Ok(json!({"AssignedPrivateIpAddressesSet": {
            "NetworkInterfaceId": eni,
            "PrivateIpSet": {"PrivateIpAddress": taken},
            "Ipv4PrefixSet": {"Ipv4Prefixes": []},
        }}))
    })
    .await
}

async fn unassign4(engine: &Arc<Engine>, params: &Params) -> Result<Value, ApiError> {
    let eni = params.required("NetworkInterfaceId")?;
    no_prefixes(params)?;
    let list = params.parsed_list("PrivateIpAddress", 100)?;
    if list.is_empty() {
        return Err(ApiError::missing("PrivateIpAddress"));
    }
    engine.unassign4(eni, &list).await?;
    Ok(json!({}))
}

async fn assign6(engine: &Arc<Engine>, api: Api, params: &Params) -> Result<Value, ApiError> {
    let eni = params.required("NetworkInterfaceId")?;
    no_prefixes(params)?;
    let want = want(params, ("Ipv6Address", 10), ("Ipv6AddressCount", 10))?;
    if want == Want::Nothing {
        return Err(ApiError::missing("Ipv6AddressCount"));
    }
    once(engine, api, params, async {
        let taken = engine.assign6(eni, &want).await?;
        Ok(json!({
            "NetworkInterfaceId": eni,
            "Ipv6Sets": {"Ipv6Address": taken},
            "Ipv6PrefixSets": {"Ipv6Prefix": []},
        }))
    })
    .await
}

async fn unassign6(engine: &Arc<Engine>, params: &Params) -> Result<Value, ApiError> {
    let eni = params.required("NetworkInterfaceId")?;
    no_prefixes(params)?;
    let list = params.parsed_list("Ipv6Address", 10)?;
    if list.is_empty() {
        return Err(ApiError::missing("Ipv6Address"));
    }
    engine.unassign6(eni, &list).await?;
    Ok(json!({}))
}
