//! Runs the programs of a network as containerd does: ADD in order, DEL in
//! reverse, each with the result of the one before; in the node's namespace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::conf::{ConfError, ConfList, Identity, Plugin, RuntimeConfig, Verb, environment};
use crate::lab::vpc::ns::NsThread;

/// More than this on stdout is no CNI answer.
const MAX_OUTPUT: u64 = 1 << 20;

/// A call that failed: which plugin, and what it said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{verb} by plugin {plugin:?}: {message}{}", if details.is_empty() { String::new() } else { format!("; {details}") })]
pub struct CniError {
    pub verb: Verb,
    pub plugin: String,
    /// The specification's error code; 0 when the plugin gave none.
    pub code: u32,
    pub message: String,
    pub details: String,
}

/// One sandbox on the network, with what DEL needs to know.
#[derive(Clone, Debug)]
pub struct Attachment {
    pub list: ConfList,
    pub who: Identity,
    pub runtime: RuntimeConfig,
    pub result: Option<Value>,
}

/// How long one call of one plugin took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timed {
    pub verb: Verb,
    pub plugin: String,
    pub took: Duration,
    pub ok: bool,
}

/// Calls plugins of one node.
#[derive(Clone, Debug)]
pub struct Runner {
    pub at: NsThread,
    pub net_d: PathBuf,
    pub bin: PathBuf,
    /// After this a plugin is killed.
    pub timeout: Duration,
}

impl Runner {
    /// The network: the lexically first file, read afresh every time.
    pub fn load(&self) -> Result<ConfList, ConfError> {
        load(&self.net_d)
    }

    /// Attach; the answer of the last plugin is the result.
    pub async fn add(&self, attachment: &mut Attachment, log: &mut Vec<Timed>) -> Result<Value, CniError> {
        let mut prev = None;
        for plugin in &attachment.list.plugins {
            let said = self.call(Verb::Add, attachment, plugin, prev.as_ref(), log).await?;
            prev = Some(serde_json::from_str(&said).map_err(|e| CniError {
                verb: Verb::Add,
                plugin: plugin.kind.clone(),
                code: 6,
                message: format!("its result is not JSON: {e}"),
                details: String::new(),
            })?);
        }
        let result = prev.unwrap_or(Value::Null);
        attachment.result = Some(result.clone());
        Ok(result)
    }

    /// Detach, in reverse order; stops at the first failure, to be tried again.
    pub async fn del(&self, attachment: &Attachment, log: &mut Vec<Timed>) -> Result<(), CniError> {
        for plugin in attachment.list.plugins.iter().rev() {
            self.call(Verb::Del, attachment, plugin, attachment.result.as_ref(), log).await?;
        }
        Ok(())
    }

    pub async fn check(&self, attachment: &Attachment, log: &mut Vec<Timed>) -> Result<(), CniError> {
        if attachment.list.disable_check {
            return Ok(());
        }
        for plugin in &attachment.list.plugins {
            self.call(Verb::Check, attachment, plugin, attachment.result.as_ref(), log).await?;
        }
        Ok(())
    }

    /// Ask every plugin whether it could ADD now.
    pub async fn status(&self, list: &ConfList) -> Result<(), CniError> {
        for plugin in &list.plugins {
            let stdin = list.stdin(plugin, &RuntimeConfig::default(), None, None);
            self.run(Verb::Status, None, plugin, &stdin).await?;
        }
        Ok(())
    }

    /// Tell every plugin which attachments exist; all are told, the first
    /// failure is reported.
    pub async fn gc(&self, list: &ConfList, valid: &[String]) -> Result<(), CniError> {
        let attachments: Value = valid.iter().map(|id| json!({"containerID": id, "ifname": "eth0"})).collect();
        let mut outcome = Ok(());
        for plugin in &list.plugins {
            let stdin = list.stdin(plugin, &RuntimeConfig::default(), None, Some(attachments.clone()));
            let told = self.run(Verb::Gc, None, plugin, &stdin).await;
            outcome = outcome.and(told.map(drop));
        }
        outcome
    }

    async fn call(
        &self,
        verb: Verb,
        attachment: &Attachment,
        plugin: &Plugin,
        prev: Option<&Value>,
        log: &mut Vec<Timed>,
    ) -> Result<String, CniError> {
        let stdin = attachment.list.stdin(plugin, &attachment.runtime, prev, None);
        let begin = Instant::now();
        let said = self.run(verb, Some(&attachment.who), plugin, &stdin).await;
        log.push(Timed { verb, plugin: plugin.kind.clone(), took: begin.elapsed(), ok: said.is_ok() });
        said
    }

    async fn run(
        &self,
        verb: Verb,
        who: Option<&Identity>,
        plugin: &Plugin,
        stdin: &Value,
    ) -> Result<String, CniError> {
        let failed = |code, message: String| CniError {
            verb,
            plugin: plugin.kind.clone(),
            code,
            message,
            details: String::new(),
        };
        let mut command = Command::new(self.bin.join(&plugin.kind));
        command.env_clear().envs(environment(verb, who, &self.bin.to_string_lossy()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = self.at.run(move || tokio::process::Command::from(command).kill_on_drop(true).spawn()).await;
        let mut child = started.map_err(|e| failed(5, e.to_string()))?.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => failed(5, format!("not found in {}", self.bin.display())),
            _ => failed(5, e.to_string()),
        })?;
        let input = stdin.to_string();
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut to), Some(from), Some(err)) = pipes else { return Err(failed(5, "no pipes".into())) };
        let (mut said, mut complained) = (String::new(), String::new());
        let talk = async {
            let write = async move {
                // A plugin need not read all of it.
                let _ = to.write_all(input.as_bytes()).await;
            };
            let (mut from, mut err) = (from.take(MAX_OUTPUT), err.take(MAX_OUTPUT));
            let (_, out, err) =
                tokio::join!(write, from.read_to_string(&mut said), err.read_to_string(&mut complained));
            out.and(err)?;
            child.wait().await
        };
        let status = match tokio::time::timeout(self.timeout, talk).await {
            Err(_) => return Err(failed(11, format!("no answer in {:?}", self.timeout))),
            Ok(Err(e)) => return Err(failed(5, e.to_string())),
            Ok(Ok(status)) => status,
        };
        if status.success() {
            return Ok(said);
        }
        Err(match serde_json::from_str::<Said>(&said) {
            Ok(said) => {
                CniError { code: said.code, message: said.msg, details: said.details, ..failed(0, String::new()) }
            }
            Err(_) => failed(0, format!("{status}: {}{}", said.trim(), complained.trim())),
        })
    }
}

/// The specification's error object.
#[derive(Deserialize)]
struct Said {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

fn load(dir: &Path) -> Result<ConfList, ConfError> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let is_conf =
        |p: &PathBuf| p.extension().and_then(|e| e.to_str()).is_some_and(|e| ["conf", "conflist", "json"].contains(&e));
    let file = entries.filter(is_conf).min().ok_or_else(|| ConfError::None(dir.display().to_string()))?;
    let name = file.display().to_string();
    let text = fs::read_to_string(&file).map_err(|e| ConfError::Bad { file: name.clone(), cause: e.to_string() })?;
    ConfList::parse(&name, &text)
}
