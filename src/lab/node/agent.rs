//! The agent process of one node: started in the node's namespace and cgroup,
//! killed and restarted on request, dead when the lab is.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::cgroup::Cgroup;
use crate::lab::vpc::ns::NsThread;
use crate::sys::lab_exec;

const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What to run.
#[derive(Clone, Debug)]
pub struct AgentSpec {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Start it again this long after it ended by itself or was killed.
    pub restart_after: Option<Duration>,
}

impl AgentSpec {
    /// This program as an agent: `/proc/self/exe agent --config <config>`.
    pub fn this_program(config: &Path) -> Self {
        Self {
            program: "/proc/self/exe".into(),
            args: vec!["agent".into(), "--config".into(), config.display().to_string()],
            env: Vec::new(),
            restart_after: None,
        }
    }
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub pid: u32,
    pub status: String,
}

/// Ends of the agent process since it was first started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    pub count: u32,
    pub last: Option<Exit>,
}

enum Order {
    Signal(Signal, oneshot::Sender<Exit>),
    Stop(oneshot::Sender<()>),
}

/// A supervised agent process.
pub struct Agent {
    commands: mpsc::Sender<Order>,
    pid: watch::Receiver<Option<u32>>,
    exits: watch::Receiver<Exits>,
    keeper: JoinHandle<()>,
}

impl Agent {
    pub(super) async fn start(spec: AgentSpec, at: &NsThread, cgroup: &Cgroup, log: &Path) -> io::Result<Self> {
        let launch = Launch { spec, at: at.clone(), procs: cgroup.path().join("cgroup.procs"), log: log.to_owned() };
        let child = launch.spawn().await?;
        let (commands, inbox) = mpsc::channel(4);
        let (pid_out, pid) = watch::channel(child.id());
        let (exits_out, exits) = watch::channel(Exits::default());
        let keeper = tokio::spawn(keep(launch, child, inbox, pid_out, exits_out));
        Ok(Self { commands, pid, exits, keeper })
    }

    pub fn pid(&self) -> Option<u32> {
        *self.pid.borrow()
    }

    pub fn exits(&self) -> watch::Receiver<Exits> {
        self.exits.clone()
    }

    /// Send a signal that ends it; answers when it has ended.
    pub async fn signal(&self, signal: Signal) -> Option<Exit> {
        let (tell, done) = oneshot::channel();
        self.commands.send(Order::Signal(signal, tell)).await.ok()?;
        done.await.ok()
    }

    /// SIGTERM, then SIGKILL; returns when it is dead.
    pub async fn stop(self) {
        let (tell, done) = oneshot::channel();
        if self.commands.send(Order::Stop(tell)).await.is_ok() {
            let _ = done.await;
        }
        self.keeper.abort();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The child was started with kill_on_drop.
        self.keeper.abort();
    }
}

struct Launch {
    spec: AgentSpec,
    at: NsThread,
    procs: PathBuf,
    log: PathBuf,
}

impl Launch {
    async fn spawn(&self) -> io::Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let procs = fs::OpenOptions::new().write(true).open(&self.procs)?;
        let mut command = Command::new(&self.spec.program);
        command.args(&self.spec.args).envs(self.spec.env.iter().cloned());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A terminal's Ctrl-C is for the lab, which then stops agents in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let started = self.at.run(move || {
            lab_exec::bind_to_parent(&mut command, Some(procs));
            let mut command = tokio::process::Command::from(command);
            command.kill_on_drop(true).spawn()
        });
        started.await.map_err(io::Error::other)?
    }
}

async fn keep(
    launch: Launch,
    mut child: Child,
    mut inbox: mpsc::Receiver<Order>,
    pid: watch::Sender<Option<u32>>,
    exits: watch::Sender<Exits>,
) {
    loop {
        let id = child.id().unwrap_or_default();
        let mut waiting = Vec::new();
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                command = inbox.recv() => match command {
                    Some(Order::Signal(signal, tell)) => {
                        send(id, signal);
                        waiting.push(tell);
                    }
                    Some(Order::Stop(tell)) => {
                        send(id, Signal::SIGTERM);
                        if tokio::time::timeout(STOP_WITHIN, child.wait()).await.is_err() {
                            let _ = child.kill().await;
                        }
                        pid.send_replace(None);
                        let _ = tell.send(());
                        return;
                    }
                    None => return,
                },
            }
        };
        let exit = Exit { pid: id, status: describe(status) };
        pid.send_replace(None);
        exits.send_modify(|e| {
            e.count += 1;
            e.last = Some(exit.clone());
        });
        for tell in waiting {
            let _ = tell.send(exit.clone());
        }
        let Some(delay) = launch.spec.restart_after else {
            // Nothing runs: answer until told to stop.
            while let Some(command) = inbox.recv().await {
                match command {
                    Order::Signal(_, tell) => drop(tell.send(exit.clone())),
                    Order::Stop(tell) => {
                        let _ = tell.send(());
                        return;
                    }
                }
            }
            return;
        };
        let restart = tokio::time::sleep(delay);
        tokio::pin!(restart);
        loop {
            tokio::select! {
                () = &mut restart => break,
                command = inbox.recv() => match command {
                    Some(Order::Signal(_, tell)) => drop(tell.send(exit.clone())),
                    Some(Order::Stop(tell)) => {
                        let _ = tell.send(());
                        return;
                    }
                    None => return,
                },
            }
        }
        match launch.spawn().await {
            Ok(next) => child = next,
            Err(e) => {
                tracing::warn!(target: "lab", "agent cannot be started again: {e}");
                return;
            }
        }
        pid.send_replace(child.id());
    }
}

fn send(pid: u32, signal: Signal) {
    // The child has not been waited for yet, so its id cannot be another's.
    if let Ok(pid) = i32::try_from(pid)
        && pid > 0
    {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(e) => format!("lost: {e}"),
    }
}
