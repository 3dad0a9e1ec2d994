//! CNI calls, decoded and checked: the network configuration and `CNI_ARGS`.
//!
//! Pure. Everything here is outside input: from a conflist that an operator
//! wrote, from a container runtime, from a pod's annotations, or from whoever
//! reached the socket.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value;

use super::result::{CniResult, Version};
use super::wire::{self, CniError, Command, Request, WIRE_VERSION, code};
use crate::model::{AttachmentId, PodKey, SandboxId};

/// The capability under which containerd passes a pod's annotations.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
pub const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// A checked call. The attachment is present for ADD, DEL and CHECK.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub command: Command,
    pub version: Version,
    pub attachment: Option<AttachmentId>,
    pub pod: PodArgs,
    pub netns: PathBuf,
    pub config: NetConf,
}

/// What the agent takes from the network configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetConf {
    pub name: String,
    /// `runtimeConfig`, as the runtime filled it in.
    pub bandwidth: Option<Value>,
    /// `runtimeConfig.portMappings` names ports of the node.
    pub host_ports: bool,
    pub annotations: Option<BTreeMap<String, String>>,
    pub previous: Option<CniResult>,
    /// For GC.
    pub valid: Option<BTreeSet<AttachmentId>>,
}

/// Who the sandbox is for; the runtime says it in `CNI_ARGS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodArgs {
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub uid: Option<String>,
}

impl PodArgs {
    /// `K=V;K=V`, in any order. Unknown keys are ignored: Kubernetes sends
    /// `IgnoreUnknown=1`, and other runtimes send keys of their own.
    pub fn parse(args: &str) -> Result<Self, CniError> {
        let mut out = Self::default();
        for pair in args.split(';').filter(|p| !p.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                let msg = "invalid environment variables: CNI_ARGS";
                let remedy = format!("CNI_ARGS holds {:?}, which is not KEY=VALUE", wire::clip(pair));
                return Err(CniError::new(code::INVALID_ENVIRONMENT, msg).remedy(remedy));
            };
            let slot = match key {
                "K8S_POD_NAMESPACE" => &mut out.namespace,
                "K8S_POD_NAME" => &mut out.name,
                "K8S_POD_UID" => &mut out.uid,
                _ => continue,
            };
            if !is_kubernetes_name(value) {
                let msg = "invalid environment variables: CNI_ARGS";
                let remedy = format!("CNI_ARGS has {key}={:?}, which is not a Kubernetes name", wire::clip(value));
                return Err(CniError::new(code::INVALID_ENVIRONMENT, msg).remedy(remedy));
            }
            *slot = Some(value.to_owned());
        }
        Ok(out)
    }

    pub fn key(&self) -> Option<PodKey> {
        Some(PodKey::new(self.namespace.as_ref()?, self.name.as_ref()?))
    }
}

/// A DNS subdomain, which pod names, namespaces and UIDs all are.
fn is_kubernetes_name(s: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let whole = |c: u8| inner(c) || c == b'-' || c == b'.';
    let b = s.as_bytes();
    !b.is_empty() && b.len() <= 253 && b.iter().all(|c| whole(*c)) && inner(b[0]) && inner(b[b.len() - 1])
}

impl Call {
    pub fn parse(request: &Request) -> Result<Self, CniError> {
        if request.wire != WIRE_VERSION {
            let msg = format!("the CNI shim speaks envelope {}, the agent {WIRE_VERSION}", request.wire);
            let remedy =
                "shim and agent are of different releases; the agent's pod installs its own shim when it starts";
            return Err(CniError::new(code::TRY_AGAIN, msg).remedy(remedy));
        }
        if !request.config.is_object() {
            return Err(CniError::new(code::DECODE, "the network configuration is not a JSON object"));
        }
        let name = wire::check_version(&request.config, request.command)?;
        let version = Version::parse(name).ok_or_else(|| CniError::new(code::INCOMPATIBLE_VERSION, name))?;
        wire::check_environment(request).map_err(|e| e.in_version(name))?;
        let attachment = (!request.container_id.is_empty()).then(|| AttachmentId {
            sandbox: SandboxId::from(request.container_id.as_str()),
            ifname: request.ifname.clone(),
        });
        let needs_pod = matches!(request.command, Command::Add | Command::Check | Command::Del);
        Ok(Self {
            command: request.command,
            version,
            attachment: attachment.filter(|_| needs_pod),
            pod: if needs_pod { PodArgs::parse(&request.args)? } else { PodArgs::default() },
            netns: PathBuf::from(&request.netns),
            config: NetConf::read(&request.config, request.command)?,
        })
    }
}

impl NetConf {
    fn read(config: &Value, command: Command) -> Result<Self, CniError> {
        let name = match config.get("name") {
            Some(Value::String(name)) if wire::container_id_fault(name).is_none() => name.clone(),
            // A release must not fail for the name of its network.
            _ if command == Command::Del => String::new(),
            None => return Err(invalid("name is missing", "give the network a name in the conflist")),
            Some(other) => {
                let remedy = "a network's name starts with a letter or digit and goes on with these, '_', '.' or '-'";
                return Err(invalid(format!("name is {}", wire::brief(other)), remedy));
            }
        };
        let runtime = match config.get("runtimeConfig") {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => return Err(invalid(format!("runtimeConfig is {}", wire::brief(other)), "it is an object")),
        };
        let mut out = Self { name, ..Self::default() };
        match command {
            Command::Add => {
                out.bandwidth = runtime.and_then(|r| r.get("bandwidth")).filter(|v| !v.is_null()).cloned();
                out.host_ports = match runtime.and_then(|r| r.get("portMappings")) {
                    None | Some(Value::Null) => false,
                    Some(Value::Array(ports)) => !ports.is_empty(),
                    Some(other) => {
                        return Err(invalid(format!("portMappings is {}", wire::brief(other)), "it is a list"));
                    }
                };
                out.annotations = match runtime.and_then(|r| r.get(POD_ANNOTATIONS)) {
                    None | Some(Value::Null) => None,
                    Some(v) => Some(string_map(v)?),
                };
                out.previous = previous(config)?;
            }
            Command::Check => out.previous = previous(config)?,
            Command::Gc => out.valid = Some(valid_attachments(config)?),
            // What DEL carries is not needed, so it cannot be in the way.
            Command::Del | Command::Status | Command::Version => {}
        }
        Ok(out)
    }
}

fn invalid(msg: impl std::fmt::Display, remedy: impl Into<String>) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("invalid network configuration: {msg}")).remedy(remedy)
}

fn previous(config: &Value) -> Result<Option<CniResult>, CniError> {
    match config.get("prevResult") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => CniResult::read(value).map(Some),
    }
}

fn string_map(value: &Value) -> Result<BTreeMap<String, String>, CniError> {
    let bad =
        || invalid(format!("runtimeConfig {POD_ANNOTATIONS:?} is not a map of strings"), "the runtime fills it in");
    let map = value.as_object().ok_or_else(bad)?;
    map.iter().map(|(k, v)| Ok((k.clone(), v.as_str().ok_or_else(bad)?.to_owned()))).collect()
}

/// A missing list is an error: taken for an empty one it would release every
/// pod of the node.
fn valid_attachments(config: &Value) -> Result<BTreeSet<AttachmentId>, CniError> {
    let remedy = "the runtime lists the attachments to keep as {containerID, ifname}";
    let Some(list) = config.get(VALID_ATTACHMENTS).and_then(Value::as_array) else {
        return Err(invalid(format!("{VALID_ATTACHMENTS} is not a list"), remedy));
    };
    let one = |item: &Value| {
        let text = |key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
        let id = text("containerID").filter(|s| wire::container_id_fault(s).is_none())?;
        let ifname = text("ifname").filter(|s| wire::ifname_fault(s).is_none())?;
        Some(AttachmentId { sandbox: SandboxId(id), ifname })
    };
    let bad = |item: &Value| invalid(format!("{VALID_ATTACHMENTS} holds {}", wire::brief(item)), remedy);
    list.iter().map(|item| one(item).ok_or_else(|| bad(item))).collect()
}

#[cfg(test)]
mod tests;
