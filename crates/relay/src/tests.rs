//! Client and server over real connections; the store behind is one in memory.

mod hostile;
mod network;
mod store;
mod support;
