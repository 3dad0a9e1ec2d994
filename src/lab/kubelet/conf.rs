//! What a CNI plugin is told: network configurations and a call's stdin and
//! environment. Pure.
//!
//! Follows what containerd was seen to pass: the whole plugin object with name
//! and cniVersion, prevResult, runtimeConfig cut to the declared capabilities.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Capability by which containerd 2 passes all pod annotations.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    #[error("no network config found in {0}: cni plugin not initialized")]
    None(String),
    #[error("{file}: {cause}")]
    Bad { file: String, cause: String },
}

/// A cniVersion, for comparison; the text goes down as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|p| p.parse().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }
}

/// The verbs of the CNI specification that kubelet's side uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Check => "CHECK",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
        })
    }
}

/// A network: plugins to call one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfList {
    pub name: String,
    pub cni_version: String,
    pub version: Version,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<Plugin>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Plugin {
    /// The program's name.
    pub kind: String,
    /// Its object in the file.
    pub conf: Map<String, Value>,
}

impl ConfList {
    /// Read a conflist, or a single plugin's configuration (`.conf`, `.json`).
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfError> {
        let bad = |cause: String| ConfError::Bad { file: file.to_owned(), cause };
        let document: Map<String, Value> = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let field = |key: &str| document.get(key).and_then(Value::as_str).map(str::to_owned);
        let name = field("name").filter(|n| !n.is_empty()).ok_or_else(|| bad("no name".into()))?;
        let cni_version = field("cniVersion").unwrap_or_else(|| "0.1.0".into());
        let version = Version::parse(&cni_version).ok_or_else(|| bad(format!("{cni_version:?} is no cniVersion")))?;
        let switch = |key| matches!(document.get(key), Some(Value::Bool(true)) | Some(Value::String(_)));
        let objects = match document.get("plugins") {
            None => vec![Value::Object(document.clone())],
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(bad("plugins is no list".into())),
        };
        let plugins = objects.into_iter().map(plugin).collect::<Result<Vec<_>, _>>().map_err(&bad)?;
        if plugins.is_empty() {
            return Err(bad("no plugins".into()));
        }
        Ok(Self {
            name,
            cni_version,
            version,
            disable_check: switch("disableCheck"),
            disable_gc: switch("disableGC"),
            plugins,
        })
    }

    /// STATUS and GC came with 1.1.0.
    pub fn knows_status_and_gc(&self) -> bool {
        self.version >= Version(1, 1, 0)
    }

    /// What one plugin of the list reads from stdin.
    pub fn stdin(&self, plugin: &Plugin, runtime: &RuntimeConfig, prev: Option<&Value>, extra: Option<Value>) -> Value {
        let mut conf = plugin.conf.clone();
        conf.insert("name".into(), json!(self.name));
        conf.insert("cniVersion".into(), json!(self.cni_version));
        if let Some(prev) = prev {
            conf.insert("prevResult".into(), prev.clone());
        }
        let passed: Map<String, Value> =
            runtime.0.iter().filter(|(key, _)| plugin.wants(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !passed.is_empty() {
            conf.insert("runtimeConfig".into(), Value::Object(passed));
        }
        if let Some(attachments) = extra {
            conf.insert("cni.dev/valid-attachments".into(), attachments);
        }
        Value::Object(conf)
    }
}

impl Plugin {
    fn wants(&self, capability: &str) -> bool {
        self.conf.get("capabilities").and_then(|c| c.get(capability)) == Some(&Value::Bool(true))
    }
}

fn plugin(value: Value) -> Result<Plugin, String> {
    let Value::Object(conf) = value else { return Err("a plugin is no object".into()) };
    let kind = conf.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    // It becomes a path below the plugin folder.
    if kind.is_empty() || kind.contains('/') || kind == ".." || kind == "." {
        return Err(format!("{kind:?} is no plugin type"));
    }
    Ok(Plugin { kind, conf })
}

/// What a pod asks for, by capability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimeConfig(pub BTreeMap<String, Value>);

/// A container port that is also a port of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub host_port: i32,
    pub container_port: i32,
    pub protocol: String,
    pub host_ip: String,
}

impl RuntimeConfig {
    pub fn of(annotations: &BTreeMap<String, String>, host_ports: &[HostPort], seen: &str) -> Self {
        let mut config = BTreeMap::new();
        let rate = |key: &str| annotations.get(key).and_then(|v| bits(v));
        let ingress = rate("kubernetes.io/ingress-bandwidth");
        let egress = rate("kubernetes.io/egress-bandwidth");
        if ingress.is_some() || egress.is_some() {
            let mut bandwidth = Map::new();
            for (direction, rate) in [("Ingress", ingress), ("Egress", egress)] {
                if let Some(rate) = rate {
                    bandwidth.insert(format!("{direction}Rate"), json!(rate));
                    // containerd: unlimited.
                    bandwidth.insert(format!("{direction}Burst"), json!(u32::MAX));
                }
            }
            config.insert("bandwidth".into(), Value::Object(bandwidth));
        }
        if !host_ports.is_empty() {
            let mappings: Vec<Value> = host_ports
                .iter()
                .map(|p| {
                    json!({"hostPort": p.host_port, "containerPort": p.container_port,
                           "protocol": p.protocol.to_lowercase(), "hostIP": p.host_ip})
                })
                .collect();
            config.insert("portMappings".into(), Value::Array(mappings));
        }
        let mut all: Map<String, Value> = annotations.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        all.insert("kubernetes.io/config.seen".into(), json!(seen));
        all.insert("kubernetes.io/config.source".into(), json!("api"));
        config.insert(POD_ANNOTATIONS.into(), Value::Object(all));
        Self(config)
    }
}

/// A Kubernetes quantity as whole bits per second; `None` when it is none or
/// outside what kubelet accepts (1k to 1P).
fn bits(quantity: &str) -> Option<u64> {
    let digits = quantity.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match &quantity[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut value = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if !fraction.is_empty() {
        let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor);
        value = value.checked_add(u64::try_from(part / 10u128.pow(fraction.len() as u32)).ok()?)?;
    }
    (1_000..=1_000_000_000_000_000).contains(&value).then_some(value)
}

/// Who is attached: the identity of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub container_id: String,
    /// Path of the namespace; empty when it is known to be gone.
    pub netns: String,
    pub pod_namespace: String,
    pub pod_name: String,
    pub pod_uid: String,
}

/// The environment of a call. Calls about no container carry the keys empty.
pub fn environment(verb: Verb, who: Option<&Identity>, cni_path: &str) -> Vec<(String, String)> {
    let (id, netns, ifname, args) = match who {
        None => Default::default(),
        Some(who) => (
            who.container_id.clone(),
            who.netns.clone(),
            "eth0".to_owned(),
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                who.pod_namespace, who.pod_name, who.container_id, who.pod_uid
            ),
        ),
    };
    [
        ("CNI_COMMAND", verb.to_string()),
        ("CNI_CONTAINERID", id),
        ("CNI_NETNS", netns),
        ("CNI_IFNAME", ifname),
        ("CNI_ARGS", args),
        ("CNI_PATH", cni_path.to_owned()),
        ("PATH", format!("{cni_path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .to_vec()
}

/// The pod's addresses in a result: those of interfaces in a sandbox, or of no
/// interface at all.
pub fn pod_ips(result: &Value) -> Vec<std::net::IpAddr> {
    let interfaces = result.get("interfaces").and_then(Value::as_array);
    let in_sandbox = |ip: &Value| match (ip.get("interface").and_then(Value::as_u64), interfaces) {
        (Some(index), Some(list)) => {
            let interface = usize::try_from(index).ok().and_then(|i| list.get(i));
            interface.and_then(|i| i.get("sandbox")).and_then(Value::as_str).is_some_and(|s| !s.is_empty())
        }
        _ => true,
    };
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    ips.filter(|ip| in_sandbox(ip))
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = include_str!("../../../tests/testdata/cni/containerd-2.3.4.json");

    fn recorded() -> Vec<Value> {
        serde_json::from_str::<Value>(RECORDED).unwrap()["calls"].as_array().unwrap().clone()
    }

    /// The conflist that the recorded runtime was given.
    fn recorded_list() -> ConfList {
        let mut plugin = recorded()[0]["stdin"].as_object().unwrap().clone();
        let (name, version) = (plugin.remove("name").unwrap(), plugin.remove("cniVersion").unwrap());
        let list = json!({"name": name, "cniVersion": version, "plugins": [plugin]});
        ConfList::parse("10-bridge.conflist", &list.to_string()).unwrap()
    }

    #[test]
    fn every_recorded_call_of_containerd_is_made_the_same_way() {
        let list = recorded_list();
        let mut adds = BTreeMap::new();
        for call in recorded() {
            let env: BTreeMap<String, String> = serde_json::from_value(call["env"].clone()).unwrap();
            let args: BTreeMap<&str, &str> = env["CNI_ARGS"].split(';').filter_map(|a| a.split_once('=')).collect();
            let id = env["CNI_CONTAINERID"].clone();
            let who = (!id.is_empty()).then(|| Identity {
                container_id: id.clone(),
                netns: env["CNI_NETNS"].clone(),
                pod_namespace: args["K8S_POD_NAMESPACE"].into(),
                pod_name: args["K8S_POD_NAME"].into(),
                pod_uid: args["K8S_POD_UID"].into(),
            });
            let verb =
                [Verb::Add, Verb::Del, Verb::Status].into_iter().find(|v| v.to_string() == env["CNI_COMMAND"]).unwrap();
            let mine: BTreeMap<String, String> =
                environment(verb, who.as_ref(), &env["CNI_PATH"]).into_iter().filter(|(k, _)| k != "PATH").collect();
            assert_eq!(mine.keys().collect::<Vec<_>>(), env.keys().collect::<Vec<_>>());
            for (key, value) in &mine {
                if key == "CNI_ARGS" {
                    let sorted = |s: &str| s.split(';').map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
                    assert_eq!(sorted(value), sorted(&env[key]));
                } else {
                    assert_eq!(value, &env[key], "{key}");
                }
            }
            let annotations = &call["stdin"]["runtimeConfig"][POD_ANNOTATIONS];
            let runtime = match annotations["kubernetes.io/config.seen"].as_str() {
                None => RuntimeConfig::default(),
                Some(seen) => {
                    let own: BTreeMap<String, String> = annotations
                        .as_object()
                        .unwrap()
                        .iter()
                        .filter(|(k, _)| !k.starts_with("kubernetes.io/config."))
                        .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned()))
                        .collect();
                    RuntimeConfig::of(&own, &[], seen)
                }
            };
            let prev = (verb == Verb::Del).then(|| &adds[&id]);
            assert_eq!(list.stdin(&list.plugins[0], &runtime, prev, None), call["stdin"], "{verb}");
            if verb == Verb::Add {
                assert_eq!(pod_ips(&call["stdout"]).len(), 1);
                adds.insert(id, call["stdout"].clone());
            }
        }
    }

    #[test]
    fn only_declared_capabilities_are_passed() {
        let list = ConfList::parse(
            "x",
            r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"b","capabilities":{"portMappings":true}}]}"#,
        )
        .unwrap();
        let ports = [HostPort { host_port: 80, container_port: 8080, protocol: "TCP".into(), host_ip: String::new() }];
        let runtime = RuntimeConfig::of(&BTreeMap::new(), &ports, "now");
        assert_eq!(list.stdin(&list.plugins[0], &runtime, None, None).get("runtimeConfig"), None);
        let second = list.stdin(&list.plugins[1], &runtime, None, None);
        assert_eq!(
            second["runtimeConfig"],
            json!({"portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"tcp","hostIP":""}]})
        );
        assert!(!list.knows_status_and_gc());
    }

    #[test]
    fn bandwidth_is_in_bits_per_second() {
        assert_eq!(bits("10M"), Some(10_000_000));
        assert_eq!(bits("1.5G"), Some(1_500_000_000));
        assert_eq!(bits("1Mi"), Some(1_048_576));
        for bad in ["", "M", "10X", "-1M", "999", "2000P", "1.x"] {
            assert_eq!(bits(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_file_that_is_no_network_is_refused_with_its_name() {
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"name":"n","plugins":[]}"#,
            r#"{"name":"n","type":"../sh"}"#,
            r#"{"name":"n","cniVersion":"x","type":"a"}"#,
        ] {
            let error = ConfList::parse("10-x.conflist", bad).unwrap_err();
            assert!(error.to_string().starts_with("10-x.conflist: "), "{error}");
        }
        let single = ConfList::parse("x.conf", r#"{"name":"n","cniVersion":"1.1.0","type":"bridge"}"#).unwrap();
        assert_eq!(single.plugins[0].kind, "bridge");
    }
}
