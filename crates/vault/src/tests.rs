//! Tests of the vault as a whole.

mod damage;
mod faults;
mod model;
mod rules;
mod support;
