//! Short waits in the kernel while filesystems are frozen.
//!
//! Freezing a filesystem waits for three RCU grace periods (`percpu_down_write` in the kernel's `freeze_super`), two of them
//! with writers held up already; ending an epoch under the freeze and making sure that nothing is in flight wait for
//! more. A grace period takes 5 to 15 ms, mostly idling. The kernel's switch `rcu_expedited` makes each a tenth of a
//! millisecond, for one interrupt per processor; the guarantee is the same (`synchronize_rcu_expedited`).
//!
//! The switch is the machine's. So it is on only for the length of a freeze, it is left alone where the operator has set
//! it, the record of the freeze tells whoever cleans up after a killed agent to reset it, and where it cannot be
//! written (or `rcu_normal` overrides it, as on real-time kernels) freezes just take longer.

use std::fs;

const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// Whether it is off, so that switching it on is ours to undo.
pub(super) fn is_off() -> bool {
    fs::read_to_string(SWITCH).is_ok_and(|text| text.trim() == "0")
}

/// Switches it. Best effort.
pub(super) fn switch(on: bool) {
    if let Err(error) = fs::write(SWITCH, if on { "1" } else { "0" }) {
        tracing::debug!(%error, SWITCH, "freezes take a little longer");
    }
}
