//! The state as keys and values: `meta`, `eni/0000000007`, `address/10.0.1.7`,
//! `hold/vswitch/vsw-1`; values are `v1:` and JSON.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{LedgerError, Write};
use crate::pool::state::{EniKey, HoldKey, Meta, State};

const VERSION: &str = "v1:";
const META: &str = "meta";
const ENI: &str = "eni/";
const ADDRESS: &str = "address/";
const HOLD: &str = "hold/";

/// Everything, as it is on disk.
pub fn encode(state: &State) -> Result<BTreeMap<String, Vec<u8>>, LedgerError> {
    Ok(diff(None, state)?.into_iter().filter_map(|(key, value)| value.map(|v| (key, v))).collect())
}

/// What must be written so that `old` on disk becomes `new`. Records that are
/// the same object are not even compared.
pub fn diff(old: Option<&State>, new: &State) -> Result<Vec<Write>, LedgerError> {
    let mut writes = Vec::new();
    if old.is_none_or(|o| o.meta != new.meta) {
        writes.push((META.to_owned(), Some(value(&*new.meta)?)));
    }
    differ(ENI, old.map(|o| &o.enis), &new.enis, &mut writes)?;
    differ(ADDRESS, old.map(|o| &o.addresses), &new.addresses, &mut writes)?;
    differ(HOLD, old.map(|o| &o.holds), &new.holds, &mut writes)?;
    Ok(writes)
}

fn differ<K: Ord + Display, V: PartialEq + Serialize>(
    prefix: &str,
    old: Option<&BTreeMap<K, Arc<V>>>,
    new: &BTreeMap<K, Arc<V>>,
    writes: &mut Vec<Write>,
) -> Result<(), LedgerError> {
    for (key, record) in new {
        let same = |o: &Arc<V>| Arc::ptr_eq(o, record) || o == record;
        if !old.and_then(|o| o.get(key)).is_some_and(same) {
            writes.push((format!("{prefix}{key}"), Some(value(&**record)?)));
        }
    }
    let removed = old.into_iter().flatten().filter(|(key, _)| !new.contains_key(*key));
    writes.extend(removed.map(|(key, _)| (format!("{prefix}{key}"), None)));
    Ok(())
}

fn value(record: &impl Serialize) -> Result<Vec<u8>, LedgerError> {
    let mut out = VERSION.as_bytes().to_vec();
    serde_json::to_writer(&mut out, record).map_err(|e| LedgerError::Io(format!("cannot encode a record: {e}")))?;
    Ok(out)
}

/// The state those records describe. One that cannot be read, or that breaks an
/// invariant, makes the whole ledger damaged: half a ledger hands out twice.
pub fn decode(records: &BTreeMap<String, Vec<u8>>) -> Result<State, LedgerError> {
    let meta = records.get(META).ok_or_else(|| LedgerError::Corrupt("the record `meta` is missing".to_owned()))?;
    let mut state = State::new(record::<Meta>(META, meta)?);
    for (key, bytes) in records {
        let strange = || LedgerError::Corrupt(format!("key {key:?} is not one of ours"));
        if let Some(number) = key.strip_prefix(ENI) {
            let number = number.parse().map_err(|_| strange())?;
            state.enis.insert(EniKey(number), Arc::new(record(key, bytes)?));
        } else if let Some(ip) = key.strip_prefix(ADDRESS) {
            state.addresses.insert(ip.parse().map_err(|_| strange())?, Arc::new(record(key, bytes)?));
        } else if let Some(what) = key.strip_prefix(HOLD) {
            let hold = match what.split_once('/') {
                Some(("vswitch", id)) => HoldKey::VSwitch(id.into()),
                Some(("eni", number)) => HoldKey::Eni(EniKey(number.parse().map_err(|_| strange())?)),
                None if what == "create" => HoldKey::Create,
                _ => return Err(strange()),
            };
            state.holds.insert(hold, Arc::new(record(key, bytes)?));
        } else if key != META {
            return Err(strange());
        }
    }
    state.check().map_err(LedgerError::Corrupt)?;
    Ok(state)
}

fn record<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, LedgerError> {
    let damaged = |why: String| LedgerError::Corrupt(format!("record {key:?}: {why}"));
    let json = bytes.strip_prefix(VERSION.as_bytes()).ok_or_else(|| damaged("unknown version".to_owned()))?;
    serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))
}
