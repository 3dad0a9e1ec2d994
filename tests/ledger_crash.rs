//! The ledger on disk keeps its promises: what was acknowledged survives a
//! kill -9, a damaged one is set aside and never believed, another instance's is
//! refused, a full disk is an error that loses nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/skip.rs"]
mod skipping;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fairway::cloud::InstanceLimits;
use fairway::model::*;
use fairway::pool::die;
use fairway::pool::ledger::{Ledger, LedgerError, SledStore};
use fairway::pool::state::{Meta, State, Time};
use fairway::pool::step::{FailPoint, Step};
use proptest::prelude::*;
use skipping::skip as skipped;

fn instance() -> InstanceId {
    "i-self".into()
}

fn blank() -> State {
    State::new(Meta {
        instance: instance(),
        cluster: "c1".to_owned(),
        nonce: "0badcafe".to_owned(),
        next: 1,
        limits: InstanceLimits {
            type_name: "t".to_owned(),
            enis: 8,
            ipv4_per_eni: 30,
            ipv6_per_eni: 30,
            queues_per_secondary_eni: 2,
        },
        ip_stack: IpStack::Ipv4,
        foreign: 0,
    })
}

fn address(n: u64) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, (n % 30) as u8 + 1)
}

/// The state after `n` steps of an endless, deterministic history: an ENI comes
/// up, then its addresses are leased and released in turn.
fn history(n: u64) -> State {
    let mut state = blank();
    for step in 0..n {
        advance(&mut state, step);
    }
    state
}

fn advance(state: &mut State, n: u64) {
    let key = fairway::pool::state::EniKey(1);
    let eni = EniRef {
        id: "eni-1".into(),
        mac: Mac([0, 0x16, 0x3e, 0, 0, 1]),
        vswitch: "vsw-a".into(),
        primary4: address(0),
        subnet: Subnet {
            cidr4: "10.0.0.0/24".parse().unwrap(),
            gateway4: Ipv4Addr::new(10, 0, 0, 253),
            cidr6: None,
            gateway6: None,
        },
    };
    let purpose = fairway::pool::state::Purpose::Shared;
    let device = fairway::pool::state::Device { ifname: "eth1".to_owned(), rx_queues: 2, receive_cores: Vec::new() };
    let step = match n {
        0 => Step::CreateEni { key, purpose, vswitch: "vsw-a".into(), ipv4: 30, ipv6: 0 },
        1 => Step::EniCreated { key, eni: Box::new(eni), ipv4: (0..30).map(address).collect(), ipv6: vec![] },
        2 => Step::EniAttaching { key, accepted: true },
        3 => Step::EniReady { key, device },
        _ => {
            let v4 = address(n / 4);
            match n % 4 {
                0 => Step::Lease { lease: Box::new(lease(n, v4, eni)), reserve: None },
                1 => Step::Confirm { v4 },
                2 => Step::Release { v4, quarantine: Duration::ZERO },
                _ => Step::Settle { v4 },
            }
        }
    };
    state.apply(&step, Time(n)).unwrap();
}

fn lease(n: u64, v4: Ipv4Addr, eni: EniRef) -> Lease {
    Lease {
        attachment: AttachmentId { sandbox: format!("sandbox-{n}").into(), ifname: "eth0".to_owned() },
        pod: PodKey::new("default", format!("pod-{n}")),
        pod_uid: Some(format!("uid-{n}")),
        mode: AttachMode::Veth,
        eni,
        v4,
        v6: None,
        netns: PathBuf::from(format!("/var/run/netns/sandbox-{n}")),
        bandwidth: Bandwidth::default(),
        traffic: Default::default(),
    }
}

/// How far the history had come, to be found in its own length of time stamps.
fn position(state: &State, from: u64) -> Option<u64> {
    let mut candidate = history(from);
    for n in from..from + 64 {
        if candidate == *state {
            return Some(n);
        }
        advance(&mut candidate, n);
    }
    None
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const CHILD: &str = "FAIRWAY_TEST_LEDGER_WRITER";

/// Not a test of its own: the process that the others kill. It says each step
/// that is durable.
#[test]
fn writer_process() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let mut fail_point = FailPoint::from_env().unwrap();
    let (mut ledger, found, _) = SledStore::open_ledger(Path::new(&folder), &instance()).unwrap();
    let began = found.as_ref().map_or(0, |s| position(s, 0).or_else(|| far(s)).unwrap());
    let mut state = found.unwrap_or_else(blank);
    let mut out = std::io::stderr();
    for n in began.. {
        let names = [name_of(n)];
        if fail_point.before(&names) {
            die();
        }
        advance(&mut state, n);
        write(&mut ledger, &state, n);
        if fail_point.after(&names) {
            die();
        }
        writeln!(out, "durable {}", n + 1).unwrap();
    }
}

/// As the pool does it: what is about ENIs is flushed, what is about pods is
/// noted, and now and then that is flushed as well.
fn write(ledger: &mut Ledger, state: &State, n: u64) {
    match n {
        0..4 => ledger.commit(state).unwrap(),
        _ => ledger.note(state).unwrap(),
    }
    if n % 29 == 28 {
        ledger.settle().unwrap();
    }
}

fn name_of(n: u64) -> &'static str {
    match (n, n % 4) {
        (0, _) => "create-eni",
        (1, _) => "eni-created",
        (2, _) => "eni-attaching",
        (3, _) => "eni-ready",
        (_, 0) => "lease",
        (_, 1) => "confirm",
        (_, 2) => "release",
        _ => "settle",
    }
}

/// The newest time stamp in a state tells where in history it belongs.
fn far(state: &State) -> Option<u64> {
    let newest = state.addresses.values().filter_map(|a| match &a.state {
        fairway::pool::state::AddressState::Idle { since } => Some(since.0),
        fairway::pool::state::AddressState::Leased(held) => Some(held.since.0),
        fairway::pool::state::AddressState::Cooling { until } => Some(until.0),
        _ => None,
    });
    position(state, newest.max().unwrap_or(0).saturating_sub(2))
}

fn spawn(folder: &Path, fail_point: Option<&str>) -> Writer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "writer_process", "--nocapture", "--test-threads", "1"]);
    command.env(CHILD, folder).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(text) = fail_point {
        command.env(FailPoint::ENV, text);
    }
    Writer(command.spawn().unwrap())
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ledger");
    let mut acknowledged = 0u64;
    for round in 0..12u64 {
        let mut writer = spawn(&folder, None);
        let lines = BufReader::new(writer.0.stderr.take().unwrap()).lines();
        let goal = acknowledged + 20 + round * 7;
        // Read until far enough, kill, then drain what was still said.
        let mut killed = false;
        for line in lines {
            let Ok(line) = line else { break };
            if let Some(n) = line.strip_prefix("durable ").and_then(|n| n.parse().ok()) {
                acknowledged = n;
            }
            if acknowledged >= goal && !killed {
                writer.0.kill().unwrap();
                killed = true;
            }
        }
        let status = writer.0.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "round {round}: {status:?}");
        let (_, state, report) = SledStore::open_ledger(&folder, &instance()).unwrap();
        let state = state.unwrap();
        assert_eq!(report.damaged, None);
        let found = position(&state, acknowledged).unwrap_or_else(|| panic!("round {round}: {state:#?}"));
        assert!(found <= acknowledged + 1, "{found} after {acknowledged}");
    }
}

#[test]
fn a_fail_point_kills_exactly_there() {
    for (text, durable) in [("lease:before", 4), ("lease:after", 5), ("confirm:after:3", 14), ("eni-created:before", 1)]
    {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ledger");
        let mut writer = spawn(&folder, Some(text));
        let status = writer.0.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{text}");
        let (_, state, _) = SledStore::open_ledger(&folder, &instance()).unwrap();
        assert_eq!(state.unwrap(), history(durable), "{text}");
    }
}

#[test]
fn the_ledger_reads_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ledger");
    let state = history(123);
    let (mut ledger, found, report) = SledStore::open_ledger(&folder, &instance()).unwrap();
    assert!(found.is_none() && report.new);
    ledger.commit(&state).unwrap();
    drop(ledger);
    let (_, found, report) = SledStore::open_ledger(&folder, &instance()).unwrap();
    assert_eq!(found.unwrap(), state);
    assert!(!report.rebuilt());
}

/// A ledger with two flushed states and twenty noted ones behind the second.
fn noted(folder: &Path) -> Vec<State> {
    let (mut ledger, ..) = SledStore::open_ledger(folder, &instance()).unwrap();
    ledger.commit(&history(10)).unwrap();
    ledger.note(&history(11)).unwrap();
    ledger.commit(&history(12)).unwrap();
    let states: Vec<State> = (12..33).map(history).collect();
    states.iter().for_each(|state| ledger.note(state).unwrap());
    states
}

#[test]
fn a_tail_that_is_cut_or_damaged_anywhere_says_what_it_said_before_that_place() {
    let dir = tempfile::tempdir().unwrap();
    let sound = dir.path().join("sound");
    let states = noted(&sound);
    let tail = fs::read(sound.join("tail")).unwrap();
    let mut newest = 0;
    for round in 0..40 {
        let at = round * tail.len() / 40;
        let folder = dir.path().join(format!("ledger{round}"));
        copy(&sound, &folder);
        let mut bytes = tail.clone();
        match round % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1,
            // Never written back, as after a power cut.
            _ => bytes[at..].fill(0),
        }
        fs::write(folder.join("tail"), bytes).unwrap();
        let (mut ledger, found, report) = SledStore::open_ledger(&folder, &instance()).unwrap();
        assert_eq!(report.damaged, None);
        let came_to = states.iter().position(|state| Some(state) == found.as_ref());
        let came_to = came_to.unwrap_or_else(|| panic!("round {round}: {found:#?}"));
        assert!(came_to >= newest, "round {round}: {came_to} after {newest}");
        newest = came_to;
        // What is noted from here on does not meet what was cut off.
        ledger.note(&history(50)).unwrap();
        drop(ledger);
        let (_, found, _) = SledStore::open_ledger(&folder, &instance()).unwrap();
        assert_eq!(found.unwrap(), history(50), "round {round}");
    }
    assert!(newest > 15, "{newest}");
}

#[test]
fn a_tail_that_was_taken_in_is_never_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ledger");
    let states = noted(&folder);
    let old = fs::read(folder.join("tail")).unwrap();
    let (mut ledger, found, _) = SledStore::open_ledger(&folder, &instance()).unwrap();
    assert_eq!(found.as_ref(), states.last());
    ledger.commit(&history(40)).unwrap();
    drop(ledger);
    // A crash before the file was cut.
    fs::write(folder.join("tail"), old).unwrap();
    let (mut ledger, found, _) = SledStore::open_ledger(&folder, &instance()).unwrap();
    assert_eq!(found.unwrap(), history(40));
    ledger.note(&history(41)).unwrap();
    ledger.settle().unwrap();
    ledger.note(&history(42)).unwrap();
    drop(ledger);
    assert_eq!(SledStore::open_ledger(&folder, &instance()).unwrap().1.unwrap(), history(42));
}

#[test]
fn another_instances_ledger_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ledger");
    let (mut ledger, ..) = SledStore::open_ledger(&folder, &"i-other".into()).unwrap();
    ledger.commit(&history(20)).unwrap();
    drop(ledger);
    let Err(error) = SledStore::open_ledger(&folder, &instance()) else { panic!("it was accepted") };
    assert!(matches!(error, LedgerError::Foreign { .. }));
    assert!(error.to_string().contains("i-other") && error.to_string().contains("remove it"), "{error}");
    let (_, found, _) = SledStore::open_ledger(&folder, &"i-other".into()).unwrap();
    assert_eq!(found.unwrap(), history(20));
}

#[test]
fn a_second_agent_is_refused_while_the_first_has_it_open() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ledger");
    let _first = SledStore::open_ledger(&folder, &instance()).unwrap();
    let Err(error) = SledStore::open_ledger(&folder, &instance()) else { panic!("opened twice") };
    assert!(matches!(error, LedgerError::InUse(_)), "{error}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}

/// Files of the database, largest first.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        if meta.is_file() && meta.len() > 0 {
            found.push((meta.len(), entry.path()));
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, p)| p).collect()
}

#[test]
fn damage_is_noticed_or_harmless_and_never_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let sound = dir.path().join("sound");
    let (mut ledger, ..) = SledStore::open_ledger(&sound, &instance()).unwrap();
    let mut states = Vec::new();
    for n in 0..80 {
        let state = history(n);
        ledger.commit(&state).unwrap();
        states.push(state);
    }
    drop(ledger);

    let mut outcomes: BTreeMap<&str, u32> = BTreeMap::new();
    for round in 0..60u64 {
        let folder = dir.path().join(format!("ledger{round}"));
        copy(&sound, &folder);
        let files = files(&folder);
        let file = &files[(round % files.len() as u64) as usize];
        let length = fs::metadata(file).unwrap().len();
        // Spread the damage over what is written, cut some files short.
        let handle = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
        let at = (round * 7919) % length.max(1);
        match round % 5 {
            0 => handle.set_len(at).unwrap(),
            1 => handle.write_all_at(&[0xff; 64], at).unwrap(),
            _ => {
                let mut bytes = [0u8; 64];
                let n = handle.read_at(&mut bytes, at).unwrap();
                bytes.iter_mut().for_each(|b| *b ^= 0x5a);
                handle.write_all_at(&bytes[..n], at).unwrap();
            }
        }
        drop(handle);

        let began = Instant::now();
        let opened = SledStore::open_ledger(&folder, &instance());
        assert!(began.elapsed() < Duration::from_secs(20), "round {round} took {:?}", began.elapsed());
        let (mut ledger, state, report) = opened.unwrap_or_else(|e| panic!("round {round}: {e}"));
        match (&state, &report.damaged) {
            (Some(state), None) => {
                // An old truth may come back, an invented one never.
                assert!(states.contains(state), "round {round}: {state:#?}");
                *outcomes.entry("unharmed").or_default() += 1;
            }
            (None, Some(_)) => {
                assert!(report.rebuilt() && Path::new(report.moved_to.as_ref().unwrap()).is_dir());
                *outcomes.entry("set aside").or_default() += 1;
            }
            (None, None) => {
                assert!(report.rebuilt());
                *outcomes.entry("empty").or_default() += 1;
            }
            other => panic!("round {round}: {other:?}"),
        }
        // Whatever it was, the ledger works now.
        ledger.commit(&history(10)).unwrap();
        drop(ledger);
        assert_eq!(SledStore::open_ledger(&folder, &instance()).unwrap().1.unwrap(), history(10));
    }
    println!("{outcomes:?}");
    assert!(outcomes.contains_key("set aside") && outcomes.contains_key("unharmed"), "{outcomes:?}");
}

#[test]
fn a_record_that_breaks_an_invariant_condemns_the_ledger() {
    use fairway::pool::ledger::{decode, encode};
    let good = encode(&history(50)).unwrap();
    assert_eq!(decode(&good).unwrap(), history(50));
    let edits: [(&str, Option<&str>); 5] = [
        ("meta", None),
        ("eni/0000000001", None),
        ("address/10.0.0.1", Some("v9:{}")),
        ("address/10.0.0.1", Some("v1:{\"eni\":1")),
        ("surprise", Some("v1:{}")),
    ];
    for (key, value) in edits {
        let mut bad = good.clone();
        match value {
            Some(value) => bad.insert(key.to_owned(), value.as_bytes().to_vec()),
            None => bad.remove(key),
        };
        assert!(matches!(decode(&bad), Err(LedgerError::Corrupt(_))), "{key} {value:?}");
    }
}

/// Unmounts when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: &Path, bytes: u64) -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        fs::create_dir_all(path).unwrap();
        let options = format!("size={bytes}");
        let mounted = mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()));
        mounted.is_ok().then(|| Tmpfs(path.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_an_error_nothing_is_lost_and_it_mends_itself() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Tmpfs::mount(&dir.path().join("disk"), 4 << 20) else {
        return skipped("a_full_disk_is_an_error_nothing_is_lost_and_it_mends_itself", "root, to mount a tmpfs");
    };
    let folder = disk.0.join("ledger");
    let (mut ledger, ..) = SledStore::open_ledger(&folder, &instance()).unwrap();
    let mut state = blank();
    for n in 0..40 {
        advance(&mut state, n);
        ledger.commit(&state).unwrap();
    }
    // Somebody else fills the disk.
    let filler = disk.0.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[0u8; 4096]).is_ok() {}
    while file.write_all(&[0u8; 1]).is_ok() {}

    // Sooner or later a commit fails; from there on all do, each with a reason.
    let mut durable = state.clone();
    let mut n = 40;
    let error = loop {
        advance(&mut state, n);
        match ledger.commit(&state) {
            Ok(()) => durable = state.clone(),
            Err(error) => break error,
        }
        n += 1;
        assert!(n < 200_000, "the disk is full and nothing fails");
    };
    println!("failed at step {n}: {error}");
    assert!(matches!(error, LedgerError::Io(_)), "{error}");
    assert!(ledger.commit(&state).is_err());

    // Room again: the same ledger goes on, with a state that the failed batch
    // was not part of.
    drop(file);
    fs::remove_file(&filler).unwrap();
    let mut other = durable.clone();
    Arc::make_mut(&mut other.meta).foreign = 3;
    ledger.commit(&other).unwrap();
    drop(ledger);
    let (_, found, report) = SledStore::open_ledger(&folder, &instance()).unwrap();
    assert_eq!(report.damaged, None);
    assert_eq!(found.unwrap(), other, "what failed left no trace");
}

/// A store whose commits fail now and then, leaving any part of nothing or all.
#[derive(Clone, Default)]
struct Flaky(Arc<parking_lot::Mutex<(BTreeMap<String, Vec<u8>>, u8)>>);

impl fairway::pool::ledger::Store for Flaky {
    fn load(&mut self) -> Result<BTreeMap<String, Vec<u8>>, LedgerError> {
        Ok(self.0.lock().0.clone())
    }
    fn commit(&mut self, batch: &[fairway::pool::ledger::Write]) -> Result<(), LedgerError> {
        let mut disk = self.0.lock();
        // 0: fine; 1: fails without effect; 2: says it failed, but did it.
        if disk.1 != 1 {
            for (key, value) in batch {
                match value {
                    Some(value) => disk.0.insert(key.clone(), value.clone()),
                    None => disk.0.remove(key),
                };
            }
        }
        if disk.1 == 0 { Ok(()) } else { Err(LedgerError::Io("flaky".to_owned())) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_failures_the_next_commit_makes_the_disk_equal_to_the_state(
        moves in prop::collection::vec((0..60u64, 0..3u8), 1..30),
    ) {
        let store = Flaky::default();
        let (mut ledger, _) = Ledger::open(Box::new(store.clone())).unwrap();
        let mut durable = None;
        for (n, mood) in moves {
            store.0.lock().1 = mood;
            let state = history(n);
            if ledger.commit(&state).is_ok() {
                let (_, found) = Ledger::open(Box::new(store.clone())).unwrap();
                prop_assert_eq!(found.as_ref(), Some(&state));
                durable = Some(state);
            }
        }
        store.0.lock().1 = 0;
        let last = durable.unwrap_or_else(blank);
        ledger.commit(&last).unwrap();
        let (_, found) = Ledger::open(Box::new(store)).unwrap();
        prop_assert_eq!(found, Some(last));
    }
}
