//! Promises of the core, by example and by random histories.

use proptest::prelude::*;

use super::*;

const TYPES: [&str; 4] = ["ecs.g6.xlarge", "ecs.g7.2xlarge", "ecs.ic5.large", "ecs.g6.large"];

fn account(len: u8) -> Account {
    let mut config = CloudConfig::default();
    config.vswitches[0].cidr4 = Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), len).unwrap();
    config.validate().unwrap();
    Account::new(&config)
}

fn instance(account: &mut Account, id: &str, kind: &str) -> Instance {
    let spec = RegisterInstance {
        instance_id: id.into(),
        instance_type: kind.into(),
        vswitch: "vsw-lab-a".into(),
        zone: None,
        netns: None,
        security_groups: vec![],
        primary_ip: None,
        ipv6_count: 0,
    };
    let instance = account.register(&spec, 0).unwrap();
    account.finish_attach(&instance.primary_eni, 1, true);
    instance
}

fn secondary(account: &mut Account, more: u32) -> String {
    let spec = CreateEni {
        vswitch: "vsw-lab-a".into(),
        security_groups: vec!["sg-lab".into()],
        secondary4: if more == 0 { Want::Nothing } else { Want::Any(more) },
        ..CreateEni::default()
    };
    account.create(&spec, 0).unwrap()
}

fn attached(account: &mut Account, instance: &str, more: u32) -> String {
    let eni = secondary(account, more);
    let epoch = account.begin_attach(&eni, instance).unwrap();
    account.finish_attach(&eni, epoch, true);
    eni
}

#[test]
fn an_instance_holds_no_more_enis_than_its_type_allows() {
    let mut account = account(20);
    instance(&mut account, "i-1", "ecs.g6.xlarge");
    attached(&mut account, "i-1", 0);
    attached(&mut account, "i-1", 0);
    let fourth = secondary(&mut account, 0);
    assert_eq!(account.begin_attach(&fourth, "i-1").unwrap_err().code, "EniPerInstanceLimitExceeded");
}

#[test]
fn an_eni_holds_no_more_addresses_than_its_instance_allows() {
    let mut account = account(20);
    instance(&mut account, "i-1", "ecs.g6.xlarge");
    let eni = attached(&mut account, "i-1", 0);
    assert_eq!(account.assign4(&eni, &Want::Any(9)).unwrap().len(), 9);
    assert_eq!(account.assign4(&eni, &Want::Any(1)).unwrap_err().code, "InvalidOperation.Ipv4CountExceeded");
    let big = secondary(&mut account, 20);
    assert_eq!(account.begin_attach(&big, "i-1").unwrap_err().code, "InvalidOperation.Ipv4CountExceeded");
}

#[test]
fn a_late_completion_of_an_earlier_attachment_changes_nothing() {
    let mut account = account(20);
    instance(&mut account, "i-1", "ecs.g6.xlarge");
    let eni = secondary(&mut account, 0);
    let first = account.begin_attach(&eni, "i-1").unwrap();
    account.finish_attach(&eni, first, false);
    let second = account.begin_attach(&eni, "i-1").unwrap();
    account.finish_attach(&eni, first, false);
    assert!(account.is_current(&eni, second, EniStatus::Attaching));
}

#[test]
fn what_is_not_delete_on_release_outlives_its_instance() {
    let mut account = account(20);
    let primary = instance(&mut account, "i-1", "ecs.g6.xlarge").primary_eni;
    let kept = attached(&mut account, "i-1", 0);
    let gone = attached(&mut account, "i-1", 0);
    account.enis.get_mut(&gone).unwrap().delete_on_release = true;
    account.begin_removal("i-1").unwrap();
    account.finish_removal("i-1");
    assert_eq!(account.enis.keys().collect::<Vec<_>>(), [&kept]);
    assert_eq!(account.enis[&kept].status, EniStatus::Available);
    assert!(!account.enis.contains_key(&primary));
    assert_eq!(account.violations(), Vec::<String>::new());
}

#[test]
fn an_address_belongs_to_the_instance_its_eni_is_attached_to() {
    let mut account = account(20);
    instance(&mut account, "i-1", "ecs.g6.xlarge");
    let eni = attached(&mut account, "i-1", 3);
    let ip = IpAddr::V4(account.enis[&eni].v4[2]);
    assert_eq!(account.instance_at(ip), Some("i-1"));
    let epoch = account.begin_detach(&eni, "i-1").unwrap();
    account.finish_detach(&eni, epoch);
    assert_eq!(account.instance_at(ip), None);
    assert_eq!(account.instance_at("10.0.15.250".parse().unwrap()), None);
}

#[test]
fn an_exhausted_vswitch_gives_nothing_and_says_so() {
    let mut account = account(20);
    instance(&mut account, "i-1", "ecs.g6.xlarge");
    let eni = attached(&mut account, "i-1", 0);
    account.exhausted.insert("vsw-lab-a".into());
    assert_eq!(account.available4("vsw-lab-a"), 0);
    assert_eq!(account.assign4(&eni, &Want::Any(1)).unwrap_err().code, "InvalidVSwitchId.IpNotEnough");
    account.exhausted.clear();
    account.assign4(&eni, &Want::Any(1)).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Register(u8, u8),
    Remove(u8),
    Create { more: u32, v6: u32, keep: bool },
    CreateAt(u8),
    Attach(usize, u8),
    FinishAttach(usize, bool),
    Detach(usize, u8),
    FinishDetach(usize),
    Delete(usize),
    FinishDelete(usize),
    Assign4(usize, u32),
    Assign4At(usize, Vec<u8>),
    Unassign4(usize, Vec<u8>),
    Assign6(usize, u32),
    Unassign6(usize, usize),
    Exhaust(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let eni = 0usize..12;
    prop_oneof![
        (0u8..4, 0u8..4).prop_map(|(i, t)| Step::Register(i, t)),
        (0u8..4).prop_map(Step::Remove),
        (0u32..52, 0u32..12, any::<bool>()).prop_map(|(more, v6, keep)| Step::Create { more, v6, keep }),
        any::<u8>().prop_map(Step::CreateAt),
        (eni.clone(), 0u8..4).prop_map(|(e, i)| Step::Attach(e, i)),
        (eni.clone(), any::<bool>()).prop_map(|(e, ok)| Step::FinishAttach(e, ok)),
        (eni.clone(), 0u8..4).prop_map(|(e, i)| Step::Detach(e, i)),
        eni.clone().prop_map(Step::FinishDetach),
        eni.clone().prop_map(Step::Delete),
        eni.clone().prop_map(Step::FinishDelete),
        (eni.clone(), 0u32..40).prop_map(|(e, n)| Step::Assign4(e, n)),
        (eni.clone(), proptest::collection::vec(any::<u8>(), 0..4)).prop_map(|(e, l)| Step::Assign4At(e, l)),
        (eni.clone(), proptest::collection::vec(0u8..20, 0..4)).prop_map(|(e, l)| Step::Unassign4(e, l)),
        (eni.clone(), 0u32..12).prop_map(|(e, n)| Step::Assign6(e, n)),
        (eni, 0usize..12).prop_map(|(e, n)| Step::Unassign6(e, n)),
        any::<bool>().prop_map(Step::Exhaust),
    ]
}

fn apply(account: &mut Account, step: Step) -> Result<(), ApiError> {
    let pick = |account: &Account, n: usize| account.enis.keys().nth(n).cloned().unwrap_or_else(|| "eni-none".into());
    let epoch = |account: &Account, id: &str| account.enis.get(id).map_or(0, |e| e.epoch);
    let ip = |last: u8| Ipv4Addr::new(10, 0, 0, last);
    let any = |n: u32| if n == 0 { Want::Nothing } else { Want::Any(n) };
    match step {
        Step::Register(i, t) => {
            let spec = RegisterInstance {
                instance_id: format!("i-{i}"),
                instance_type: TYPES[t as usize].into(),
                vswitch: "vsw-lab-a".into(),
                zone: None,
                netns: None,
                security_groups: vec![],
                primary_ip: None,
                ipv6_count: 0,
            };
            account.register(&spec, 0).map(drop)
        }
        Step::Remove(i) => {
            let id = format!("i-{i}");
            account.begin_removal(&id)?;
            account.finish_removal(&id);
            Ok(())
        }
        Step::Create { more, v6, keep } => {
            let spec = CreateEni {
                vswitch: "vsw-lab-a".into(),
                security_groups: vec!["sg-lab".into()],
                secondary4: any(more),
                v6: if v6 == 0 { Want::Nothing } else { Want::Any(v6) },
                delete_on_release: !keep,
                ..CreateEni::default()
            };
            account.create(&spec, 0).map(drop)
        }
        Step::CreateAt(last) => {
            let spec = CreateEni {
                vswitch: "vsw-lab-a".into(),
                security_groups: vec!["sg-lab".into()],
                primary4: Some(ip(last)),
                secondary4: Want::These(vec![ip(last.wrapping_add(1)), ip(last.wrapping_mul(2))]),
                ..CreateEni::default()
            };
            account.create(&spec, 0).map(drop)
        }
        Step::Attach(e, i) => account.begin_attach(&pick(account, e), &format!("i-{i}")).map(drop),
        Step::FinishAttach(e, ok) => {
            let id = pick(account, e);
            // The primary ENI of an instance comes with it: its first attachment cannot be undone.
            let ok = ok || account.enis.get(&id).is_some_and(|e| e.kind == EniKind::Primary);
            account.finish_attach(&id, epoch(account, &id), ok);
            Ok(())
        }
        Step::Detach(e, i) => account.begin_detach(&pick(account, e), &format!("i-{i}")).map(drop),
        Step::FinishDetach(e) => {
            let id = pick(account, e);
            account.finish_detach(&id, epoch(account, &id));
            Ok(())
        }
        Step::Delete(e) => account.begin_delete(&pick(account, e)).map(drop),
        Step::FinishDelete(e) => {
            let id = pick(account, e);
            account.finish_delete(&id, epoch(account, &id));
            Ok(())
        }
        Step::Assign4(e, n) => account.assign4(&pick(account, e), &any(n)).map(drop),
        Step::Assign4At(e, list) => {
            let want = Want::These(list.into_iter().map(ip).collect());
            account.assign4(&pick(account, e), &want).map(drop)
        }
        Step::Unassign4(e, indexes) => {
            let id = pick(account, e);
            let held = account.eni(&id)?.v4.clone();
            let list: Vec<_> = indexes.iter().filter_map(|i| held.get(*i as usize).copied()).collect();
            account.unassign4(&id, &list)
        }
        Step::Assign6(e, n) => {
            let want = if n == 0 { Want::Nothing } else { Want::Any(n) };
            account.assign6(&pick(account, e), &want).map(drop)
        }
        Step::Unassign6(e, n) => {
            let id = pick(account, e);
            let list: Vec<_> = account.eni(&id)?.v6.get(n).copied().into_iter().collect();
            account.unassign6(&id, &list)
        }
        Step::Exhaust(on) => {
            account.exhausted.clear();
            if on {
                account.exhausted.insert("vsw-lab-a".into());
            }
            Ok(())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: one ENI per address, matching
    /// counts, quotas kept, and a refused request leaves no trace.
    #[test]
    fn no_history_breaks_the_account(len in 24u8..=27, steps in proptest::collection::vec(step(), 1..80)) {
        let mut account = account(len);
        for step in steps {
            let before = (account.enis.clone(), account.instances.clone(), account.available4("vsw-lab-a"));
            let said = format!("{step:?}");
            if apply(&mut account, step).is_err() {
                let after = (account.enis.clone(), account.instances.clone(), account.available4("vsw-lab-a"));
                prop_assert_eq!(before, after, "{} was refused", said);
            }
            prop_assert_eq!(account.violations(), Vec::<String>::new(), "after {}", said);
        }
    }
}
