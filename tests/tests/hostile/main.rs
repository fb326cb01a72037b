//! Hostile peers against real daemons, and a vault whose bytes were changed: every refusal has its code, nobody else is
//! affected, memory stays bounded, and no wrong content is ever handed out.

mod collector;
mod common;
mod damage;
mod machines;
