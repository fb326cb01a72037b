//! Tests of the vault as a whole.

mod damage;
mod erase;
mod every_byte;
mod faults;
mod fight;
mod golden;
mod index;
mod keys;
mod keys_model;
mod maintain;
mod model;
mod repair;
mod rules;
mod segments;
pub(crate) mod support;
mod verify;
