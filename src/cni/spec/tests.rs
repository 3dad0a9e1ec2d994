//! CNI calls as real runtimes make them, and hostile ones: understood, or
//! answered with what is wrong.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn request(command: Command, config: Value) -> Request {
    Request {
        wire: WIRE_VERSION,
        command,
        container_id: "c1".into(),
        netns: "/var/run/netns/n1".into(),
        ifname: "eth0".into(),
        args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0".into(),
        budget_ms: 1000,
        config,
    }
}

fn conf(version: &str) -> Value {
    json!({"cniVersion": version, "name": "fairway", "type": "fairway-cni"})
}

#[test]
fn real_calls_of_containerd_are_understood() {
    for text in [
        include_str!("../../../tests/testdata/cni/containerd-1.6.20.json"),
        include_str!("../../../tests/testdata/cni/containerd-2.3.4.json"),
    ] {
        let recorded: Value = serde_json::from_str(text).unwrap();
        for call in recorded["calls"].as_array().unwrap() {
            let env = |name: &str| call["env"][name].as_str().unwrap_or_default().to_owned();
            let parsed = Call::parse(&Request {
                wire: WIRE_VERSION,
                command: Command::parse(&env("CNI_COMMAND")).unwrap(),
                container_id: env("CNI_CONTAINERID"),
                netns: env("CNI_NETNS"),
                ifname: env("CNI_IFNAME"),
                args: env("CNI_ARGS"),
                budget_ms: 1000,
                config: call["stdin"].clone(),
            });
            let parsed = parsed.unwrap_or_else(|e| panic!("{e}: {call}"));
            if parsed.command != Command::Status {
                assert_eq!(parsed.pod.key(), Some(PodKey::new("default", "web-0")));
                assert_eq!(parsed.pod.uid.as_ref().map(String::len), Some(36));
                assert_eq!(parsed.attachment.unwrap().ifname, "eth0");
            }
            if parsed.command == Command::Add && parsed.version == Version::V1_1_0 {
                let annotations = parsed.config.annotations.unwrap();
                assert_eq!(annotations["kubernetes.io/egress-bandwidth"], "20M");
                assert!(parsed.config.bandwidth.is_some());
            }
        }
    }
}

#[test]
fn each_command_needs_a_version_that_knows_it() {
    let code_of = |command, version: &str| {
        let mut config = conf(version);
        config[VALID_ATTACHMENTS] = json!([]);
        Call::parse(&request(command, config)).map_err(|e| e.code).err()
    };
    for version in ["", "0.2.0", "0.3.0", "1.2.0", "2.0.0", "one"] {
        assert_eq!(code_of(Command::Add, version), Some(code::INCOMPATIBLE_VERSION), "{version:?}");
    }
    for version in wire::SUPPORTED {
        assert_eq!(code_of(Command::Add, version), None);
        assert_eq!(code_of(Command::Del, version), None);
    }
    assert_eq!(code_of(Command::Check, "0.3.1"), Some(code::INCOMPATIBLE_VERSION));
    assert_eq!(code_of(Command::Check, "0.4.0"), None);
    for command in [Command::Gc, Command::Status] {
        assert_eq!(code_of(command, "1.0.0"), Some(code::INCOMPATIBLE_VERSION));
        assert_eq!(code_of(command, "1.1.0"), None);
    }
}

#[test]
fn bad_environment_variables_are_all_named() {
    let mut r = request(Command::Add, conf("1.1.0"));
    r.container_id = "../etc".into();
    r.ifname = "way-too-long-a-name".into();
    r.netns = "relative".into();
    let error = Call::parse(&r).unwrap_err();
    assert_eq!(error.code, code::INVALID_ENVIRONMENT);
    for name in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"] {
        assert!(error.msg.contains(name), "{error}");
    }
}

#[test]
fn del_works_without_namespace_previous_result_or_a_sound_configuration() {
    let mut r = request(
        Command::Del,
        json!({"cniVersion": "1.0.0", "prevResult": "broken", "runtimeConfig": {"bandwidth": -1}}),
    );
    r.netns = String::new();
    assert!(Call::parse(&r).is_ok());
}

#[test]
fn gc_without_a_list_is_refused_and_not_taken_for_an_empty_one() {
    for list in [
        json!(null),
        json!({}),
        json!("all"),
        json!([{"containerID": "c1"}]),
        json!([{"containerID": "../x", "ifname": "eth0"}]),
    ] {
        let mut config = conf("1.1.0");
        config[VALID_ATTACHMENTS] = list;
        assert_eq!(Call::parse(&request(Command::Gc, config)).unwrap_err().code, code::INVALID_CONFIG);
    }
}

#[test]
fn a_hostile_configuration_is_answered_with_its_fault() {
    let hostile = [
        (json!("text"), code::DECODE),
        (json!({"cniVersion": 1, "name": "n"}), code::DECODE),
        (json!({"cniVersion": "1.0.0"}), code::INVALID_CONFIG),
        (json!({"cniVersion": "1.0.0", "name": "../n"}), code::INVALID_CONFIG),
        (json!({"cniVersion": "1.0.0", "name": 7}), code::INVALID_CONFIG),
        (json!({"cniVersion": "1.0.0", "name": "n", "runtimeConfig": []}), code::INVALID_CONFIG),
        (json!({"cniVersion": "1.0.0", "name": "n", "prevResult": {"ips": 1}}), code::DECODE),
        (
            json!({"cniVersion": "1.0.0", "name": "n", "runtimeConfig": {POD_ANNOTATIONS: {"a": 1}}}),
            code::INVALID_CONFIG,
        ),
    ];
    for (config, want) in hostile {
        let error = Call::parse(&request(Command::Add, config.clone())).expect_err(&config.to_string());
        assert_eq!(error.code, want, "{config}");
    }
}

#[test]
fn hostile_arguments_are_refused() {
    for args in ["K8S_POD_NAME", "K8S_POD_NAME=", "K8S_POD_NAME=../../etc", "K8S_POD_NAMESPACE=a b", "K8S_POD_UID=\n"] {
        let error = PodArgs::parse(args).expect_err(args);
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
        assert!(error.msg.contains("CNI_ARGS"));
    }
    assert_eq!(PodArgs::parse(";;FOO=b;"), Ok(PodArgs::default()));
}

#[test]
fn a_shim_of_another_release_is_told_to_try_again() {
    let mut r = request(Command::Del, conf("1.0.0"));
    r.wire = WIRE_VERSION + 1;
    assert_eq!(Call::parse(&r).unwrap_err().code, code::TRY_AGAIN, "so that the release is spooled");
}

proptest! {
    #[test]
    fn no_request_makes_the_parser_panic(config in "\\PC{0,60}", args in "\\PC{0,60}", id in "\\PC{0,20}", n in 0usize..6) {
        let config = serde_json::from_str(&config).unwrap_or(json!({"cniVersion": config, "name": args}));
        let mut r = request(Command::ALL[n], config);
        r.args = args;
        r.container_id = id;
        let _ = Call::parse(&r);
    }

    #[test]
    fn the_order_of_arguments_does_not_matter(swap in any::<bool>()) {
        let (a, b) = ("K8S_POD_NAME=web-0", "K8S_POD_NAMESPACE=default");
        let args = if swap { format!("{b};{a}") } else { format!("{a};{b}") };
        prop_assert_eq!(PodArgs::parse(&args).unwrap().key(), Some(PodKey::new("default", "web-0")));
    }
}
