//! Groups on a store in memory.

mod basics;
mod faults;
mod kept;
mod race;
mod support;
