//! The operations the messages name, made of calls: pages, splits, proofs.
//!
//! Invariants: whatever was already done when a call fails, the answer accounts
//! for it; detaching, deleting or unassigning what is gone already succeeds;
//! attaching what is attached already succeeds.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::client::{Caller, Client};
use super::provider::{Api, Failure, Page};
use super::{
    AssignIpv4, AssignIpv6, AttachEni, CloudError, CloudErrorKind, CreateEni, DeleteEni, DescribeEnis,
    DescribeInstanceType, DescribeVSwitches, DetachEni, Eni, EniStatus, Identity, InstanceLimits, MetadataEni,
    MetadataEnis, UnassignIpv4, UnassignIpv6, VSwitch, WhoAmI,
};
use crate::model::{ClientToken, EniId};

/// No listing of one account is longer than this; a longer one is a loop.
const MOST_PAGES: usize = 200;

type Done<T> = Result<T, CloudError>;

impl Client {
    pub(super) async fn create_eni(&self, who: &Caller<'_>, m: &CreateEni) -> Done<Eni> {
        if m.ipv4 == 0 {
            return Err(asked_wrong(Api::CreateNetworkInterface, "an ENI has at least one IPv4 address"));
        }
        let limits = self.provider.limits();
        let within =
            CreateEni { ipv4: m.ipv4.min(limits.create_ipv4), ipv6: m.ipv6.min(limits.create_ipv6), ..m.clone() };
        let create = async || self.provider.create_eni(&within).await;
        self.call(who, Api::CreateNetworkInterface, create).await.map_err(|failed| failed.visible())
    }

    pub(super) async fn attach_eni(&self, who: &Caller<'_>, m: &AttachEni) -> Done<()> {
        let attach = async || self.provider.attach_eni(&m.eni, &m.instance).await;
        let failed = match self.call(who, Api::AttachNetworkInterface, attach).await {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        // "Wrong state" may mean attached already, by this call's own lost
        // attempt or before a restart.
        let doubtful = failed.error.kind == CloudErrorKind::InvalidState
            || failed.uncertain && failed.error.kind == CloudErrorKind::InstanceEniLimit;
        if doubtful
            && let Ok(Some(now)) = self.look_up(who, &m.eni).await
            && now.instance.as_ref() == Some(&m.instance)
            && matches!(now.status, EniStatus::Attaching | EniStatus::InUse)
        {
            return Ok(());
        }
        Err(failed.visible())
    }

    pub(super) async fn detach_eni(&self, who: &Caller<'_>, m: &DetachEni) -> Done<()> {
        let detach = async || self.provider.detach_eni(&m.eni, &m.instance).await;
        let failed = match self.call(who, Api::DetachNetworkInterface, detach).await {
            Ok(()) => return Ok(()),
            Err(failed) if failed.error.kind == CloudErrorKind::NotFound => return Ok(()),
            Err(failed) => failed,
        };
        if failed.error.kind == CloudErrorKind::InvalidState
            && let Ok(now) = self.look_up(who, &m.eni).await
        {
            let elsewhere = |eni: &Eni| eni.instance.as_ref().is_some_and(|i| *i != m.instance);
            let off = |eni: &Eni| {
                matches!(eni.status, EniStatus::Available | EniStatus::Detaching | EniStatus::Deleting)
                    || elsewhere(eni)
            };
            if now.as_ref().is_none_or(off) {
                return Ok(());
            }
        }
        Err(failed.visible())
    }

    pub(super) async fn delete_eni(&self, who: &Caller<'_>, m: &DeleteEni) -> Done<()> {
        let delete = async || self.provider.delete_eni(&m.eni).await;
        match self.call(who, Api::DeleteNetworkInterface, delete).await {
            Err(failed) if failed.error.kind != CloudErrorKind::NotFound => Err(failed.visible()),
            _ => Ok(()),
        }
    }

    pub(super) async fn assign_ipv4(&self, who: &Caller<'_>, m: &AssignIpv4) -> Done<Vec<Ipv4Addr>> {
        if m.count == 0 {
            return Ok(Vec::new());
        }
        let assign = async || self.provider.assign_ipv4(&m.eni, m.count, &m.token).await;
        self.call(who, Api::AssignPrivateIpAddresses, assign).await.map_err(|failed| failed.visible())
    }

    /// In parts of what one call may ask for, each with a token derived from
    /// the message's, so that a repetition finds every part again. When a later
    /// part fails, those of the earlier ones are the answer.
    pub(super) async fn assign_ipv6(&self, who: &Caller<'_>, m: &AssignIpv6) -> Done<Vec<Ipv6Addr>> {
        let most = self.provider.limits().ipv6.max(1) as u32;
        let mut assigned = Vec::new();
        let mut part = 0u32;
        let mut left = m.count;
        while left > 0 {
            let count = left.min(most);
            let token = part_token(&m.token, part);
            let assign = async || self.provider.assign_ipv6(&m.eni, count, &token).await;
            match self.call(who, Api::AssignIpv6Addresses, assign).await {
                Ok(addresses) => assigned.extend(addresses),
                Err(failed) if assigned.is_empty() || failed.error.effect_unknown() || failed.uncertain => {
                    return Err(failed.visible());
                }
                Err(failed) => {
                    tracing::warn!(error = %failed.error, got = assigned.len(), asked = m.count, "Fewer IPv6 addresses");
                    return Ok(assigned);
                }
            }
            left -= count;
            part += 1;
        }
        Ok(assigned)
    }

    pub(super) async fn unassign_ipv4(&self, who: &Caller<'_>, m: &UnassignIpv4) -> Done<()> {
        let unassign = async |addresses: &[Ipv4Addr]| self.provider.unassign_ipv4(&m.eni, addresses).await;
        self.unassign(who, Api::UnassignPrivateIpAddresses, &m.eni, &m.addresses, |eni| eni.ipv4, unassign).await
    }

    pub(super) async fn unassign_ipv6(&self, who: &Caller<'_>, m: &UnassignIpv6) -> Done<()> {
        let unassign = async |addresses: &[Ipv6Addr]| self.provider.unassign_ipv6(&m.eni, addresses).await;
        for part in m.addresses.chunks(self.provider.limits().ipv6.max(1)) {
            self.unassign(who, Api::UnassignIpv6Addresses, &m.eni, part, |eni| eni.ipv6, &unassign).await?;
        }
        Ok(())
    }

    /// The cloud refuses a list in which one address is gone already: look
    /// which ones are still there and try once more with those.
    async fn unassign<A: Copy + Ord>(
        &self,
        who: &Caller<'_>,
        api: Api,
        eni: &EniId,
        addresses: &[A],
        held: impl Fn(Eni) -> Vec<A>,
        unassign: impl AsyncFn(&[A]) -> Result<(), Failure>,
    ) -> Done<()> {
        if addresses.is_empty() {
            return Ok(());
        }
        let failed = match self.call(who, api, async || unassign(addresses).await).await {
            Ok(()) => return Ok(()),
            Err(failed) => failed,
        };
        if failed.error.kind != CloudErrorKind::NotFound {
            return Err(failed.visible());
        }
        let Some(now) = self.look_up(who, eni).await? else {
            return Ok(());
        };
        let asked: BTreeSet<A> = addresses.iter().copied().collect();
        let left: Vec<A> = held(now).into_iter().filter(|a| asked.contains(a)).collect();
        match left.len() {
            0 => Ok(()),
            n if n < asked.len() => {
                let again = self.call(who, api, async || unassign(&left).await).await;
                again.map_err(|failed| failed.visible())
            }
            _ => Err(failed.visible()),
        }
    }

    pub(super) async fn describe_enis(&self, who: &Caller<'_>, m: &DescribeEnis) -> Done<Vec<Eni>> {
        let mut all = Vec::new();
        let most = self.provider.limits().describe_ids.max(1);
        let parts: Vec<&[EniId]> = if m.ids.is_empty() { vec![&[]] } else { m.ids.chunks(most).collect() };
        for ids in parts {
            let page = async |next: Option<&str>| self.provider.describe_enis(m, ids, next).await;
            all.extend(self.pages(who, Api::DescribeNetworkInterfaces, page).await?);
        }
        // An ENI that changes while pages are turned may appear on two; not
        // every filter is one of the cloud's.
        let mut seen = BTreeSet::new();
        all.retain(|eni| passes(m, eni) && seen.insert(eni.id.clone()));
        Ok(all)
    }

    pub(super) async fn describe_vswitches(&self, who: &Caller<'_>, m: &DescribeVSwitches) -> Done<Vec<VSwitch>> {
        let api = Api::DescribeVSwitches;
        if m.ids.is_empty() {
            let page = async |next: Option<&str>| self.provider.describe_vswitches(None, next).await;
            return self.pages(who, api, page).await;
        }
        let wanted = m.ids.iter().map(async |id| {
            let page = async |next: Option<&str>| self.provider.describe_vswitches(Some(id), next).await;
            self.pages(who, api, page).await
        });
        Ok(futures::future::try_join_all(wanted).await?.into_iter().flatten().collect())
    }

    pub(super) async fn describe_instance_type(
        &self,
        who: &Caller<'_>,
        m: &DescribeInstanceType,
    ) -> Done<InstanceLimits> {
        let describe = async || self.provider.describe_instance_type(&m.type_name).await;
        self.call(who, Api::DescribeInstanceTypes, describe).await.map_err(|failed| failed.visible())
    }

    pub(super) async fn who_am_i(&self, who: &Caller<'_>, _: &WhoAmI) -> Done<Identity> {
        self.call(who, Api::Metadata, async || self.provider.who_am_i().await).await.map_err(|failed| failed.visible())
    }

    pub(super) async fn metadata_enis(&self, who: &Caller<'_>, _: &MetadataEnis) -> Done<Vec<MetadataEni>> {
        self.call(who, Api::Metadata, async || self.provider.metadata_enis().await)
            .await
            .map_err(|failed| failed.visible())
    }

    /// One ENI as it is now; `None` when it is gone.
    async fn look_up(&self, who: &Caller<'_>, eni: &EniId) -> Done<Option<Eni>> {
        let lane = super::Lane::PodWaiting;
        let filter =
            DescribeEnis { ids: vec![eni.clone()], instance: None, tags: Default::default(), status: None, lane };
        Ok(self.describe_enis(who, &filter).await?.into_iter().find(|found| found.id == *eni))
    }

    async fn pages<T>(
        &self,
        who: &Caller<'_>,
        api: Api,
        page: impl AsyncFn(Option<&str>) -> Result<Page<T>, Failure>,
    ) -> Done<Vec<T>> {
        let mut all = Vec::new();
        let mut next: Option<String> = None;
        for _ in 0..MOST_PAGES {
            let got =
                self.call(who, api, async || page(next.as_deref()).await).await.map_err(|failed| failed.visible())?;
            all.extend(got.items);
            match got.next {
                None => return Ok(all),
                same if same == next => break,
                more => next = more,
            }
        }
        Err(CloudError::new(
            CloudErrorKind::Transport,
            api.name(),
            format!("the listing does not end ({} items so far)", all.len()),
            "nothing was changed; if it persists, ask the cloud's support",
        ))
    }
}

fn passes(filter: &DescribeEnis, eni: &Eni) -> bool {
    (filter.ids.is_empty() || filter.ids.contains(&eni.id))
        && filter.instance.as_ref().is_none_or(|i| eni.instance.as_ref() == Some(i))
        && filter.status.is_none_or(|status| eni.status == status)
        && filter.tags.iter().all(|(key, value)| eni.tags.get(key) == Some(value))
}

fn asked_wrong(api: Api, message: &str) -> CloudError {
    CloudError::new(CloudErrorKind::Rejected, api.name(), message, "this is a defect of Fairway: report it")
}

/// The first part has the token itself; at most 64 characters.
fn part_token(token: &ClientToken, part: u32) -> ClientToken {
    if part == 0 {
        return token.clone();
    }
    let suffix = format!("-{part}");
    let name = token.as_str();
    if name.len() + suffix.len() <= 64 {
        return ClientToken(format!("{name}{suffix}"));
    }
    use sha2::Digest as _;
    let digest = hex::encode(sha2::Sha256::digest(name));
    ClientToken(format!("{}{suffix}", &digest[..32]))
}

#[cfg(test)]
mod tests;
