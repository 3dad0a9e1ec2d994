//! How the lists of Kubernetes objects merge: the part of the API schema that
//! strategic merge patch and server-side apply need.

/// How a list merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// Replaced as a whole.
    Atomic,
    /// A set of scalars.
    Set,
    /// Items with the same keys are the same item.
    Map { strategic: &'static str, keys: &'static [&'static str] },
}

const fn by(key: &'static str, keys: &'static [&'static str]) -> List {
    List::Map { strategic: key, keys }
}

/// The list at `path`: field names from the top, without list positions.
pub fn list(path: &[&str]) -> List {
    let Some((field, parents)) = path.split_last() else { return List::Atomic };
    let parent = parents.last().copied().unwrap_or("");
    match (*field, parent) {
        (
            "containers" | "initContainers" | "ephemeralContainers" | "volumes" | "schedulingGates" | "resourceClaims",
            "spec",
        )
        | ("imagePullSecrets", "spec")
        | ("secrets", "")
        | ("claims", "resources") => by("name", &["name"]),
        ("env", "containers" | "initContainers" | "ephemeralContainers") => by("name", &["name"]),
        ("ports", "containers" | "initContainers" | "ephemeralContainers") => {
            by("containerPort", &["containerPort", "protocol"])
        }
        ("volumeMounts", "containers" | "initContainers" | "ephemeralContainers") => by("mountPath", &["mountPath"]),
        ("volumeDevices", "containers" | "initContainers" | "ephemeralContainers") => by("devicePath", &["devicePath"]),
        // The only `spec.ports` is a Service's.
        ("ports", "spec") => by("port", &["port", "protocol"]),
        ("hostAliases", "spec") => by("ip", &["ip"]),
        ("topologySpreadConstraints", "spec") => by("topologyKey", &["topologyKey", "whenUnsatisfiable"]),
        ("conditions", "status") => by("type", &["type"]),
        ("addresses", "status") => by("type", &["type"]),
        ("podIPs" | "hostIPs", "status") => by("ip", &["ip"]),
        ("ownerReferences", "metadata") => by("uid", &["uid"]),
        ("finalizers", "metadata" | "spec") | ("podCIDRs", "spec") => List::Set,
        _ => List::Atomic,
    }
}

/// Maps that one manager owns as a whole under server-side apply.
pub fn atomic_map(path: &[&str]) -> bool {
    matches!(
        path.last().copied().unwrap_or(""),
        "selector"
            | "labelSelector"
            | "namespaceSelector"
            | "podSelector"
            | "nodeSelector"
            | "targetRef"
            | "involvedObject"
            | "regarding"
            | "fieldRef"
            | "resourceFieldRef"
            | "secretKeyRef"
            | "configMapKeyRef"
    )
}
