//! The little protobuf that real clients insist on. Pure.
//!
//! `kubectl create configmap`, `create deployment` and their like send protobuf
//! from 1.32 on and do not fall back to JSON. This reads the kinds that those
//! commands make, by a table of field numbers. A field that is not in the table
//! and says something is refused by name, never dropped.

use base64::Engine as _;
use serde_json::{Map, Value};

/// What precedes every object.
const MAGIC: &[u8] = b"k8s\0";
const DEEPEST: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error("the body is not a Kubernetes protobuf object: {0}")]
    Malformed(&'static str),
    #[error("{0} objects are not read from protobuf here; send JSON")]
    Kind(String),
    #[error("field {1} of {0} is not read from protobuf here; send JSON")]
    Field(&'static str, u64),
}

use ProtobufError::{Field, Kind, Malformed};

#[derive(Clone, Copy)]
enum Type {
    Text,
    /// Zero means absent.
    Int,
    /// Zero is a value.
    Number,
    Bool,
    Message(&'static str),
    Texts,
    Messages(&'static str),
    /// Map of text to text.
    Map,
    /// Map of text to bytes, in base64.
    Bytes,
    /// Map of text to quantities.
    Quantities,
    IntOrString,
    /// Set by the server.
    Ignored,
}

use Type::*;

type Fields = &'static [(u64, &'static str, Type)];

fn fields(message: &str) -> Option<Fields> {
    Some(match message {
        "ObjectMeta" => &[
            (1, "name", Text),
            (2, "generateName", Text),
            (3, "namespace", Text),
            (8, "creationTimestamp", Ignored),
            (11, "labels", Map),
            (12, "annotations", Map),
            (14, "finalizers", Texts),
        ],
        "Namespace" => &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Ignored), (3, "status", Ignored)],
        "ConfigMap" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "data", Map),
            (3, "binaryData", Bytes),
            (4, "immutable", Bool),
        ],
        "Secret" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "data", Bytes),
            (3, "type", Text),
            (4, "stringData", Map),
            (5, "immutable", Bool),
        ],
        "ServiceAccount" => &[(1, "metadata", Message("ObjectMeta"))],
        "Service" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("ServiceSpec")), (3, "status", Ignored)]
        }
        "ServiceSpec" => &[
            (1, "ports", Messages("ServicePort")),
            (2, "selector", Map),
            (3, "clusterIP", Text),
            (4, "type", Text),
            (5, "externalIPs", Texts),
            (7, "sessionAffinity", Text),
            (8, "loadBalancerIP", Text),
            (10, "externalName", Text),
            (11, "externalTrafficPolicy", Text),
            (13, "publishNotReadyAddresses", Bool),
        ],
        "ServicePort" => &[
            (1, "name", Text),
            (2, "protocol", Text),
            (3, "port", Int),
            (4, "targetPort", IntOrString),
            (5, "nodePort", Int),
            (6, "appProtocol", Text),
        ],
        "Deployment" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("DeploymentSpec")), (3, "status", Ignored)]
        }
        "DeploymentSpec" => &[
            (1, "replicas", Number),
            (2, "selector", Message("LabelSelector")),
            (3, "template", Message("PodTemplateSpec")),
            (4, "strategy", Message("DeploymentStrategy")),
            (5, "minReadySeconds", Int),
            (7, "paused", Bool),
        ],
        "DeploymentStrategy" => &[(1, "type", Text)],
        "LabelSelector" => &[(1, "matchLabels", Map), (2, "matchExpressions", Messages("Requirement"))],
        "Requirement" => &[(1, "key", Text), (2, "operator", Text), (3, "values", Texts)],
        "PodTemplateSpec" => &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("PodSpec"))],
        "Pod" => &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("PodSpec")), (3, "status", Ignored)],
        "PodSpec" => &[
            (2, "containers", Messages("Container")),
            (3, "restartPolicy", Text),
            (4, "terminationGracePeriodSeconds", Number),
            (6, "dnsPolicy", Text),
            (7, "nodeSelector", Map),
            (8, "serviceAccountName", Text),
            (10, "nodeName", Text),
            (11, "hostNetwork", Bool),
            (16, "hostname", Text),
            (17, "subdomain", Text),
            (19, "schedulerName", Text),
        ],
        "Container" => &[
            (1, "name", Text),
            (2, "image", Text),
            (3, "command", Texts),
            (4, "args", Texts),
            (5, "workingDir", Text),
            (6, "ports", Messages("ContainerPort")),
            (7, "env", Messages("EnvVar")),
            (8, "resources", Message("Resources")),
            (14, "imagePullPolicy", Text),
        ],
        "ContainerPort" => &[
            (1, "name", Text),
            (2, "hostPort", Int),
            (3, "containerPort", Int),
            (4, "protocol", Text),
            (5, "hostIP", Text),
        ],
        "EnvVar" => &[(1, "name", Text), (2, "value", Text)],
        "Resources" => &[(1, "limits", Quantities), (2, "requests", Quantities)],
        _ => return None,
    })
}

/// A field as it is on the wire.
enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed(u64),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, ProtobufError> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(Malformed("it ends within a number"))?;
            self.0 = rest;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Malformed("a number is too long"))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], ProtobufError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed("it ends within a field"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, ProtobufError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed("a field is too long"))?;
                Wire::Bytes(self.take(length)?)
            }
            width @ (1 | 5) => {
                let bytes = self.take(if width == 1 { 8 } else { 4 })?;
                Wire::Fixed(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
            }
            _ => return Err(Malformed("a field has an unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }
}

impl Wire<'_> {
    fn text(&self) -> Result<String, ProtobufError> {
        match self {
            Wire::Bytes(bytes) => String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("a text is not UTF-8")),
            _ => Err(Malformed("a text has the wrong wire type")),
        }
    }

    fn bytes(&self) -> Result<&[u8], ProtobufError> {
        match self {
            Wire::Bytes(bytes) => Ok(bytes),
            _ => Err(Malformed("a message has the wrong wire type")),
        }
    }

    fn int(&self) -> Result<i64, ProtobufError> {
        match self {
            Wire::Varint(value) => Ok(*value as i64),
            _ => Err(Malformed("a number has the wrong wire type")),
        }
    }

    /// Zero, empty, or a message of nothing but such.
    fn says_nothing(&self, depth: usize) -> bool {
        match self {
            Wire::Varint(value) | Wire::Fixed(value) => *value == 0,
            Wire::Bytes(bytes) => {
                let mut reader = Reader(bytes);
                depth < DEEPEST
                    && std::iter::from_fn(|| reader.next().transpose())
                        .all(|field| field.is_ok_and(|(_, value)| value.says_nothing(depth + 1)))
            }
        }
    }
}

/// The object in a protobuf body.
pub fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let body = body.strip_prefix(MAGIC).ok_or(Malformed("it does not begin as one"))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut reader = Reader(body);
    while let Some((number, value)) = reader.next()? {
        match (number, value) {
            (1, value) => {
                let mut meta = Reader(value.bytes()?);
                while let Some((number, value)) = meta.next()? {
                    match number {
                        1 => api_version = value.text()?,
                        2 => kind = value.text()?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    const READ: &[(&str, &str)] = &[
        ("v1", "Namespace"),
        ("v1", "ConfigMap"),
        ("v1", "Secret"),
        ("v1", "ServiceAccount"),
        ("v1", "Service"),
        ("v1", "Pod"),
        ("apps/v1", "Deployment"),
    ];
    let known = READ.iter().find(|read| **read == (api_version.as_str(), kind.as_str()));
    let (_, message) = known.ok_or_else(|| Kind(format!("{kind} ({api_version})")))?;
    let mut object = read(message, raw, 0)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(Value::Object(object))
}

fn read(message: &'static str, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, ProtobufError> {
    if depth > DEEPEST {
        return Err(Malformed("it is nested too deeply"));
    }
    let table = fields(message).ok_or(Malformed("a message is unknown"))?;
    let mut object = Map::new();
    let mut reader = Reader(bytes);
    while let Some((number, value)) = reader.next()? {
        let Some((_, name, kind)) = table.iter().find(|(known, ..)| *known == number) else {
            if value.says_nothing(0) {
                continue;
            }
            return Err(Field(message, number));
        };
        let into_map = |object: &mut Map<String, Value>, read: &dyn Fn(&Wire<'_>) -> Result<Value, ProtobufError>| {
            let (key, value) = entry(value.bytes()?, read)?;
            let map = object.entry(*name).or_insert_with(|| Map::new().into());
            if let Value::Object(map) = map {
                map.insert(key, value);
            }
            Ok::<(), ProtobufError>(())
        };
        let push = |object: &mut Map<String, Value>, item: Value| {
            if let Value::Array(list) = object.entry(*name).or_insert_with(|| Value::Array(Vec::new())) {
                list.push(item);
            }
        };
        let single = match kind {
            Ignored => None,
            Text => Some(value.text()?).filter(|text| !text.is_empty()).map(Value::from),
            Int => Some(value.int()?).filter(|number| *number != 0).map(Value::from),
            Number => Some(value.int()?.into()),
            Bool => Some(value.int()? != 0).filter(|truth| *truth).map(Value::from),
            Message(of) => Some(Value::Object(read(of, value.bytes()?, depth + 1)?)),
            Messages(of) => {
                push(&mut object, Value::Object(read(of, value.bytes()?, depth + 1)?));
                None
            }
            Texts => {
                push(&mut object, value.text()?.into());
                None
            }
            Map => {
                into_map(&mut object, &|value| value.text().map(Value::from))?;
                None
            }
            Type::Bytes => {
                let engine = base64::engine::general_purpose::STANDARD;
                into_map(&mut object, &|value| Ok(engine.encode(value.bytes()?).into()))?;
                None
            }
            Quantities => {
                into_map(&mut object, &|value| first_text(value.bytes()?).map(Value::from))?;
                None
            }
            IntOrString => Some(int_or_string(value.bytes()?)?),
        };
        if let Some(single) = single {
            object.insert((*name).to_owned(), single);
        }
    }
    Ok(object)
}

fn entry(
    bytes: &[u8],
    read: &dyn Fn(&Wire<'_>) -> Result<Value, ProtobufError>,
) -> Result<(String, Value), ProtobufError> {
    let (mut key, mut result) = (String::new(), Value::from(""));
    let mut reader = Reader(bytes);
    while let Some((number, value)) = reader.next()? {
        match number {
            1 => key = value.text()?,
            2 => result = read(&value)?,
            _ => return Err(Malformed("a map entry has more than a key and a value")),
        }
    }
    Ok((key, result))
}

fn first_text(bytes: &[u8]) -> Result<String, ProtobufError> {
    match Reader(bytes).next()? {
        Some((1, value)) => value.text(),
        _ => Ok(String::new()),
    }
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    let mut reader = Reader(bytes);
    while let Some((field, value)) = reader.next()? {
        match field {
            1 => is_text = value.int()? == 1,
            2 => number = value.int()?,
            3 => text = value.text()?,
            _ => {}
        }
    }
    Ok(if is_text { text.into() } else { number.into() })
}
