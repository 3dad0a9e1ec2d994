//! Params: the parameters of an RPC-style request.
//!
//! Purpose: query string and form body as one flat, bounded map, read by the
//! types the API documents. Owner: the API server. Invariants: no name twice;
//! an empty value counts as absent, as in the real API.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::error::ApiError;

const MAX_PARAMS: usize = 600;
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 4096;
const MAX_TAGS: u32 = 20;

/// Name and value pairs, decoded, in the order sent.
pub fn decode_pairs(text: &str) -> Result<Vec<(String, String)>, ApiError> {
    let mut pairs = Vec::new();
    for part in text.split('&').filter(|part| !part.is_empty()) {
        if pairs.len() == MAX_PARAMS {
            return Err(ApiError::new(400, "InvalidParameter", format!("More than {MAX_PARAMS} parameters.")));
        }
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let (name, value) = (decode(name)?, decode(value)?);
        if name.len() > MAX_NAME || value.len() > MAX_VALUE {
            return Err(ApiError::new(400, "InvalidParameter", "A parameter is too long."));
        }
        pairs.push((name, value));
    }
    Ok(pairs)
}

fn decode(text: &str) -> Result<String, ApiError> {
    let malformed = || ApiError::new(400, "InvalidParameter", "A parameter is not percent-encoded UTF-8.");
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(malformed);
                let value = digit()? * 16 + digit()?;
                out.push(u8::try_from(value).map_err(|_| malformed())?);
            }
            other => out.push(other),
        }
    }
    String::from_utf8(out).map_err(|_| malformed())
}

/// RFC 3986, as the signature's canonical form wants it.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The parameters of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params(BTreeMap<String, String>);

impl Params {
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, ApiError> {
        let mut map = BTreeMap::new();
        for (name, value) in pairs {
            if map.insert(name.clone(), value).is_some() {
                return Err(ApiError::new(400, "InvalidParameter", format!("The parameter {name} is there twice.")));
            }
        }
        if map.len() > MAX_PARAMS {
            return Err(ApiError::new(400, "InvalidParameter", format!("More than {MAX_PARAMS} parameters.")));
        }
        Ok(Self(map))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub fn required(&self, name: &str) -> Result<&str, ApiError> {
        self.get(name).ok_or_else(|| ApiError::missing(name))
    }

    /// A string of at most `max` characters, empty when absent.
    pub fn text(&self, name: &str, max: usize) -> Result<String, ApiError> {
        let value = self.get(name).unwrap_or_default();
        if value.chars().count() > max {
            return Err(ApiError::invalid(name, format!("at most {max} characters")));
        }
        Ok(value.to_owned())
    }

    pub fn parsed<T: FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let value = self.get(name).map(str::parse);
        value.transpose().map_err(|_| ApiError::invalid(name, "it cannot be read"))
    }

    pub fn int(&self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.parsed::<i64>(name)? else { return Ok(None) };
        let value = u32::try_from(value).ok().filter(|v| range.contains(v));
        let why = || format!("it must be within {} and {}", range.start(), range.end());
        value.map(Some).ok_or_else(|| ApiError::invalid(name, why()))
    }

    /// SDKs send `true` and `True`.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.get(name).map(str::to_ascii_lowercase).as_deref() {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => Err(ApiError::invalid(name, "it must be true or false")),
        }
    }

    /// `Name.1`, `Name.2`, … in numeric order; at most `max` of them.
    pub fn list(&self, name: &str, max: u32) -> Result<Vec<&str>, ApiError> {
        let prefix = format!("{name}.");
        let mut items = BTreeMap::new();
        for (key, value) in self.0.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)) {
            let index: u32 =
                key[prefix.len()..].parse().map_err(|_| ApiError::invalid(key, "want a number after the dot"))?;
            if index == 0 || index > max {
                return Err(ApiError::invalid(name, format!("N of {name}.N must be within 1 and {max}")));
            }
            if !value.is_empty() {
                items.insert(index, value.as_str());
            }
        }
        Ok(items.into_values().collect())
    }

    pub fn parsed_list<T: FromStr>(&self, name: &str, max: u32) -> Result<Vec<T>, ApiError> {
        let read =
            |value: &str| value.parse().map_err(|_| ApiError::invalid(name, format!("{value:.64} cannot be read")));
        self.list(name, max)?.into_iter().map(read).collect()
    }

    /// `Tag.1.Key`, `Tag.1.Value`, …
    pub fn tags(&self) -> Result<BTreeMap<String, String>, ApiError> {
        let mut tags = BTreeMap::new();
        for n in 1..=MAX_TAGS {
            let Some(key) = self.get(&format!("Tag.{n}.Key")) else { continue };
            let value = self.get(&format!("Tag.{n}.Value")).unwrap_or_default();
            if key.chars().count() > 128 || value.chars().count() > 128 {
                return Err(ApiError::invalid("Tag", "at most 128 characters each"));
            }
            if tags.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(ApiError::new(400, "Duplicate.TagKey", "The Tag.N.Key contain duplicate key."));
            }
        }
        let index = |name: &str| name.strip_prefix("Tag.")?.split('.').next()?.parse::<u32>().ok();
        if self.0.keys().filter_map(|name| index(name)).any(|n| n == 0 || n > MAX_TAGS) {
            return Err(ApiError::new(400, "InvalidTag.Count", format!("More than {MAX_TAGS} tags.")));
        }
        Ok(tags)
    }

    /// Equal for equal parameters, whatever their order; the client token and
    /// what changes with every request left out.
    pub fn fingerprint(&self) -> String {
        let mut out = String::new();
        for (name, value) in self.0.iter().filter(|(name, _)| name.as_str() != "ClientToken") {
            let _ = write!(out, "{}={}&", encode(name), encode(value));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(text: &str) -> Params {
        Params::new(decode_pairs(text).unwrap()).unwrap()
    }

    #[test]
    fn parameters_read_as_an_sdk_writes_them() {
        let p = params(
            "DeleteOnRelease=True&SourceDestCheck=false&Description=a+b%2Bc%2A~%2F%E4%B8%AD&Id.2=b&Id.1=a&Id.10=c",
        );
        assert_eq!(p.flag("DeleteOnRelease").unwrap(), Some(true));
        assert_eq!(p.flag("SourceDestCheck").unwrap(), Some(false));
        assert_eq!(p.get("Description"), Some("a b+c*~/中"));
        assert_eq!(p.list("Id", 10).unwrap(), ["a", "b", "c"]);
        assert!(p.list("Id", 9).is_err());
        assert_eq!(encode("a b+c*~/中"), "a%20b%2Bc%2A~%2F%E4%B8%AD");
    }

    #[test]
    fn hostile_parameters_are_refused() {
        for bad in ["a=%", "a=%zz", "a=%ff", &"a=1&".repeat(700), &format!("a={}", "x".repeat(5000))] {
            assert!(decode_pairs(bad).and_then(Params::new).is_err(), "{bad:.20}");
        }
        assert!(Params::new(decode_pairs("a=1&a=1").unwrap()).is_err());
        assert!(params("n=-1").int("n", 0..=9).is_err());
        assert!(params("n=99999999999999999999").int("n", 0..=9).is_err());
        assert!(params("Id.x=1").list("Id", 9).is_err());
        assert!(params("Id.0=1").list("Id", 9).is_err());
        assert!(params("Tag.21.Key=x").tags().is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in ".{0,200}", list in "(Id|Tag)\\.[0-9]{0,12}(\\.Key)?=[a-z%+]{0,4}") {
            for text in [text, list] {
                if let Ok(params) = decode_pairs(&text).and_then(Params::new) {
                    let _ = (params.list("Id", 10), params.tags(), params.int("Id", 0..=9), params.flag("Id"));
                }
            }
        }

        #[test]
        fn what_is_encoded_reads_back(value in ".{0,60}") {
            let pairs = decode_pairs(&format!("k={}", encode(&value))).unwrap();
            proptest::prop_assert_eq!(pairs, vec![("k".to_owned(), value)]);
        }
    }

    #[test]
    fn a_fingerprint_ignores_order_and_client_token() {
        assert_eq!(params("a=1&b=2&ClientToken=x").fingerprint(), params("b=2&ClientToken=y&a=1").fingerprint());
        assert_ne!(params("a=1").fingerprint(), params("a=2").fingerprint());
    }
}
