//! The CNI specification's demands on a plugin, as a table: each row is a
//! clause, a call that a runtime may make, and what must come back. Versions
//! 0.3.1 to 1.1.0; the calls run in order against one node.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "cni_support/shim.rs"]
mod shim;
#[path = "cni_support/world.rs"]
mod world;

use serde_json::{Value, json};
use shim::{Call, Outcome};
use world::World;

enum Want {
    /// Exit 0 and nothing on standard output.
    Silence,
    /// Exit 0 and a result of which this holds.
    Result(fn(&Value) -> bool),
    /// Non-zero exit and an error object with this code.
    Error(u64),
}
use Want::{Error, Result, Silence};

struct Row {
    clause: &'static str,
    call: Call,
    want: Want,
}

fn meets(out: &Outcome, want: &Want) -> bool {
    match want {
        Silence => out.exit == 0 && out.stdout.is_empty(),
        Result(holds) => out.exit == 0 && holds(&out.json()),
        Error(code) => {
            let error: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
            let shaped = error["cniVersion"].is_string() && error["msg"].as_str().is_some_and(|m| !m.is_empty());
            let known = ["cniVersion", "code", "msg", "details"];
            let only = error.as_object().is_some_and(|o| o.keys().all(|k| known.contains(&k.as_str())));
            out.exit != 0 && shaped && only && error["code"] == *code
        }
    }
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

/// The result of the ADD that the table makes for sandbox `a`.
fn result_of_a(version: &str) -> Value {
    let mut ip = json!({"address": "10.9.0.1/32", "interface": 1});
    if version < "1.0.0" {
        ip["version"] = json!("4");
    }
    json!({
        "cniVersion": version,
        "interfaces": [{"name": "fw0", "mac": "02:02:02:02:02:02"}, {"name": "eth0", "sandbox": "/run/no-such-namespace"}],
        "ips": [ip],
    })
}

fn rows(version: &'static str, world: &World) -> Vec<Row> {
    let conf = world.conf(version);
    let call = |command: &str, sandbox: &str| Call::new(command, sandbox, &conf);
    let check = |previous: Value| Call::new("CHECK", "a", &with(conf.clone(), "prevResult", previous));
    let gc = |valid: Value| Call::new("GC", "", &with(conf.clone(), "cni.dev/valid-attachments", valid));
    let knows = |since: &str, want: Want| if version < since { Error(1) } else { want };
    let row = |clause, call, want| Row { clause, call, want };
    vec![
        row(
            "VERSION reports what is supported, in the version asked",
            call("VERSION", ""),
            Result(|r| r["supportedVersions"] == json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"])),
        ),
        row("an unknown command is an invalid environment", call("FROB", "a"), Error(4)),
        row("ADD without CNI_CONTAINERID", call("ADD", "a").without("CNI_CONTAINERID"), Error(4)),
        row("ADD without CNI_NETNS", call("ADD", "a").without("CNI_NETNS"), Error(4)),
        row("ADD without CNI_IFNAME", call("ADD", "a").without("CNI_IFNAME"), Error(4)),
        row("a container id that does not begin with a letter or digit", call("ADD", "-a"), Error(4)),
        row("an interface name of 16 characters", call("ADD", "a").with("CNI_IFNAME", "abcdefghijklmnop"), Error(4)),
        row("a configuration that is no JSON", call("ADD", "a").stdin("{]"), Error(6)),
        row(
            "a version that the plugin does not speak",
            Call::new("ADD", "a", &with(conf.clone(), "cniVersion", json!("0.2.0"))),
            Error(1),
        ),
        row("a network name with a slash", Call::new("ADD", "a", &with(conf.clone(), "name", json!("a/b"))), Error(7)),
        row(
            "a configuration without a name",
            Call::new("ADD", "a", &with(conf.clone(), "name", json!(null))),
            Error(7),
        ),
        row(
            "a field of unknown use is left alone",
            Call::new("DEL", "x", &with(conf.clone(), "args", json!({"labels": {}}))),
            Silence,
        ),
        row("DEL of an attachment that never was succeeds", call("DEL", "a"), Silence),
        row("DEL works without CNI_NETNS", call("DEL", "a").without("CNI_NETNS"), Silence),
        row(
            "ADD names CNI_IFNAME, its namespace and its address",
            call("ADD", "a"),
            Result(|r| {
                r["interfaces"][1]["name"] == "eth0"
                    && r["interfaces"][1]["sandbox"] == "/run/no-such-namespace"
                    && r["ips"][0]["address"] == "10.9.0.1/32"
                    && r["ips"][0]["interface"] == 1
            }),
        ),
        row(
            "ADD for another interface is another attachment",
            call("ADD", "a").with("CNI_IFNAME", "net1"),
            Result(|r| r["ips"][0]["address"] == "10.9.0.2/32"),
        ),
        row("CHECK of a sound attachment prints nothing", check(result_of_a(version)), knows("0.4.0", Silence)),
        row("CHECK needs prevResult", call("CHECK", "a"), knows("0.4.0", Error(7))),
        row(
            "CHECK allows what later plugins added",
            check({
                let mut later = result_of_a(version);
                later["routes"] = json!([{"dst": "192.0.2.0/24"}]);
                later["interfaces"].as_array_mut().unwrap().push(json!({"name": "ifb0"}));
                later
            }),
            knows("0.4.0", Silence),
        ),
        row(
            "CHECK of an unknown container",
            Call::new("CHECK", "zz", &with(conf.clone(), "prevResult", result_of_a(version))),
            knows("0.4.0", Error(3)),
        ),
        row("STATUS of a plugin that can serve ADD prints nothing", call("STATUS", ""), knows("1.1.0", Silence)),
        row("GC keeps what is valid", gc(json!([{"containerID": "a", "ifname": "eth0"}])), knows("1.1.0", Silence)),
        row("GC without the list of valid attachments", call("GC", ""), knows("1.1.0", Error(7))),
        row(
            "GC runs without the variables of an attachment",
            gc(json!([{"containerID": "a", "ifname": "eth0"}]))
                .without("CNI_NETNS")
                .without("CNI_IFNAME")
                .without("CNI_CONTAINERID"),
            knows("1.1.0", Silence),
        ),
        row("a valid attachment survived GC", call("ADD", "a"), Result(|r| r["ips"][0]["address"] == "10.9.0.1/32")),
        row("DEL prints nothing", call("DEL", "a"), Silence),
        row("DEL may be repeated", call("DEL", "a"), Silence),
        row("DEL of the other interface", call("DEL", "a").with("CNI_IFNAME", "net1"), Silence),
    ]
}

#[test]
fn the_specification_holds_in_every_version_that_is_claimed() {
    let mut failed = Vec::new();
    for version in fairway::cni::wire::SUPPORTED {
        let world = World::up();
        for row in rows(version, &world) {
            let out = row.call.run();
            if !meets(&out, &row.want) {
                failed.push(format!("{version}: {}: exit {} {}", row.clause, out.exit, out.stdout));
            } else if let (Result(_), Ok(result)) = (&row.want, serde_json::from_str::<Value>(&out.stdout))
                && result["cniVersion"] != version
            {
                failed.push(format!("{version}: {}: answered in {}", row.clause, result["cniVersion"]));
            }
        }
        assert!(world.holders().is_empty(), "{version} left something behind");
    }
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}
