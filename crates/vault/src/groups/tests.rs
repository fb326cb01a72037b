//! Groups on a store in memory.

mod basics;
mod support;
