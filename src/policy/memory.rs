//! Which namespaces had policies when the cluster was last seen whole.
//!
//! Owner: PolicyCompiler's worker. A file in the agent's state folder, written anew
//! when it changes: an agent that starts while the API server is away closes the
//! pods whose namespace had policies, and no others. Without it all are closed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::model::Policy;
use super::tables::{CLOSED, Enforced};

/// Larger than any that was written here.
const MAX_SIZE: u64 = 64 << 20;

/// In which directions policies of a namespace isolate pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guarded {
    pub ingress: bool,
    pub egress: bool,
}

impl Guarded {
    pub fn add(&mut self, policy: &Policy) {
        self.ingress |= policy.ingress.is_some();
        self.egress |= policy.egress.is_some();
    }

    pub fn closed(self) -> Enforced {
        Enforced { ingress: self.ingress.then_some(CLOSED), egress: self.egress.then_some(CLOSED) }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    pub namespaces: BTreeMap<String, Guarded>,
}

pub struct Memory {
    /// None: nothing is remembered.
    path: Option<PathBuf>,
    known: Option<Known>,
}

impl Memory {
    pub fn open(path: Option<PathBuf>) -> Self {
        let read = |path: &PathBuf| match read(path) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "What is remembered of policies cannot be read; new pods are closed until the cluster is known");
                None
            }
        };
        let known = path.as_ref().and_then(read);
        Self { path, known }
    }

    /// How a new pod of the namespace is held while the cluster is not known.
    pub fn closed(&self, namespace: &str) -> Enforced {
        match &self.known {
            Some(known) => known.namespaces.get(namespace).copied().unwrap_or_default().closed(),
            None => Enforced::CLOSED,
        }
    }

    pub fn put(&mut self, known: Known) {
        if self.known.as_ref() == Some(&known) {
            return;
        }
        if let Some(path) = &self.path
            && let Err(error) = write(path, &known)
        {
            tracing::warn!(path = %path.display(), %error, "What is known of policies cannot be remembered for the next start");
        }
        self.known = Some(known);
    }
}

fn read(path: &Path) -> io::Result<Option<Known>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() && meta.len() <= MAX_SIZE => {}
        Ok(_) => return Err(io::Error::other("not a file that was written here")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    }
    serde_json::from_slice(&fs::read(path)?).map(Some).map_err(io::Error::other)
}

/// Whole or not at all.
fn write(path: &Path, known: &Known) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = fs::File::create(&fresh)?;
    file.write_all(&serde_json::to_vec(known).map_err(io::Error::other)?)?;
    file.sync_data()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_is_known_after_a_start_and_garbage_closes_everything() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policies.json");
        assert_eq!(Memory::open(Some(path.clone())).closed("a"), Enforced::CLOSED, "nothing is known");
        let mut memory = Memory::open(Some(path.clone()));
        let some = Guarded { ingress: true, egress: false };
        memory.put(Known { namespaces: [("a".to_owned(), some)].into() });
        let again = Memory::open(Some(path.clone()));
        assert_eq!(again.closed("a"), Enforced { ingress: Some(CLOSED), egress: None });
        assert_eq!(again.closed("b"), Enforced::default());
        for garbage in ["", "{", "[]", "{\"namespaces\":{\"a\":1}}", "{\"other\":1}"] {
            fs::write(&path, garbage).unwrap();
            assert_eq!(Memory::open(Some(path.clone())).closed("b"), Enforced::CLOSED, "{garbage}");
        }
    }
}
