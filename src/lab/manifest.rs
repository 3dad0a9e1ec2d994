//! Kubernetes manifests: several YAML documents, bounded, as people write them.
//!
//! YAML 1.1 habits of the real tools are kept: `0644` is octal, `yes` is true.
//! Documents of kinds the lab does not have are named, not refused.

use serde_json::Value;
use serde_saphyr::Options;

use super::kube::kind::{self, Kind};
use super::kube::object;

/// What a file of manifests holds.
#[derive(Debug, Default)]
pub struct Manifest {
    pub objects: Vec<Item>,
    pub skipped: Vec<Skipped>,
}

/// An object of a known kind.
#[derive(Debug)]
pub struct Item {
    pub kind: &'static Kind,
    /// Its namespace; `default` where the manifest does not say, empty for
    /// kinds without.
    pub namespace: String,
    pub name: String,
    pub object: Value,
}

/// An object of a kind the lab does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub api_version: String,
    pub kind: String,
    pub name: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ({})", self.kind, self.name, self.api_version)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("the manifest is larger than {MOST_BYTES} bytes; split it")]
    TooLarge,
    #[error("the manifest is not UTF-8 text")]
    NotText,
    #[error("not valid YAML: {0}")]
    Yaml(String),
    #[error("document {0} is not an object with apiVersion and kind")]
    NotAnObject(usize),
    #[error("the manifest holds more than {MOST_OBJECTS} objects; split it")]
    TooMany,
    #[error("expected one document, found {0}")]
    NotOne(usize),
}

const MOST_BYTES: usize = 64 * 1024 * 1024;
const MOST_OBJECTS: usize = 50_000;
const DEEPEST: usize = 100;

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEEPEST,
            max_documents: MOST_OBJECTS + 1,
            max_nodes: 5_000_000,
            max_events: 10_000_000,
            max_aliases: 10_000,
            max_anchors: 10_000,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        legacy_octal_numbers: true,
    }
}

/// All documents of a text, empty ones left out.
fn documents(bytes: &[u8]) -> Result<Vec<Value>, ManifestError> {
    if bytes.len() > MOST_BYTES {
        return Err(ManifestError::TooLarge);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| ManifestError::NotText)?;
    let all: Vec<Value> =
        serde_saphyr::from_multiple_with_options(text, options()).map_err(|e| ManifestError::Yaml(e.to_string()))?;
    Ok(all.into_iter().filter(|document| !document.is_null()).collect())
}

/// The only document of a text.
pub fn one(bytes: &[u8]) -> Result<Value, ManifestError> {
    let mut all = documents(bytes)?;
    match (all.pop(), all.len()) {
        (Some(one), 0) => Ok(one),
        (_, others) => Err(ManifestError::NotOne(others)),
    }
}

/// Everything in a manifest file, `List`s opened.
pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let mut manifest = Manifest::default();
    for (index, document) in documents(bytes)?.into_iter().enumerate() {
        add(&mut manifest, document, index + 1, 0)?;
    }
    Ok(manifest)
}

fn add(manifest: &mut Manifest, mut document: Value, number: usize, depth: usize) -> Result<(), ManifestError> {
    let (api_version, word) = (object::text(&document, "/apiVersion"), object::text(&document, "/kind"));
    if api_version.is_empty() || word.is_empty() {
        return Err(ManifestError::NotAnObject(number));
    }
    if manifest.objects.len() + manifest.skipped.len() >= MOST_OBJECTS {
        return Err(ManifestError::TooMany);
    }
    let known = kind::by_gvk(api_version, word);
    // Also `PodList` and the like.
    let list = word.ends_with("List") && known.is_none() && document.get("items").is_some_and(Value::is_array);
    if list && depth < 4 {
        let element = word.trim_end_matches("List").to_owned();
        let api_version = api_version.to_owned();
        let Some(Value::Array(items)) = document.get_mut("items").map(Value::take) else { return Ok(()) };
        for mut item in items {
            // The items of a typed list need not repeat their type.
            if !element.is_empty() && item.is_object() {
                let map = object::map_mut(&mut item, &[]);
                object::default(map, "apiVersion", api_version.as_str());
                object::default(map, "kind", element.as_str());
            }
            add(manifest, item, number, depth + 1)?;
        }
        return Ok(());
    }
    let name = match object::name(&document) {
        "" => object::text(&document, "/metadata/generateName").to_owned(),
        name => name.to_owned(),
    };
    match known {
        None => manifest.skipped.push(Skipped { api_version: api_version.into(), kind: word.into(), name }),
        Some(kind) => {
            let namespace = match object::namespace(&document) {
                _ if !kind.namespaced => String::new(),
                "" => "default".to_owned(),
                namespace => namespace.to_owned(),
            };
            manifest.objects.push(Item { kind, namespace, name, object: document });
        }
    }
    Ok(())
}
