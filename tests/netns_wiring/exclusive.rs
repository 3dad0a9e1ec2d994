//! Exclusive ENIs.
