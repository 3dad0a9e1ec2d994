//! Which maps are nearly full: told once when it begins, and not again before it
//! has ended.
//!
//! Pure. A map that forgets its oldest entry when it is full is not one of them.

use std::collections::BTreeSet;

/// Per cent at which a map counts as nearly full, and below which no longer.
const BEGINS: usize = 80;
const ENDS: usize = 70;

/// Maps that may be full: their oldest entries make room.
const FORGETFUL: [&str; 4] = ["affinities", "sockets", "fragments", "spare flows"];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    nearly_full: BTreeSet<String>,
}

impl Pressure {
    /// Takes a new reading of a map up; in words when it has become nearly full.
    pub fn read(&mut self, map: &str, entries: usize, capacity: usize) -> Option<String> {
        if FORGETFUL.contains(&map) || capacity == 0 {
            return None;
        }
        let percent = entries * 100 / capacity;
        if percent < ENDS {
            self.nearly_full.remove(map);
            return None;
        }
        if percent < BEGINS || !self.nearly_full.insert(map.to_owned()) {
            return None;
        }
        let then = match map {
            "flows" => {
                "when it is full, further flows of pods to Services that are translated packet by packet are kept in a \
                 spare one, which forgets its oldest: a flow without memory may change its backend with its Service"
            }
            "frontends" | "slots" | "backends" | "source ranges" => "when it is full, further Services are not carried",
            _ => "when it is full, further pods do without",
        };
        Some(format!(
            "the kernel's map of {map} on this node is {percent} % full ({entries} of {capacity} entries); {then}; \
             `fairway status services` shows all maps"
        ))
    }

    pub fn is_nearly_full(&self, map: &str) -> bool {
        self.nearly_full.contains(map)
    }

    pub fn maps(&self) -> impl Iterator<Item = &str> {
        self.nearly_full.iter().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_told_of_once_until_it_has_emptied() {
        let mut pressure = Pressure::default();
        assert_eq!(pressure.read("flows", 799, 1000), None);
        let told = pressure.read("flows", 800, 1000).unwrap();
        assert!(told.contains("80 % full (800 of 1000 entries)") && told.contains("spare"), "{told}");
        assert_eq!(pressure.read("flows", 990, 1000), None, "known");
        assert_eq!(pressure.read("flows", 750, 1000), None, "still nearly");
        assert!(pressure.is_nearly_full("flows"));
        assert_eq!(pressure.read("flows", 800, 1000), None);
        assert_eq!(pressure.read("flows", 699, 1000), None);
        assert!(!pressure.is_nearly_full("flows"));
        assert!(pressure.read("flows", 1000, 1000).is_some(), "again");
    }

    #[test]
    fn what_forgets_may_be_full() {
        assert_eq!(Pressure::default().read("sockets", 10, 10), None);
    }
}
