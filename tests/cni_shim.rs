//! The shim alone: what it answers without an agent, how fast, and that it
//! never loses a release.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "cni_support/shim.rs"]
mod shim;
#[path = "support/skip.rs"]
mod skipping;

use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use fairway::cni::spool;
use fairway::install;
use serde_json::json;
use shim::{Call, conf};
use skipping::skip;

fn spooled(dir: &Path) -> Vec<String> {
    spool::list(&dir.join("spool")).unwrap()
}

#[test]
fn version_needs_no_agent_and_names_the_version_it_was_asked_in() {
    let dir = tempfile::tempdir().unwrap();
    let supported = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (stdin, version) in [(r#"{"cniVersion":"0.4.0"}"#, "0.4.0"), ("", "1.1.0"), ("{}", "1.1.0")] {
        let out = Call::new("VERSION", "", &conf("1.0.0", dir.path())).stdin(stdin).run().ok();
        assert_eq!(out.json(), json!({"cniVersion": version, "supportedVersions": supported}));
    }
    assert_eq!(Call::new("VERSION", "", &json!(0)).stdin("{").run().code(), 6);
}

#[test]
fn what_ships_needs_no_library_of_the_node_and_is_small() {
    const TEST: &str = "what_ships_needs_no_library_of_the_node_and_is_small";
    if install::carried_shim().is_none() {
        return skip(TEST, "a static C library to link the shim with (Debian's musl-tools)");
    }
    let program = std::fs::read(shim::PROGRAM).unwrap();
    assert_eq!(Some(&*program), install::carried_shim(), "what is tested here is what is installed");
    assert!(program.len() < 1_000_000, "{} bytes", program.len());
    // Of an ELF file of 64 bits: where its program headers are, and how many.
    let number = |at: usize, len: usize| program[at..at + len].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let kinds: Vec<usize> = (0..count).map(|nth| number(table + nth * size, 4)).collect();
    const LOAD: usize = 1;
    const INTERPRETER: usize = 3;
    assert!(kinds.contains(&LOAD) && !kinds.contains(&INTERPRETER), "{kinds:?}");
}

#[test]
fn bad_environment_is_code_4_and_names_the_variables() {
    let dir = tempfile::tempdir().unwrap();
    let good = Call::new("ADD", "c1", &conf("1.1.0", dir.path()));
    let cases = [
        (good.clone().without("CNI_COMMAND"), "CNI_COMMAND"),
        (good.clone().with("CNI_COMMAND", "add"), "CNI_COMMAND"),
        (good.clone().without("CNI_CONTAINERID"), "CNI_CONTAINERID"),
        (good.clone().with("CNI_CONTAINERID", "../x"), "CNI_CONTAINERID"),
        (good.clone().with("CNI_CONTAINERID", &"x".repeat(300)), "CNI_CONTAINERID"),
        (good.clone().without("CNI_IFNAME"), "CNI_IFNAME"),
        (good.clone().with("CNI_IFNAME", "a/b"), "CNI_IFNAME"),
        (good.clone().with("CNI_IFNAME", "sixteen-letters!"), "CNI_IFNAME"),
        (good.clone().without("CNI_NETNS"), "CNI_NETNS"),
        (good.clone().with("CNI_NETNS", "/proc/self/ns/net"), "CNI_NETNS"),
    ];
    for (call, name) in cases {
        let out = call.run();
        assert_eq!(out.code(), 4, "{}", out.stdout);
        assert!(out.json()["msg"].as_str().unwrap().contains(name), "{}", out.stdout);
    }
}

#[test]
fn garbage_on_stdin_is_a_clear_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let deep = "[".repeat(100_000);
    let long = vec![b' '; (4 << 20) + 10];
    let cases: [(Vec<u8>, u64); 8] = [
        (b"".to_vec(), 6),
        (b"\xff\xfe\0".to_vec(), 6),
        (b"{\"cniVersion\":".to_vec(), 6),
        (b"[1,2]".to_vec(), 6),
        (deep.into_bytes(), 6),
        (long, 5),
        (b"{}".to_vec(), 1),
        (b"{\"cniVersion\":\"9.9.9\",\"name\":\"n\"}".to_vec(), 1),
    ];
    for command in ["ADD", "DEL", "STATUS"] {
        for (stdin, code) in &cases {
            let out = Call::new(command, "c1", &json!({})).stdin(stdin.clone()).run();
            assert_eq!(out.code(), *code, "{command} {}", out.stdout);
        }
    }
    assert!(spooled(dir.path()).is_empty());
}

#[test]
fn keys_of_ours_that_make_no_sense_are_code_7_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("socket", json!("rel")),
        ("socket", json!(7)),
        ("spoolDir", json!("a\0b")),
        ("timeoutSeconds", json!(0)),
        ("timeoutSeconds", json!("1")),
        ("timeoutSeconds", json!(1e9)),
    ];
    for (key, value) in cases {
        let mut config = conf("1.0.0", dir.path());
        config[key] = value;
        let out = Call::new("ADD", "c1", &config).run();
        assert_eq!(out.code(), 7);
        assert!(out.json()["msg"].as_str().unwrap().contains(key), "{}", out.stdout);
    }
}

#[test]
fn with_the_agent_down_each_command_says_so_and_a_release_is_spooled() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = conf("1.1.0", dir.path());
    config["prevResult"] = json!({});
    config["cni.dev/valid-attachments"] = json!([]);
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
        let out = Call::new(command, "c1", &config).run();
        assert_eq!(out.code(), code, "{command}");
        assert_eq!(out.json()["cniVersion"], "1.1.0");
        let details = out.json()["details"].as_str().unwrap().to_owned();
        assert!(details.contains("cni.sock") && details.contains("agent"), "cause and remedy: {details}");
    }
    let del = Call::new("DEL", "c1", &config).run().ok();
    assert_eq!(del.stdout, "", "DEL prints nothing");
    Call::new("DEL", "c1", &config).run().ok();
    assert_eq!(spooled(dir.path()), ["c1@eth0.del"], "one entry however often it was asked");
    let entry = spool::load(&dir.path().join("spool"), "c1@eth0.del").unwrap().unwrap();
    assert!(entry.args.contains("K8S_POD_NAME=pod-c1"));
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir.path().join("spool")), 0o700);
    assert_eq!(mode(&dir.path().join("spool/c1@eth0.del")), 0o600);
}

#[test]
fn del_without_an_agent_does_not_hold_kubelet_up() {
    let dir = tempfile::tempdir().unwrap();
    let config = conf("1.0.0", dir.path());
    let best = (0..5).map(|n| Call::new("DEL", &format!("c{n}"), &config).run().ok().took).min().unwrap();
    assert!(best < Duration::from_millis(500), "{best:?}");
    assert_eq!(spooled(dir.path()).len(), 5);
}

/// Accepts or not, but never answers: an agent stopped by a debugger.
fn hung(dir: &Path) -> UnixListener {
    UnixListener::bind(dir.join("cni.sock")).unwrap()
}

#[test]
fn a_hung_agent_costs_no_more_than_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let _listener = hung(dir.path());
    let mut config = conf("1.1.0", dir.path());
    config["timeoutSeconds"] = json!(1);
    for (command, code) in [("ADD", 11), ("STATUS", 50)] {
        let out = Call::new(command, "c1", &config).run();
        assert_eq!(out.code(), code);
        assert!(out.took >= Duration::from_millis(900) && out.took < Duration::from_secs(4), "{:?}", out.took);
    }
    let del = Call::new("DEL", "c1", &config).run().ok();
    assert!(del.took < Duration::from_secs(4), "{:?}", del.took);
    assert_eq!(spooled(dir.path()), ["c1@eth0.del"]);
}

#[test]
fn a_full_listen_queue_costs_no_more_than_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let listener = hung(dir.path());
    // Listening again shortens the queue to one.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let mut config = conf("1.0.0", dir.path());
    config["timeoutSeconds"] = json!(1);
    let began = Instant::now();
    let all: Vec<_> = (0..4).map(|n| Call::new("DEL", &format!("c{n}"), &config).spawn()).collect();
    for child in all {
        assert!(child.wait_with_output().unwrap().status.success());
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(spooled(dir.path()).len(), 4);
}

#[test]
fn an_agent_that_talks_nonsense_is_an_agent_that_is_down() {
    for nonsense in [&b""[..], b"\xff\xff\xff\xff", b"\0\0\0\x02{}", b"\0\0\0\x0bnot json at", b"HTTP/1.1 200 OK\r\n"] {
        let dir = tempfile::tempdir().unwrap();
        let listener = hung(dir.path());
        std::thread::spawn(move || {
            for stream in listener.incoming().take(2) {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 16]);
                let _ = std::io::Write::write_all(&mut stream, nonsense);
            }
        });
        let config = conf("1.0.0", dir.path());
        assert_eq!(Call::new("ADD", "c1", &config).run().code(), 11);
        Call::new("DEL", "c1", &config).run().ok();
        assert_eq!(spooled(dir.path()), ["c1@eth0.del"]);
    }
}

#[test]
fn a_release_that_cannot_be_spooled_is_repeated_by_kubelet() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("spool"), "a file is in the way").unwrap();
    let out = Call::new("DEL", "c1", &conf("1.0.0", dir.path())).run();
    assert_eq!(out.code(), 11);
    assert!(out.json()["details"].as_str().unwrap().contains("disk"), "{}", out.stdout);
}

#[test]
fn a_killed_shim_leaves_a_whole_release_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let config = conf("1.0.0", dir.path());
    let usual = Call::new("DEL", "warm", &config).run().ok().took;
    let mut done = Vec::new();
    let rounds = 60u32;
    for n in 0..rounds {
        let id = format!("c{n}");
        let mut child = Call::new("DEL", &id, &config).spawn();
        // Spread over the life of a shim; a busy machine only widens the spread.
        let until = Instant::now() + usual * n / rounds * 2;
        while Instant::now() < until {
            std::thread::yield_now();
        }
        let _ = child.kill();
        if child.wait().unwrap().success() {
            done.push(format!("{id}@eth0.del"));
        }
    }
    let names = spooled(dir.path());
    for name in &done {
        assert!(names.contains(name), "{name} was reported done and is not in the spool");
    }
    for name in &names {
        let bytes = std::fs::read(dir.path().join("spool").join(name)).unwrap();
        let entry: spool::Entry = serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(entry.args.contains("K8S_POD_NAMESPACE=default"));
    }
}

#[test]
fn a_stdin_that_never_ends_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(shim::PROGRAM);
    command.env_clear().env("CNI_COMMAND", "STATUS").current_dir(dir.path());
    let mut child = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let stdin = child.stdin.take();
    let began = Instant::now();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(20));
    assert!(text.contains("\"code\":5"), "{text}");
    drop(stdin);
}
