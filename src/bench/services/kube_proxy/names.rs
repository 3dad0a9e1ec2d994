//! Names of chains: hashes that say which Service and endpoint they are of.

use sha2::{Digest as _, Sha256};

const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// The first `length` characters of a text's SHA-256 in base 32.
pub fn hash(text: &str, length: usize) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let bit = |n: usize| digest.get(n / 8).map_or(0, |byte| byte >> (7 - n % 8) & 1);
    let digit = |n: usize| (0..5).fold(0usize, |value, i| value << 1 | usize::from(bit(n * 5 + i)));
    (0..length).map(|n| char::from(ALPHABET[digit(n)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_have_the_names_that_kube_proxy_gives_them() {
        assert_eq!(hash("ns1/svc1:p80tcp", 16), "XPGD46QRK7WJZT7O");
        assert_eq!(hash("ns1/svc1:p80tcp10.180.0.1:80", 16), "SXIVWICOYRO3J4NJ");
        assert_eq!(hash("ns3/svc3/tcp/p80", 8), "4AT6LBPK");
    }
}
