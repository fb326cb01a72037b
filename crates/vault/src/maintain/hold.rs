//! What is said of a machine's points beside its maintainer, and holds against him at once.

use super::encode;
use crate::{
    MachineState, Result, Vault, VaultError,
    journal::Journal,
    record::{Hold, HoldBody, KIND_HOLD, KIND_MAINTAINER, check_name},
    vault::STATE_BYTES_MAX,
};
use highwater_delta::{CommitId, MachineId};

/// Fences whoever maintains a machine now: what he had read of policies and holds counts no more.
pub(crate) async fn fence(vault: &Vault, machine: MachineId) -> Result<()> {
    let mut journal = Journal::open(vault.clone(), machine, STATE_BYTES_MAX).await?;
    // Only the chain is fought over, and each round somebody gets on.
    while !journal.put_after_others(KIND_MAINTAINER, &[], |_| true).await? {}
    Ok(())
}

/// Holds a point, so that it does not expire, or lets it go.
///
/// # Errors
/// There is no such point, or not any more; the reason is too long; [`VaultError::UnderHold`]: it is under legal hold, and would be
/// pinned or held for another reason.
pub async fn set_hold(
    vault: &Vault,
    machine: MachineId,
    point: CommitId,
    hold: Option<Hold>,
    reason: String,
) -> Result<()> {
    let mut journal = Journal::open(vault.clone(), machine, STATE_BYTES_MAX).await?;
    check_name(&reason)?;
    let body = encode(&HoldBody { point, hold, reason })?;
    let may_be = |state: &MachineState| {
        state.point(point)?;
        match state.holds.get(&point).map(|held| held.hold) {
            Some(Hold::Legal) if hold.is_some() => Err(VaultError::UnderHold(point)),
            _ => Ok(()),
        }
    };
    may_be(&journal.state)?;
    // Only the chain is fought over, and each round somebody gets on.
    while !journal.put_after_others(KIND_HOLD, &body, |state| may_be(state).is_ok()).await? {
        may_be(&journal.state)?;
    }
    // Erased meanwhile? Whoever erases creates the tombstone first, and looks for holds then: one of both sees the other.
    vault.refuse_erased(machine).await
}
