//! `highwater`: the operator's command.

fn main() {}
