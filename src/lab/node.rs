//! A node: a namespace with an agent process of its own.
//!
//! Purpose: everything a machine gives an agent, on one machine: the primary
//! ENI configured as an operating system would, sysfs as seen from inside the
//! namespace, a bpf file system, a cgroup, a state folder, and kubelet's two
//! CNI folders. Owner of: all of these and the agent process.
//!
//! Invariants: the agent dies with the lab, however the lab dies; what a node
//! makes is found again by its name ([`down::sweep`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::lab::vpc::link::{LinkError, Links};
use crate::lab::vpc::name::{LabId, make_dir};
use crate::lab::vpc::ns::{Netns, NsError, NsThread, OwnedNetns};
use crate::lab::vpc::os::{self, Boot};

/// The agent process.
pub mod agent;
/// One cgroup (version 2) per node.
pub mod cgroup;
/// Finds and removes what a lab left, also after a crash.
pub mod down;

use agent::{Agent, AgentSpec};
use cgroup::Cgroup;

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Ns(#[from] NsError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("node {node}: {what}: {cause}")]
    Io { node: String, what: String, cause: io::Error },
    #[error("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")]
    NoCgroup,
}

/// Where a node keeps what; all below the lab's state folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeDirs {
    pub root: PathBuf,
    /// sysfs of the node's namespace.
    pub sys: PathBuf,
    /// bpf file system.
    pub bpf: PathBuf,
    /// The agent's ledger and sockets.
    pub state: PathBuf,
    /// Network configurations, as /etc/cni/net.d.
    pub net_d: PathBuf,
    /// Plugins, as /opt/cni/bin.
    pub cni_bin: PathBuf,
    /// One file per pod sandbox, naming its namespace.
    pub sandboxes: PathBuf,
    pub agent_log: PathBuf,
    pub agent_config: PathBuf,
}

impl NodeDirs {
    pub fn of(id: &LabId, node: &str) -> Self {
        let root = id.state_dir().join(node);
        Self {
            sys: root.join("sys"),
            bpf: root.join("bpf"),
            state: root.join("state"),
            net_d: root.join("cni/net.d"),
            cni_bin: root.join("cni/bin"),
            sandboxes: root.join("sandboxes"),
            agent_log: root.join("agent.log"),
            agent_config: root.join("agent.yaml"),
            root,
        }
    }
}

/// A node that is up. Dropping it removes its namespace and mounts and kills
/// its agent; [`Node::down`] also waits and reports.
pub struct Node {
    name: String,
    agent: tokio::sync::Mutex<Option<Agent>>,
    spawner: NsThread,
    dirs: NodeDirs,
    cgroup: Cgroup,
    ns: OwnedNetns,
}

impl Node {
    /// Make the node's namespace, folders, mounts and cgroup. Register
    /// [`Self::ns`] with the VPC, attach the primary ENI, then [`Self::boot`].
    pub async fn create(id: &LabId, name: &str) -> Result<Self, NodeError> {
        let cgroup = Cgroup::create(&id.name(name)).map_err(|e| match e {
            cgroup::CgroupError::NotMounted => NodeError::NoCgroup,
            cgroup::CgroupError::Io { path, cause } => {
                NodeError::Io { node: name.to_owned(), what: path.display().to_string(), cause }
            }
        })?;
        let ns = OwnedNetns::create(&id.name(name))?;
        let dirs = NodeDirs::of(id, name);
        let node = Self {
            name: name.to_owned(),
            agent: tokio::sync::Mutex::default(),
            spawner: NsThread::start(&ns)?,
            dirs,
            cgroup,
            ns,
        };
        node.prepare().await?;
        Ok(node)
    }

    async fn prepare(&self) -> Result<(), NodeError> {
        let dirs = &self.dirs;
        for dir in [&dirs.sys, &dirs.bpf, &dirs.state, &dirs.net_d, &dirs.cni_bin, &dirs.sandboxes] {
            make_dir(dir).map_err(self.io(dir))?;
        }
        let sys = dirs.sys.clone();
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // The namespace of the mounting thread decides whose devices it shows.
        let mounted = self.spawner.run(move || mount(Some("sysfs"), &sys, Some("sysfs"), flags, None::<&str>)).await?;
        mounted.map_err(|e| self.io(&dirs.sys)(e.into()))?;
        mount(Some("bpf"), &dirs.bpf, Some("bpf"), flags, Some("mode=0700"))
            .map_err(|e| self.io(&dirs.bpf)(e.into()))?;
        os::loopback(&Links::open(&self.ns).await?).await?;
        Ok(())
    }

    /// What an operating system does with the primary ENI once it is attached;
    /// returns the device's name.
    pub async fn boot(&self, boot: &Boot) -> Result<String, NodeError> {
        Ok(os::boot(&self.ns, boot).await?)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn ns(&self) -> &Netns {
        &self.ns
    }

    pub fn dirs(&self) -> &NodeDirs {
        &self.dirs
    }

    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The thread that starts children in the node's namespace.
    pub fn spawner(&self) -> &NsThread {
        &self.spawner
    }

    /// Put a program into the node's plugin folder, by link: the state folder
    /// may be mounted noexec.
    pub fn install_plugin(&self, name: &str, program: &Path) -> Result<(), NodeError> {
        let at = self.dirs.cni_bin.join(name);
        let fresh = self.dirs.cni_bin.join(format!(".{name}.new"));
        let _ = fs::remove_file(&fresh);
        std::os::unix::fs::symlink(program, &fresh).map_err(self.io(&fresh))?;
        fs::rename(&fresh, &at).map_err(self.io(&at))
    }

    /// Start the agent, in place of one that runs.
    pub async fn start_agent(&self, spec: AgentSpec) -> Result<u32, NodeError> {
        let mut slot = self.agent.lock().await;
        if let Some(old) = slot.take() {
            old.stop().await;
        }
        let agent = Agent::start(spec, &self.spawner, &self.cgroup, &self.dirs.agent_log)
            .await
            .map_err(self.io(&self.dirs.agent_log))?;
        let pid = agent.pid().unwrap_or_default();
        *slot = Some(agent);
        Ok(pid)
    }

    /// The agent's process id, while it runs.
    pub async fn agent_pid(&self) -> Option<u32> {
        self.agent.lock().await.as_ref().and_then(Agent::pid)
    }

    /// kill -9 the agent; returns when it is dead. With a restart delay in its
    /// spec it comes back by itself.
    pub async fn kill_agent(&self) -> Option<agent::Exit> {
        let slot = self.agent.lock().await;
        let agent = slot.as_ref()?;
        agent.signal(nix::sys::signal::Signal::SIGKILL).await
    }

    /// How often the agent process has ended, with the last outcome.
    pub async fn agent_exits(&self) -> Option<tokio::sync::watch::Receiver<agent::Exits>> {
        self.agent.lock().await.as_ref().map(Agent::exits)
    }

    /// Stop the agent in good order (SIGTERM, then SIGKILL after five seconds).
    pub async fn stop_agent(&self) {
        if let Some(agent) = self.agent.lock().await.take() {
            agent.stop().await;
        }
    }

    /// Stop the agent and remove the node. Tell the VPC to forget the instance
    /// first, or its ENIs die with the namespace and are looked for.
    pub async fn down(self) -> Result<(), NodeError> {
        self.stop_agent().await;
        let root = self.dirs.root.clone();
        let name = self.name.clone();
        self.unmount()?;
        let cgroup = self.cgroup.path().to_owned();
        drop(self);
        let removed = tokio::task::spawn_blocking(move || {
            cgroup::remove(&cgroup)?;
            fs::remove_dir_all(&root)
        });
        match removed.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(cause)) => Err(NodeError::Io { node: name, what: "remove".into(), cause }),
            Err(e) => Err(NodeError::Io { node: name, what: "remove".into(), cause: io::Error::other(e) }),
        }
    }

    fn unmount(&self) -> Result<(), NodeError> {
        for dir in [&self.dirs.sys, &self.dirs.bpf] {
            match umount2(dir, MntFlags::MNT_DETACH) {
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(e) => return Err(self.io(dir)(e.into())),
            }
        }
        Ok(())
    }

    fn io(&self, at: &Path) -> impl FnOnce(io::Error) -> NodeError {
        let (node, what) = (self.name.clone(), at.display().to_string());
        move |cause| NodeError::Io { node, what, cause }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}
