//! What pods ask for by annotations, labels and runtimeConfig, hostile values
//! included.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn annotated(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn ask(pairs: &[(&str, &str)]) -> Result<Wishes, CniError> {
    let annotations = annotated(pairs);
    decide(&Known { annotations: Some(&annotations), ..Known::default() })
}

#[test]
fn a_pod_that_says_nothing_gets_the_defaults() {
    let wishes = decide(&Known::default()).unwrap();
    assert_eq!(
        wishes,
        Wishes { mode: AttachMode::Veth, bandwidth: Bandwidth::default(), reserve: None, per_packet: false }
    );
}

#[test]
fn the_runtime_s_bandwidth_wins_over_annotations() {
    let annotations = annotated(&[(INGRESS, "1M"), (EGRESS, "1M")]);
    let runtime = json!({"IngressRate": 10_000_000, "IngressBurst": 4_294_967_295u32, "egressRate": 0});
    let known = Known { annotations: Some(&annotations), runtime_bandwidth: Some(&runtime), ..Known::default() };
    assert_eq!(decide(&known).unwrap().bandwidth, Bandwidth { ingress_bps: Some(10_000_000), egress_bps: None });
}

#[test]
fn annotations_give_bandwidth_when_the_runtime_does_not() {
    let wishes = ask(&[(INGRESS, "10M"), (EGRESS, "1.5Gi")]).unwrap();
    assert_eq!(wishes.bandwidth, Bandwidth { ingress_bps: Some(10_000_000), egress_bps: Some(1_610_612_736) });
}

#[test]
fn an_empty_bandwidth_annotation_is_no_limit() {
    assert!(ask(&[(INGRESS, ""), (EGRESS, "  ")]).unwrap().bandwidth.is_unlimited());
}

#[test]
fn a_hostile_bandwidth_is_refused_with_the_annotation_s_name() {
    for bad in [
        "-1",
        "-10M",
        "0",
        "1",
        "999",
        "2P",
        "1E",
        "10X",
        "M",
        ".",
        "1..2",
        "1.2.3M",
        "nan",
        "inf",
        "0x10",
        "10 M",
        "1e99",
        "1e-99",
        "９M",
        "99999999999999999999999999999999999999999",
    ] {
        let error = ask(&[(INGRESS, bad)]).expect_err(bad);
        assert_eq!(error.code, code::INVALID_CONFIG);
        assert!(error.msg.contains(INGRESS), "{error}");
    }
    let long = "9".repeat(100_000);
    assert!(ask(&[(EGRESS, &long)]).unwrap_err().to_string().len() < 400, "the answer stays a line");
}

#[test]
fn a_hostile_runtime_bandwidth_is_refused() {
    for bad in [
        json!("10M"),
        json!({"ingressRate": -1}),
        json!({"egressRate": "1"}),
        json!({"ingressRate": 1.5}),
        json!({"ingressRate": 7}),
        json!([1]),
    ] {
        let known = Known { runtime_bandwidth: Some(&bad), ..Known::default() };
        assert_eq!(decide(&known).expect_err(&bad.to_string()).code, code::INVALID_CONFIG);
    }
}

#[test]
fn an_exclusive_eni_is_asked_for_by_annotation_label_or_configuration() {
    let label = annotated(&[(ENI, "exclusive")]);
    let shared = annotated(&[(ENI, "shared")]);
    let mode = |known: Known<'_>| decide(&known).unwrap().mode;
    assert_eq!(ask(&[(ENI, "exclusive")]).unwrap().mode, AttachMode::Exclusive);
    assert_eq!(mode(Known { node_labels: Some(&label), ..Known::default() }), AttachMode::Exclusive);
    assert_eq!(mode(Known { default_mode: AttachMode::Exclusive, ..Known::default() }), AttachMode::Exclusive);
    let pod_wins = Known { node_labels: Some(&label), annotations: Some(&shared), ..Known::default() };
    assert_eq!(mode(pod_wins), AttachMode::Veth);
    assert_eq!(ask(&[(ENI, "mine")]).unwrap_err().code, code::INVALID_CONFIG);
}

#[test]
fn a_stateful_pod_s_address_is_kept_unless_it_says_otherwise() {
    let five = Some(Duration::from_secs(300));
    let reserve = |value: Option<&str>, stateful: bool| {
        let annotations = annotated(&value.map(|v| vec![(RESERVATION, v)]).unwrap_or_default());
        let known = Known { annotations: Some(&annotations), stateful, stateful_reserve: five, ..Known::default() };
        decide(&known).map(|w| w.reserve)
    };
    assert_eq!(reserve(None, true), Ok(five));
    assert_eq!(reserve(None, false), Ok(None));
    assert_eq!(reserve(Some("10m"), false), Ok(Some(Duration::from_secs(600))));
    assert_eq!(reserve(Some("1h30m"), true), Ok(Some(Duration::from_secs(5400))));
    assert_eq!(reserve(Some("0"), true), Ok(None));
    for bad in ["10", "m", "-5m", "25h", "5m1h", "5m5m", "99999999999999999999h", "1d", "for ever"] {
        assert_eq!(reserve(Some(bad), true).expect_err(bad).code, code::INVALID_CONFIG);
    }
}

#[test]
fn quantities_are_kubernetes_own() {
    let known = [
        ("10M", 10_000_000u128),
        ("1Ki", 1024),
        ("1.5k", 1500),
        ("1500m", 2),
        ("1e6", 1_000_000),
        ("1E3", 1000),
        ("2E", 2_000_000_000_000_000_000),
        ("+5", 5),
        (".5k", 500),
        ("5.", 5),
        ("0.000001E", 1_000_000_000_000),
        ("1u", 1),
        ("0", 0),
    ];
    for (text, value) in known {
        assert_eq!(quantity(text), Some(value), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_a_parser_panic(text in "\\PC{0,70}") {
        let _ = quantity(&text);
        let _ = duration(&text);
    }

    #[test]
    fn near_quantities_do_not_panic(text in "[+-]?[0-9.]{0,40}[numkMGTPEi]{0,2}[eE]?-?[0-9]{0,3}") {
        let _ = quantity(&text);
    }

    #[test]
    fn whole_numbers_mean_themselves(n in 0u64.., k in 0usize..4) {
        let (suffix, times) = [("", 1), ("k", 1000), ("Mi", 1 << 20), ("G", 1_000_000_000)][k];
        prop_assert_eq!(quantity(&format!("{n}{suffix}")), Some(u128::from(n) * times));
    }

    #[test]
    fn durations_add_up(h in 0u64..100, m in 0u64..100, s in 0u64..100) {
        prop_assert_eq!(duration(&format!("{h}h{m}m{s}s")), Some(Duration::from_secs(h * 3600 + m * 60 + s)));
    }
}
