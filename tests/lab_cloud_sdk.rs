//! Alibaba's own SDK, unchanged, works against the simulated cloud.
//!
//! The SDK comes from PyPI into a virtual environment below `target/tmp`, once.
//! Without Python or a package index the test is skipped, loudly.

#![allow(clippy::unwrap_used)]

#[path = "support/skip.rs"]
mod skipping;

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use fairway::lab::cloud::{AccessKey, CloudConfig, CloudLab, Listeners, RegisterInstance, Resolver};
use fairway::lab::fabric::NullFabric;
use serde_json::{Value, json};
use skipping::skip;

const PACKAGES: [&str; 2] = ["alibabacloud_ecs20140526==7.11.8", "alibabacloud_vpc20160428==7.2.2"];

fn run(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(text.lines().last().unwrap_or("no output").to_owned())
}

/// The interpreter of an environment that has the SDK.
fn python() -> Result<PathBuf, String> {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join("alibaba-sdk");
    std::fs::create_dir_all(&base).unwrap();
    let lock = File::create(base.join("lock")).unwrap();
    lock.lock().unwrap();
    let (venv, done) = (base.join("venv"), base.join("done"));
    let python = venv.join("bin/python");
    let wanted = PACKAGES.join("\n");
    if std::fs::read_to_string(&done).is_ok_and(|have| have == wanted) && python.exists() {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "30"];
    run(Command::new(&python).args(pip).args(PACKAGES))?;
    std::fs::write(done, wanted).unwrap();
    Ok(python)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alibabas_own_sdk_works_unchanged() {
    let python = match tokio::task::spawn_blocking(python).await.unwrap() {
        Ok(python) => python,
        Err(why) => return skip("alibabas_own_sdk_works_unchanged", &format!("Alibaba's SDK from PyPI ({why})")),
    };
    let config = CloudConfig {
        keys: vec![AccessKey { id: "k".into(), secret: "s".into() }],
        latency_scale: 0.02,
        ..CloudConfig::default()
    };
    let local = || Some(TcpListener::bind(("127.0.0.1", 0)).unwrap());
    let listeners = Listeners {
        https: local(),
        metadata: local(),
        resolver: Resolver::Custom(Arc::new(|_| Some("i-1".into()))),
        ..Listeners::default()
    };
    let running = CloudLab::start(config, Arc::new(NullFabric), listeners).unwrap();
    let node = json!({"instance_id": "i-1", "instance_type": "ecs.g7.4xlarge", "vswitch": "vsw-lab-a"});
    let node: RegisterInstance = serde_json::from_value(node).unwrap();
    running.cloud.register_instance(&node).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, running.cloud.ca_pem().unwrap()).unwrap();

    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/lab_cloud/sdk_drive.py"));
    command.env("LAB_ENDPOINT", running.https.unwrap().to_string()).env("LAB_CA", &ca);
    command.env("LAB_METADATA", running.metadata.unwrap().to_string()).env("PYTHONDONTWRITEBYTECODE", "1");
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let state = running.cloud.state();
    assert_eq!(said["enis"], state.enis.len());
    assert!(state.enis.iter().all(|eni| eni.id != said["eni"].as_str().unwrap()));
    assert_eq!(running.cloud.audit(), Vec::<String>::new());
    let calls = running.cloud.calls(0);
    let apis: Vec<&str> = calls.by_api.keys().map(String::as_str).collect();
    assert_eq!(apis.len(), 12, "every action was called: {apis:?}");
    running.shutdown().await;
}
