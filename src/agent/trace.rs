//! `/debug/trace?from=…&to=…&protocol=…` as a question to ServiceMap.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::service::model::Protocol;
use crate::service::{Client, Explain};

pub(super) fn question(arguments: &BTreeMap<String, String>) -> Result<Explain, String> {
    let known = ["from", "to", "protocol"];
    if let Some(unknown) = arguments.keys().find(|k| !known.contains(&k.as_str())) {
        return Err(format!("no argument {unknown:?}; want {}", known.join(", ")));
    }
    let given = |name: &str| arguments.get(name).map(String::as_str);
    let to = given("to").ok_or("to which address and port? give `to`")?;
    let to: SocketAddr =
        to.parse().map_err(|_| format!("{to:?} is no address with a port (10.96.0.1:80, [fd00::1]:80)"))?;
    let protocol: Protocol = given("protocol").unwrap_or("TCP").parse().map_err(|e| format!("{e}"))?;
    let client: Client = given("from").unwrap_or("node").parse()?;
    Ok(Explain { client, to, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PodKey;

    fn ask(pairs: &[(&str, &str)]) -> Result<Explain, String> {
        question(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn what_is_asked_is_understood_or_refused_in_words() {
        let asked = ask(&[("from", "shop/web-0"), ("to", "[fd00::1]:53"), ("protocol", "udp")]).unwrap();
        assert_eq!(asked.client, Client::Pod(PodKey::new("shop", "web-0")));
        assert_eq!((asked.to.to_string().as_str(), asked.protocol), ("[fd00::1]:53", Protocol::Udp));
        assert_eq!(ask(&[("to", "10.0.0.1:1")]).unwrap().client, Client::Node);
        let outside = ask(&[("from", "outside=192.0.2.1"), ("to", "10.0.0.1:1")]).unwrap().client;
        assert_eq!(outside, Client::Outside(Some("192.0.2.1".parse().unwrap())));
        assert!(ask(&[]).unwrap_err().contains("to which"));
        assert!(ask(&[("to", "10.0.0.1")]).unwrap_err().contains("port"));
        assert!(ask(&[("to", "10.0.0.1:1"), ("protocol", "icmp")]).unwrap_err().contains("SCTP"));
        assert!(ask(&[("to", "10.0.0.1:1"), ("from", "inside=1")]).unwrap_err().contains("client"));
        assert!(ask(&[("to", "10.0.0.1:1"), ("form", "x")]).unwrap_err().contains("form"));
    }
}
