//! The only unsafe code and raw system calls.

pub mod bpf;
pub mod lab_exec;
