//! How other processes speak with a lab that is up: a Unix socket in its folder.
//!
//! One question per connection, as a line of JSON; answered by lines of JSON,
//! the last of which is the outcome. Work ends when the asker goes away.
//!
//! Owner: the process that runs the lab. Invariant: the socket is there only
//! while the lab is up, so that a connection that is taken means "ready".

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::report::{Report, gather};
use super::run::{self, Job, Say};
use super::site::Site;

/// Manifests may be large; more than this is no question.
const MOST_BYTES: u64 = 256 << 20;
/// A question must arrive within this time.
const ASK_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// How to reach what is in it, for a person.
    About,
    /// What a report shows, gathered now.
    Report,
    Run(Job),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    Step(String),
    About(String),
    Report(Box<Report>),
    Failed(String),
}

fn socket(state: &Path) -> PathBuf {
    state.join("lab.sock")
}

/// The lab's side.
pub struct Control {
    listener: UnixListener,
}

impl Control {
    pub fn open(state: &Path) -> io::Result<Self> {
        let path = socket(state);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener })
    }

    /// Answer whoever asks, for ever; what is being answered ends with this.
    pub async fn serve(&self, site: &Site) {
        let mut open = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => open.push(converse(stream, site)),
                    Err(e) => {
                        tracing::warn!(target: "lab", "accepting a question: {e}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(()) = open.next() => {}
            }
        }
    }
}

async fn converse(stream: UnixStream, site: &Site) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read.take(MOST_BYTES));
    let mut line = String::new();
    match tokio::time::timeout(ASK_WITHIN, read.read_line(&mut line)).await {
        Ok(Ok(n)) if n > 0 => {}
        _ => return,
    }
    let (tell, mut told) = mpsc::unbounded_channel::<Answer>();
    let work = async move {
        let say = |step: &str| drop(tell.send(Answer::Step(step.to_owned())));
        let outcome = match serde_json::from_str(&line) {
            Ok(ask) => answer(ask, site, &say).await.unwrap_or_else(|e| Answer::Failed(format!("{e:#}"))),
            Err(e) => Answer::Failed(format!("not a question to a lab: {e}; is it of another version?")),
        };
        let _ = tell.send(outcome);
    };
    let speak = async {
        while let Some(answer) = told.recv().await {
            let Ok(mut line) = serde_json::to_vec(&answer) else { return };
            line.push(b'\n');
            if write.write_all(&line).await.is_err() {
                return;
            }
        }
    };
    let mut rest = [0; 1];
    tokio::select! {
        _ = async { tokio::join!(work, speak) } => {}
        // Nothing more is said by the asker: it has gone away.
        _ = read.read(&mut rest) => {}
    }
}

async fn answer(ask: Ask, site: &Site, say: Say<'_>) -> anyhow::Result<Answer> {
    Ok(match ask {
        Ask::About => Answer::About(about(site)),
        Ask::Report => Answer::Report(Box::new(gather(site, 0).await?)),
        Ask::Run(job) => Answer::Report(Box::new(run::run(site, &job, say).await?)),
    })
}

/// How to look into a lab.
pub fn about(site: &Site) -> String {
    let state = site.id().state_dir();
    let mut lines = vec![format!("kubectl --kubeconfig {} get nodes", state.join("kubeconfig").display())];
    lines.extend(site.nodes.iter().map(|n| format!("fairway status --endpoint {}", n.debug_socket().display())));
    lines.extend(site.admin.map(|admin| format!("curl http://{admin}/lab/state")));
    lines.join("\n")
}

/// Whether the lab with this folder is up.
pub async fn is_up(state: &Path) -> bool {
    UnixStream::connect(socket(state)).await.is_ok()
}

/// Ask a lab that is up; `say` hears the steps.
pub async fn ask(state: &Path, ask: &Ask, say: Say<'_>) -> anyhow::Result<Answer> {
    let path = socket(state);
    let stream = UnixStream::connect(&path).await.with_context(|| path.display().to_string())?;
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_vec(ask)?;
    line.push(b'\n');
    write.write_all(&line).await?;
    let mut answers = BufReader::new(read).lines();
    while let Some(line) = answers.next_line().await? {
        match serde_json::from_str(&line).context("the lab's answer; is it of another version?")? {
            Answer::Step(step) => say(&step),
            Answer::Failed(why) => bail!("{why}"),
            outcome => return Ok(outcome),
        }
    }
    bail!("the lab ended meanwhile")
}
