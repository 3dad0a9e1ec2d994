//! CloudApi against the lab's simulated cloud, which shares no code with it:
//! an ENI's whole life over HTTPS with keys of the instance's role, and the same
//! life while replies are lost, calls are throttled and the cloud is away.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/cloud_actor.rs"]
mod cloud_actor;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use cloud_actor::with_cloud;
use fairway::actor::{AskError, Deadline, Handle, Handles, Message};
use fairway::cloud::config::{Endpoints, Source};
use fairway::cloud::*;
use fairway::lab::cloud::{CloudConfig, CloudLab, Fault, FaultSpec, Listeners, Resolver, Running};
use fairway::lab::fabric::NullFabric;
use fairway::model::{EniId, InstanceId};

struct World {
    cloud: Handle<CloudApi>,
    lab: CloudLab,
    stats: CloudStats,
    me: Identity,
}

impl World {
    async fn ask<M: Message>(&self, message: M) -> Result<M::Reply, AskError<M::Error>>
    where
        CloudApi: Handles<M>,
    {
        self.cloud.ask(message, Deadline::after(Duration::from_secs(60))).await
    }

    async fn eni(&self, id: &EniId) -> Option<Eni> {
        let filter = DescribeEnis {
            ids: vec![id.clone()],
            instance: None,
            tags: BTreeMap::new(),
            status: None,
            lane: Lane::PodWaiting,
        };
        self.ask(filter).await.unwrap().pop()
    }

    /// As the pool would: looks, at the pace the client allows.
    async fn until(&self, id: &EniId, status: EniStatus) -> Eni {
        loop {
            let eni = self.eni(id).await.expect("the ENI exists");
            if eni.status == status {
                return eni;
            }
        }
    }

    async fn create(&self, token: &str) -> Result<Eni, AskError<CloudError>> {
        self.ask(CreateEni {
            vswitch: self.me.vswitch.clone(),
            security_groups: vec!["sg-lab".into()],
            ipv4: 5,
            ipv6: 3,
            tags: [("fairway-cluster".to_owned(), "c1 / übung".to_owned())].into(),
            description: "a+b &c=d".to_owned(),
            token: token.into(),
            lane: Lane::PodWaiting,
        })
        .await
    }

    /// Created, attached, filled, emptied, detached, deleted.
    async fn whole_life(&self) {
        let instance: InstanceId = self.me.instance.clone();
        let eni = self.create("token-1").await.unwrap();
        assert_eq!((eni.ipv4.len(), eni.ipv6.len(), eni.primary4), (5, 3, eni.ipv4[0]));
        assert_eq!(eni.tags["fairway-cluster"], "c1 / übung");
        let id = eni.id.clone();
        self.ask(AttachEni { eni: id.clone(), instance: instance.clone(), lane: Lane::PodWaiting }).await.unwrap();
        let attached = self.until(&id, EniStatus::InUse).await;
        assert_eq!(attached.instance.as_ref(), Some(&instance));
        assert!(attached.delete_on_release && attached.description == "a+b &c=d");

        let (lane, token) = (Lane::PodWaiting, "token-2".into());
        let new4 = self.ask(AssignIpv4 { eni: id.clone(), count: 4, token, lane }).await.unwrap();
        // Fifteen is all the type holds: twelve more, in two calls.
        let new6 = self.ask(AssignIpv6 { eni: id.clone(), count: 12, token: "token-3".into(), lane }).await.unwrap();
        let now = self.eni(&id).await.unwrap();
        assert_eq!((now.ipv4.len(), now.ipv6.len(), new4.len(), new6.len()), (9, 15, 4, 12));
        assert!(new4.iter().all(|a| now.ipv4.contains(a)) && new6.iter().all(|a| now.ipv6.contains(a)));

        let lane = Lane::Release;
        self.ask(UnassignIpv6 { eni: id.clone(), addresses: new6, lane }).await.unwrap();
        self.ask(UnassignIpv4 { eni: id.clone(), addresses: new4[..1].to_vec(), lane }).await.unwrap();
        // One of these is gone already; the others must go all the same.
        self.ask(UnassignIpv4 { eni: id.clone(), addresses: new4, lane }).await.unwrap();
        let now = self.eni(&id).await.unwrap();
        assert_eq!((now.ipv4.len(), now.ipv6.len()), (5, 3));

        for _ in 0..2 {
            self.ask(DetachEni { eni: id.clone(), instance: instance.clone(), lane }).await.unwrap();
        }
        self.until(&id, EniStatus::Available).await;
        self.ask(DetachEni { eni: id.clone(), instance, lane }).await.unwrap();
        for _ in 0..2 {
            self.ask(DeleteEni { eni: id.clone(), lane }).await.unwrap();
        }
        assert_eq!(self.eni(&id).await, None);
        assert_eq!(self.lab.state().enis.len(), 1, "only the primary ENI is left");
        assert_eq!(self.lab.audit(), Vec::<String>::new());
    }
}

fn world<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    let lab = CloudConfig { latency_scale: 0.0, metadata_token_required: true, ..CloudConfig::default() };
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let local = || Some(TcpListener::bind(("127.0.0.1", 0)).unwrap());
    let resolver = Resolver::Custom(Arc::new(|_| Some("i-1".into())));
    let Running { cloud: lab, https, metadata, .. } = server.block_on(async {
        let listeners = Listeners { https: local(), metadata: local(), resolver, ..Listeners::default() };
        let running = CloudLab::start(lab, Arc::new(NullFabric), listeners).unwrap();
        let instance = serde_json::json!({
            "instance_id": "i-1", "instance_type": "ecs.g7.2xlarge", "vswitch": "vsw-lab-a"
        });
        running.cloud.register_instance(&serde_json::from_value(instance).unwrap()).await.unwrap();
        running
    });
    let dir = tempfile::tempdir().unwrap();
    let ca_file = dir.path().join("ca.pem");
    std::fs::write(&ca_file, lab.ca_pem().unwrap()).unwrap();
    let https = format!("https://{}", https.unwrap());
    // Tests hurry: what they prove is not the pace.
    let fast = config::Limit { per_minute: 60_000, burst: 1_000 };
    let config = Config {
        endpoints: Endpoints {
            ecs: Some(https.clone()),
            vpc: Some(https),
            metadata: Some(format!("http://{}", metadata.unwrap())),
        },
        ca_file: Some(ca_file),
        credentials: Source::RamRole { role: None },
        limits: provider::Api::ALL.map(|api| (api, fast)).into(),
        ..Config::default()
    };
    with_cloud(config, |cloud, stats| async move {
        let deadline = Deadline::after(Duration::from_secs(10));
        let me = cloud.ask(WhoAmI { lane: Lane::PodWaiting }, deadline).await.unwrap();
        test(World { cloud, lab, stats, me }).await;
    });
    drop(server);
}

#[test]
fn an_eni_lives_its_whole_life_and_leaves_nothing_behind() {
    world(|w| async move {
        assert_eq!((w.me.instance.as_str(), w.me.region.as_str()), ("i-1", "cn-hangzhou"));
        let name = w.me.instance_type.clone();
        let limits = w.ask(DescribeInstanceType { type_name: name, lane: Lane::Refill }).await.unwrap();
        assert_eq!((limits.enis, limits.ipv4_per_eni), (4, 15));
        let vswitches = w.ask(DescribeVSwitches { ids: vec![w.me.vswitch.clone()], lane: Lane::Refill }).await.unwrap();
        assert!(vswitches[0].available > 4_000 && vswitches[0].cidr4.to_string() == "10.0.0.0/20");
        assert_eq!(w.ask(DescribeVSwitches { ids: vec![], lane: Lane::Refill }).await.unwrap().len(), 2);
        w.whole_life().await;
        let calls = w.lab.calls(0);
        // Create, attach, assign v4, twice v6; unassign twice v6 and v4: once,
        // refused, the rest; three detaches; two deletes.
        assert_eq!(calls.mutating(), 1 + 1 + 1 + 2 + 2 + 3 + 3 + 2);
        assert_eq!(w.ask(MetadataEnis { lane: Lane::Refill }).await.unwrap().len(), 1);
    });
}

#[test]
fn every_reply_may_be_lost_once_and_the_life_is_the_same() {
    world(|w| async move {
        for api in provider::Api::ALL.iter().filter(|api| api.mutates()) {
            w.lab.add_fault(FaultSpec::from(Fault::LostReply { status: None }).apis(&[api.name()]).count(1)).unwrap();
        }
        w.whole_life().await;
        let lost: u64 =
            w.stats.snapshot().apis.values().map(|api| api.calls.get("transport").copied().unwrap_or(0)).sum();
        assert_eq!(lost, 8, "each of the eight mutating calls lost a reply");
    });
}

#[test]
fn an_internal_error_after_the_effect_is_met_like_a_lost_reply() {
    world(|w| async move {
        for api in provider::Api::ALL.iter().filter(|api| api.mutates()) {
            let fault = Fault::LostReply { status: Some(500) };
            w.lab.add_fault(FaultSpec::from(fault).apis(&[api.name()]).count(1)).unwrap();
        }
        w.whole_life().await;
    });
}

#[test]
fn a_storm_with_every_throttling_code_passes() {
    world(|w| async move {
        w.lab.add_fault(FaultSpec::from(Fault::Throttle { code: None }).count(5)).unwrap();
        w.whole_life().await;
        let throttled: u64 = w.stats.snapshot().apis.values().map(|api| api.throttled).sum();
        assert_eq!(throttled, 5);
    });
}

#[test]
fn a_cloud_that_is_away_is_waited_for() {
    world(|w| async move {
        w.lab.add_fault(FaultSpec::from(Fault::Down).seconds(1.0)).unwrap();
        w.whole_life().await;
    });
}

#[test]
fn refusals_arrive_as_what_they_mean() {
    world(|w| async move {
        let kind = |result: Result<Eni, AskError<CloudError>>| result.unwrap_err().domain().unwrap().kind;
        let fault = w.lab.add_fault(Fault::Deny).unwrap();
        assert_eq!(kind(w.create("t-1").await), CloudErrorKind::Forbidden);
        w.lab.remove_fault(fault);
        let fault = w.lab.add_fault(Fault::ExhaustVswitch { vswitch: "vsw-lab-a".to_owned() }).unwrap();
        assert_eq!(kind(w.create("t-2").await), CloudErrorKind::VSwitchExhausted);
        w.lab.remove_fault(fault);

        let mut enis = Vec::new();
        for n in 0..4 {
            enis.push(w.create(&format!("eni-{n}")).await.unwrap().id);
        }
        let lane = Lane::PodWaiting;
        for (n, eni) in enis.iter().enumerate() {
            let attach = AttachEni { eni: eni.clone(), instance: w.me.instance.clone(), lane };
            match w.ask(attach).await {
                Ok(()) => assert!(n < 3),
                Err(e) => assert_eq!((n, e.domain().unwrap().kind), (3, CloudErrorKind::InstanceEniLimit)),
            }
        }
        w.until(&enis[0], EniStatus::InUse).await;
        let attach = AttachEni { eni: enis[0].clone(), instance: w.me.instance.clone(), lane };
        w.ask(attach).await.expect("attached already is as good");
        let too_many = AssignIpv4 { eni: enis[0].clone(), count: 11, token: "t-3".into(), lane };
        assert_eq!(w.ask(too_many).await.unwrap_err().domain().unwrap().kind, CloudErrorKind::InstanceIpLimit);
        let delete = w.ask(DeleteEni { eni: enis[0].clone(), lane: Lane::Release }).await;
        assert_eq!(delete.unwrap_err().domain().unwrap().kind, CloudErrorKind::InvalidState);
    });
}
