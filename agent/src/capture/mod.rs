//! Write-ordered capture: every write's payload in the order of submission, so that a recovery point is a position.
//!
//! The programs (`agent-ebpf/src/capture`) put each change of the captured devices into one ring at submission. Nothing here
//! takes a bit away from the tracker: what capture lacks, or loses, is read from the device as in bitmap mode.

pub mod assemble;
mod bases;
mod error;
mod layout;
mod moments;
mod object;
mod page;
mod places;
pub mod pool;
mod reader;
pub mod record;
mod ring;
mod tap;

pub use bases::Found;
pub use error::CaptureError;
pub use layout::Layout;
pub use reader::StreamReader;
pub use ring::{Producer, Ring, StreamPosition};
pub use tap::{Loss, Tap};
