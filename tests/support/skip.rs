//! Tests that this machine cannot run: said, counted, and never silent.
#![allow(dead_code)]

/// Counts a skipped test where the caller asked for it.
pub fn skip(test: &str, missing: &str) {
    use std::io::Write as _;
    let line = format!("SKIPPED: {test}: {missing}");
    println!("{line}");
    if let Some(path) = std::env::var_os("FAIRWAY_SKIPPED") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}

/// The first of these that is missing, with where it comes from; root always.
pub fn missing_of(programs: &[(&str, &'static str)]) -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root");
    }
    let absent = |program: &str| std::process::Command::new(program).arg("-V").output().is_err();
    programs.iter().find(|(program, _)| absent(program)).map(|(_, what)| *what)
}

pub const NFT: (&str, &str) = ("nft", "nft (apt-get install nftables)");
pub const IP: (&str, &str) = ("ip", "ip (apt-get install iproute2)");
