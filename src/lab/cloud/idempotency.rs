//! Tokens: the same call with the same client token has one effect.
//!
//! Purpose: `ClientToken` as the API documents it: same parameters, same
//! answer; other parameters, an error. Owner: the engine. Invariants: bounded,
//! the oldest forgotten first; a call that failed leaves its token free.

use std::collections::{HashMap, VecDeque};

use serde_json::Value;

use super::error::ApiError;

const MAX_TOKENS: usize = 20_000;

#[derive(Debug)]
struct Entry {
    fingerprint: String,
    /// `None` while the first call runs.
    answer: Option<Value>,
}

/// What to do with a call that carries a token.
#[derive(Debug, PartialEq)]
pub enum Begin {
    Run,
    Repeat(Value),
}

/// Client tokens seen, by API.
#[derive(Debug, Default)]
pub struct Tokens {
    entries: HashMap<String, Entry>,
    order: VecDeque<String>,
}

impl Tokens {
    pub fn begin(&mut self, key: &str, fingerprint: &str) -> Result<Begin, ApiError> {
        match self.entries.get(key) {
            Some(entry) if entry.fingerprint != fingerprint => Err(ApiError::new(
                400,
                "IdempotentParameterMismatch",
                "The request uses a client token of a previous request but is not identical to that request.",
            )),
            Some(Entry { answer: Some(answer), .. }) => Ok(Begin::Repeat(answer.clone())),
            Some(_) => Err(ApiError::new(
                403,
                "IdempotentProcessing",
                "The previous idempotent request(s) is still processing, please try again later.",
            )),
            None => {
                while self.order.len() >= MAX_TOKENS {
                    if let Some(oldest) = self.order.pop_front() {
                        self.entries.remove(&oldest);
                    }
                }
                self.entries.insert(key.to_owned(), Entry { fingerprint: fingerprint.to_owned(), answer: None });
                self.order.push_back(key.to_owned());
                Ok(Begin::Run)
            }
        }
    }

    pub fn finish(&mut self, key: &str, result: &Result<Value, ApiError>) {
        match result {
            Ok(answer) => {
                if let Some(entry) = self.entries.get_mut(key) {
                    entry.answer = Some(answer.clone());
                }
            }
            Err(_) => {
                self.entries.remove(key);
                self.order.retain(|other| other != key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_token_one_effect() {
        let mut tokens = Tokens::default();
        assert_eq!(tokens.begin("t", "a=1").unwrap(), Begin::Run);
        assert_eq!(tokens.begin("t", "a=1").unwrap_err().code, "IdempotentProcessing");
        tokens.finish("t", &Ok(Value::from(7)));
        assert_eq!(tokens.begin("t", "a=1").unwrap(), Begin::Repeat(Value::from(7)));
        assert_eq!(tokens.begin("t", "a=2").unwrap_err().code, "IdempotentParameterMismatch");
    }

    #[test]
    fn a_failed_call_leaves_its_token_free() {
        let mut tokens = Tokens::default();
        tokens.begin("t", "a=1").unwrap();
        tokens.finish("t", &Err(ApiError::internal("x")));
        assert_eq!(tokens.begin("t", "a=2").unwrap(), Begin::Run);
    }

    #[test]
    fn tokens_are_bounded() {
        let mut tokens = Tokens::default();
        for n in 0..MAX_TOKENS + 10 {
            tokens.begin(&n.to_string(), "").unwrap();
        }
        assert_eq!((tokens.entries.len(), tokens.order.len()), (MAX_TOKENS, MAX_TOKENS));
    }
}
