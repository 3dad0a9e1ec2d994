//! `fairway lab …`: arguments and the commands behind them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::alone::{self, CloudArgs, KubeApiArgs};
use super::background;
use super::control::{self, Answer, Ask, Control};
use super::demo::{self, Progress};
use super::node::down::{self, Life};
use super::report::{self, Report};
use super::run::{self, Job};
use super::site::{Site, SiteConfig};
use super::vpc::name::LabId;
use crate::status::columns;

/// The lab that commands mean when none is named.
const DEFAULT: &str = "lab";

#[derive(clap::Args)]
#[command(after_help = "Examples:
  fairway lab demo
  fairway lab run deployment.yaml --nodes 3     in a lab of its own, which goes afterwards
  fairway lab up --nodes 3                      returns when the lab is ready
  fairway lab run deployment.yaml               in the lab that is up, where it stays
  kubectl --kubeconfig /run/fairway-lab/lab/kubeconfig get pods -o wide
  fairway lab status
  fairway lab down")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Shape {
    /// How many nodes to make [default: 2]
    #[arg(long)]
    nodes: Option<usize>,
    /// An instance type of the simulated cloud [default: ecs.g7.2xlarge]
    #[arg(long)]
    instance_type: Option<String>,
    /// 1 is as slow as the real cloud, 0 does not wait at all [default: 0.2]
    #[arg(long)]
    latency_scale: Option<f64>,
    /// IPv4 and IPv6.
    #[arg(long)]
    dual: bool,
    /// Use this API server in place of the lab's own stand-in: its controllers and scheduler are then in
    /// force, not the lab's. Nodes n1, n2, … are registered with it and removed in the end.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a lab up; it goes on in the background until `down`.
    #[command(after_help = "Examples:
  fairway lab up --nodes 3 --dual
  fairway lab up --foreground                   until Ctrl-C
  fairway lab up --kubeconfig ~/.kube/config    with a real API server")]
    Up {
        /// The lab's name: several run side by side.
        #[arg(long, default_value = DEFAULT)]
        id: LabId,
        #[command(flatten)]
        shape: Shape,
        /// Hold the terminal, and end with Ctrl-C.
        #[arg(long)]
        foreground: bool,
        #[arg(long = background::FLAG, hide = true, conflicts_with = "foreground")]
        background: bool,
    },
    /// Run Kubernetes manifests and report: in the lab that is up, else in one of their own.
    #[command(after_help = "Examples:
  fairway lab run web.yaml db.yaml --nodes 3
  fairway lab run web.yaml --json | jq .failures
  fairway lab run web.yaml --id other           in the lab `other` if it is up, else in one of that name

In a lab that is up the objects stay, as with kubectl apply. Exit code 1: a pod did not become ready or did not answer.")]
    Run {
        /// The lab to use [default: the one that `up` makes without --id, if it is up]
        #[arg(long)]
        id: Option<LabId>,
        #[command(flatten)]
        shape: Shape,
        /// Manifests as written for a real cluster.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[arg(long)]
        json: bool,
        /// How many seconds pods may take to become ready.
        #[arg(long, default_value_t = 120)]
        patience: u64,
    },
    /// What labs there are; with --id what is in one.
    Status {
        #[arg(long)]
        id: Option<LabId>,
        /// The lab's report as JSON.
        #[arg(long, requires = "id")]
        json: bool,
    },
    /// Remove everything of a lab, also of one that crashed.
    #[command(after_help = "Examples:
  fairway lab down
  fairway lab down --id other
  fairway lab down --dead                       only what labs left whose process has died")]
    Down {
        #[arg(long, default_value = DEFAULT)]
        id: LabId,
        /// Every lab of this machine.
        #[arg(long, conflicts_with = "id")]
        all: bool,
        /// Every lab whose process has died.
        #[arg(long, conflicts_with_all = ["id", "all"])]
        dead: bool,
    },
    /// Two nodes, pods on both, a killed agent, and what it changed.
    Demo {
        #[arg(long, default_value = "demo")]
        id: LabId,
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        #[arg(long, default_value_t = 0.2)]
        latency_scale: f64,
        #[arg(long)]
        json: bool,
    },
    /// The simulated cloud alone: API, metadata service and VPC, for agents that somebody else runs.
    #[command(after_help = "Example, an agent by hand in a network namespace:
  ip netns add n1
  fairway lab kube-api --kubeconfig /tmp/kube &
  fairway lab cloud --node n1 --kubeconfig /tmp/kube &
  ip netns exec n1 fairway agent --config agent.yaml    with the addresses that `lab cloud` prints

More nodes: curl -d '{\"instance_id\": \"i-n2\", \"instance_type\": \"ecs.g7.2xlarge\", \"vswitch\": \"vsw-lab-a\",
\"netns\": \"n2\"}' http://ADMIN/lab/instances")]
    Cloud(CloudArgs),
    /// The Kubernetes API stand-in alone, with its controllers and scheduler.
    KubeApi(KubeApiArgs),
}

/// SIGINT, SIGTERM or SIGHUP, none of which is lost between two waits.
pub struct Interrupt([Signal; 3]);

impl Interrupt {
    pub fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("waiting for signals");
        Ok(Self([listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?]))
    }

    pub async fn wait(&mut self) {
        let [int, term, hup] = &mut self.0;
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
    }
}

/// SIGINT or SIGTERM.
pub async fn interrupted() {
    match Interrupt::listen() {
        Ok(mut interrupt) => interrupt.wait().await,
        Err(_) => std::future::pending().await,
    }
}

pub async fn run(args: Args) -> anyhow::Result<bool> {
    crate::telemetry::init(&crate::telemetry::Config {
        filter: "warn,netlink_proto=error".to_owned(),
        ..Default::default()
    });
    if !matches!(args.command, Command::KubeApi(_)) && !nix::unistd::geteuid().is_root() {
        bail!("the lab makes network namespaces and devices: run it as root (sudo)");
    }
    match args.command {
        Command::Up { id, shape, foreground, background } => match (foreground, background) {
            (false, false) => {
                notice_dead(&id, &Progress::start());
                background::up(&id, Interrupt::listen()?).await
            }
            _ => stay(id, &shape, background).await,
        },
        Command::Run { id, shape, files, json, patience } => {
            let job = Job::read(&files, Duration::from_secs(patience))?;
            let report = match lab_for(id.as_ref(), &shape).await? {
                Place::Up(id) => in_lab(&id, job).await?,
                Place::Own(id) => in_own_lab(id, &shape, &job).await?,
            };
            Ok(report.is_some_and(|report| show(&report, json)))
        }
        Command::Status { id, json } => match id {
            None => status().await,
            Some(id) => {
                let state = running(&id).await?;
                let answer = control::ask(&state, &Ask::Report, &|_| ()).await?;
                Ok(matches!(answer, Answer::Report(report) if show(&report, json)))
            }
        },
        Command::Down { id, all, dead } => {
            let ids = match (all, dead) {
                (true, _) => down::labs(),
                (_, true) => down::dead(),
                _ => vec![id],
            };
            if ids.is_empty() {
                println!("nothing to remove");
            }
            take_down(ids).await
        }
        Command::Demo { id, nodes, latency_scale, json } => demo::run(id, nodes, latency_scale, json).await,
        Command::Cloud(args) => alone::cloud(args).await,
        Command::KubeApi(args) => alone::kube_api(args, interrupted()).await,
    }
}

async fn take_down(ids: Vec<LabId>) -> anyhow::Result<bool> {
    for id in ids {
        // A lab that runs does this itself.
        if down::life(&id) == Life::Dead {
            super::cluster::forget_left_behind(&id.state_dir()).await;
        }
        let this = id.clone();
        let swept = tokio::task::spawn_blocking(move || down::sweep(&this)).await?;
        let swept = swept.with_context(|| format!("lab {id}"))?;
        if swept.is_empty() {
            println!("lab {id}: nothing to remove");
        } else if swept.only_ended() {
            println!("lab {id}: taken down");
        } else {
            println!("lab {id}: removed {swept}");
        }
    }
    Ok(true)
}

/// Say which labs have died and left something, and what to do about it.
pub fn notice_dead(own: &LabId, progress: &Progress) {
    let dead: Vec<String> = down::dead().iter().filter(|id| *id != own).map(ToString::to_string).collect();
    if !dead.is_empty() {
        let names = dead.join(", ");
        progress.say(&format!(
            "not taken down, though dead: lab {names}; `fairway lab down --dead` removes what is left of it"
        ));
    }
}

fn site_config(id: LabId, shape: &Shape) -> anyhow::Result<SiteConfig> {
    let instance_type = shape.instance_type.as_deref().unwrap_or("ecs.g7.2xlarge");
    let mut config = SiteConfig::new(id, shape.nodes.unwrap_or(2), instance_type)?;
    config.cloud.latency_scale = shape.latency_scale.unwrap_or(0.2);
    config.dual = shape.dual;
    config.kubeconfig = match &shape.kubeconfig {
        Some(path) => Some(std::path::absolute(path)?),
        None => None,
    };
    Ok(config)
}

/// Bring a lab up and run it until told to end.
async fn stay(id: LabId, shape: &Shape, background: bool) -> anyhow::Result<bool> {
    let progress = Progress::start();
    let config = site_config(id, shape)?;
    if background {
        background::let_go()?;
    } else {
        notice_dead(&config.id, &progress);
    }
    let mut interrupt = Interrupt::listen()?;
    let Some(site) = Site::up_unless(interrupt.wait(), config, &|step| progress.say(step)).await? else {
        progress.say("interrupted; nothing is left behind");
        return Ok(false);
    };
    progress.say("the lab is up");
    let ended = match Control::open(&site.id().state_dir()) {
        Ok(control) => {
            if !background {
                println!("{}\nCtrl-C takes it down.", control::about(&site));
            }
            tokio::select! {
                () = control.serve(&site) => {}
                () = interrupt.wait() => {}
            }
            Ok(true)
        }
        Err(e) => Err(e).context("the lab's socket"),
    };
    progress.say("taking everything down");
    site.down().await?;
    ended
}

/// Where manifests are run.
enum Place {
    /// In a lab that is up.
    Up(LabId),
    /// In one made for them.
    Own(LabId),
}

async fn lab_for(id: Option<&LabId>, shape: &Shape) -> anyhow::Result<Place> {
    let wanted = match id {
        Some(id) => id.clone(),
        None => DEFAULT.parse()?,
    };
    match down::life(&wanted) {
        Life::Running(_) => {
            running(&wanted).await?;
            let Shape { nodes, instance_type, latency_scale, dual, kubeconfig } = shape;
            let given = nodes.is_some() || instance_type.is_some() || latency_scale.is_some();
            if given || *dual || kubeconfig.is_some() {
                bail!(
                    "lab {wanted} is up and has its nodes already; leave out what describes a lab, name another with --id, or take it down first: fairway lab down --id {wanted}"
                );
            }
            Ok(Place::Up(wanted))
        }
        _ => Ok(Place::Own(match id {
            Some(id) => id.clone(),
            None => format!("run{}", std::process::id()).parse()?,
        })),
    }
}

/// The folder of a lab that is up, or what to do when it is not.
async fn running(id: &LabId) -> anyhow::Result<PathBuf> {
    let state = id.state_dir();
    match down::life(id) {
        Life::Running(_) if control::is_up(&state).await => Ok(state),
        Life::Running(pid) => bail!(
            "lab {id} (process {pid}) takes no questions: it is coming up, going down, or a demo; try again, or look into {}",
            state.join(down::LOG_FILE).display()
        ),
        Life::Dead => bail!("lab {id} has died; `fairway lab down --id {id}` removes what is left of it"),
        Life::Unclaimed => bail!("there is no lab {id}; `fairway lab up --id {id}` makes one"),
    }
}

async fn in_lab(id: &LabId, job: Job) -> anyhow::Result<Option<Report>> {
    let progress = Progress::start();
    progress.say(&format!("using lab {id}, which is up"));
    let (state, ask, say) = (id.state_dir(), Ask::Run(job), |step: &str| progress.say(step));
    let mut interrupt = Interrupt::listen()?;
    tokio::select! {
        answer = control::ask(&state, &ask, &say) => match answer? {
            Answer::Report(report) => Ok(Some(*report)),
            other => bail!("unexpected answer: {other:?}"),
        },
        () = interrupt.wait() => Ok(None),
    }
}

async fn in_own_lab(id: LabId, shape: &Shape, job: &Job) -> anyhow::Result<Option<Report>> {
    let progress = Progress::start();
    let config = site_config(id, shape)?;
    notice_dead(&config.id, &progress);
    let mut interrupt = Interrupt::listen()?;
    let say = |step: &str| progress.say(step);
    let Some(site) = Site::up_unless(interrupt.wait(), config, &say).await? else {
        progress.say("interrupted; nothing is left behind");
        return Ok(None);
    };
    let outcome = tokio::select! {
        outcome = run::run(&site, job, &say) => outcome.map(Some),
        () = interrupt.wait() => Ok(None),
    };
    progress.say("taking everything down");
    site.down().await?;
    outcome
}

/// Print a report; true when it is a good one.
fn show(report: &Report, json: bool) -> bool {
    match json.then(|| serde_json::to_string_pretty(report)) {
        Some(Ok(text)) => println!("{text}"),
        _ => println!("\n{}", report::text(report)),
    }
    report.ok()
}

/// Every lab of this machine in one line.
async fn status() -> anyhow::Result<bool> {
    let mut lines = vec![["LAB", "STATE", "PROCESS", "FOLDER"].map(str::to_owned).to_vec()];
    for id in down::labs() {
        let state = id.state_dir();
        let (word, pid) = match down::life(&id) {
            Life::Running(pid) if control::is_up(&state).await => ("up", pid.to_string()),
            Life::Running(pid) => ("busy", pid.to_string()),
            Life::Dead => ("dead: fairway lab down --dead", "-".to_owned()),
            Life::Unclaimed => ("parts of a lab", "-".to_owned()),
        };
        lines.push(vec![id.to_string(), word.to_owned(), pid, state.display().to_string()]);
    }
    match lines.len() {
        1 => println!("no lab; `fairway lab up` makes one"),
        _ => print!("{}", columns(&lines)),
    }
    Ok(true)
}
