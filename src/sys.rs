//! The only unsafe code and raw system calls.

pub mod lab_exec;
