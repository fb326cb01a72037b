//! How long recovery points are kept. Pure but for loading and storing the documents.
//!
//! A policy keeps every point for a while, then one an hour, and so on ([`Policy`]). Documents in the vault say which policy holds:
//! the machine's own if there is one, else the default one, else [`Policy::default`].
//!
//! Ages are counted from when a point was stored, by the collector's clock: a machine that lies about its time, as one under
//! an intruder may, can neither age nor rejuvenate its points.
//!
//! - **Groups.** Of the points of a machine's groups the policy keeps some too, and so the machine's points that belong to them
//!   ([`crate::groups`]).
//! - **Holds.** A point that is pinned or under legal hold does not expire ([`crate::Hold`]): a record of the machine says so, so that
//!   no maintainer can overlook it.
//! - **Immutability.** A point stored under a policy with `immutable-for` does not expire before, whatever policy comes later: of all
//!   policies that were in force since it was stored, the longest counts. This binds every program of Highwater; who
//!   can delete objects of the bucket by other means is stopped by the store's own lock only.

use crate::{MachineState, PointRecord, Result, Vault, VaultError, groups::Shared, maintain};
use highwater_delta::{CommitId, Consistency, MachineId};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
    time::Duration,
};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
/// Most tiers of a policy.
const TIERS_MAX: usize = 16;
/// The longest time that is spoken of: a century.
const TIME_MAX: Duration = Duration::from_secs(100 * 366 * DAY);

/// How long points are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Policy {
    /// Every point is kept for so long.
    #[serde(with = "humantime_serde")]
    pub keep_all: Duration,
    /// Then one of each stretch of time, and so on: each tier coarser than the one before, and for longer.
    #[serde(default)]
    pub tiers: Vec<Tier>,
    /// No point expires earlier, and nothing can shorten that for points that are stored already.
    #[serde(default, with = "humantime_serde")]
    pub immutable_for: Duration,
}

/// One point of each stretch of time: of those consistent with the most, the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Tier {
    /// How long a stretch is.
    #[serde(with = "humantime_serde")]
    pub every: Duration,
    /// For how long these points are kept.
    #[serde(with = "humantime_serde", rename = "for")]
    pub keep_for: Duration,
}

/// All for two hours, hourly for a day, every four hours for fifteen days.
impl Default for Policy {
    fn default() -> Self {
        let tier = |every, keep_for| Tier {
            every: Duration::from_secs(every),
            keep_for: Duration::from_secs(keep_for),
        };
        Self {
            keep_all: Duration::from_secs(2 * HOUR),
            tiers: vec![tier(HOUR, DAY), tier(4 * HOUR, 15 * DAY)],
            immutable_for: Duration::ZERO,
        }
    }
}

impl Policy {
    /// # Errors
    /// [`VaultError::Policy`]: it contradicts itself.
    pub fn check(&self) -> Result<()> {
        let refuse = |cause: &str| Err(VaultError::Policy(cause.to_owned()));
        if self.tiers.len() > TIERS_MAX {
            return refuse("more than 16 tiers");
        }
        let (mut every, mut keep_for) = (Duration::ZERO, self.keep_all);
        for tier in &self.tiers {
            if tier.every < Duration::from_secs(1) {
                return refuse("a tier with less than a second between its points");
            }
            if tier.every <= every || tier.keep_for <= keep_for {
                return refuse(
                    "each tier must be coarser than the one before, and keep its points for longer",
                );
            }
            (every, keep_for) = (tier.every, tier.keep_for);
        }
        if keep_for.max(self.immutable_for) > TIME_MAX {
            return refuse("a time of more than a century");
        }
        Ok(())
    }

    /// Points that it keeps at this moment; of `points`, oldest first, each with what it is consistent with and when it was stored. The newest of
    /// each consistency that is not surpassed by a later one is kept always.
    pub(crate) fn kept<K: Copy + Ord + Hash>(
        &self,
        points: &[(Consistency, u64, K)],
        now_ms: u64,
    ) -> HashSet<K> {
        let mut keep: HashSet<K> = HashSet::new();
        let mut best = None;
        for (consistency, _, id) in points.iter().rev() {
            if Some(*consistency) > best {
                best = Some(*consistency);
                keep.insert(*id);
            }
        }
        let spans: Vec<(u64, u64)> = std::iter::once((0, millis(self.keep_all)))
            .chain(self.tiers.iter().map(|tier| (millis(tier.every), millis(tier.keep_for))))
            .collect();
        for (level, (every, keep_for)) in spans.iter().enumerate() {
            // What follows takes over whole stretches, so that all that expires in one does so together.
            let next = spans.get(level + 1).map_or(0, |(every, _)| *every);
            let is_young = |(_, stored_at_ms, _): &&(Consistency, u64, K)| {
                let stretch_end = match next {
                    0 => *stored_at_ms,
                    next => (stored_at_ms / next).saturating_add(1).saturating_mul(next),
                };
                stretch_end.saturating_add(*keep_for) > now_ms
            };
            let young = points.iter().filter(is_young);
            if *every == 0 {
                keep.extend(young.map(|(.., id)| *id));
                continue;
            }
            let mut stretches: BTreeMap<u64, (Consistency, u64, K)> = BTreeMap::new();
            for this in young {
                let kept = stretches.entry(this.1 / every).or_insert(*this);
                *kept = (*this).max(*kept);
            }
            keep.extend(stretches.values().map(|(.., id)| *id));
        }
        keep
    }

    /// Those of a machine's points that it does not keep.
    fn expired(&self, points: &[PointRecord], now_ms: u64) -> Vec<CommitId> {
        let all = points.iter().map(|point| (point.info.consistency, point.stored_at_ms, point.id));
        let keep = self.kept(&all.collect::<Vec<_>>(), now_ms);
        points.iter().map(|point| point.id).filter(|id| !keep.contains(id)).collect()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A policy as a document of the vault: they are numbered, the last one counts, and none is ever changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyDocument {
    /// What it says; none: from then on the default one holds again.
    pub policy: Option<Policy>,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// What holds for a machine's points.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The policy in force.
    pub policy: Policy,
    /// `immutable-for` of all policies that were ever in force, with since when and until when each was.
    pub immutable: Vec<Immutable>,
    /// What of the machine is kept for the sake of groups.
    pub shared: Shared,
}

/// An immutability that was in force for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Immutable {
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// Until when; none: it still is.
    pub until_ms: Option<u64>,
    /// For how long points are protected that were there meanwhile.
    pub keep_for: Duration,
}

/// What becomes of points.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// They expire.
    pub expire: Vec<CommitId>,
    /// They would, but are held or protected.
    pub protected: Vec<CommitId>,
}

impl Rules {
    /// As the vault's documents say.
    pub async fn load(vault: &Vault, machine: MachineId) -> Result<Self> {
        let default = policies(vault, "default").await?;
        let own = policies(vault, &machine.to_string()).await?;
        Ok(Self { shared: Shared::load(vault, machine).await?, ..Self::of(&default, &own) })
    }

    /// Of the default policies and a machine's own, each in their order.
    #[must_use]
    pub fn of(default: &[PolicyDocument], own: &[PolicyDocument]) -> Self {
        let in_force = |own: Option<&PolicyDocument>, default: Option<&PolicyDocument>| {
            let policy = own.and_then(|own| own.policy.clone());
            policy.or_else(|| default.and_then(|default| default.policy.clone())).unwrap_or_default()
        };
        // Since the beginning of time, and since each document.
        let mut since: Vec<u64> = default.iter().chain(own).map(|document| document.since_ms).collect();
        since.push(0);
        since.sort_unstable();
        since.dedup();
        let at = |moment: u64| {
            let last = |all: &'_ [PolicyDocument]| all.iter().rev().find(|d| d.since_ms <= moment).cloned();
            in_force(last(own).as_ref(), last(default).as_ref())
        };
        let immutable = since
            .iter()
            .enumerate()
            .map(|(index, begin)| Immutable {
                since_ms: *begin,
                until_ms: since.get(index + 1).copied(),
                keep_for: at(*begin).immutable_for,
            })
            .filter(|immutable| !immutable.keep_for.is_zero())
            .collect();
        Self { policy: in_force(own.last(), default.last()), immutable, shared: Shared::default() }
    }

    /// Until when a point that was stored then is protected, in milliseconds since 1970; 0 if it is not.
    #[must_use]
    pub fn immutable_until_ms(&self, stored_at_ms: u64) -> u64 {
        // A stamp may be ahead of the store's clock, by which it was said that less is protected.
        let ahead_ms = millis(maintain::SKEW_MAX);
        let held = |until_ms: u64| until_ms.saturating_add(ahead_ms) > stored_at_ms;
        let in_force = self.immutable.iter().filter(|immutable| immutable.until_ms.is_none_or(held));
        in_force.map(|i| stored_at_ms.saturating_add(millis(i.keep_for))).max().unwrap_or(0)
    }

    /// The longest time that any of its points is promised for, in milliseconds.
    pub(crate) fn immutable_for_ms_max(&self) -> u64 {
        self.immutable.iter().map(|immutable| millis(immutable.keep_for)).max().unwrap_or(0)
    }

    /// What becomes of a machine's points at this moment, in milliseconds since 1970.
    #[must_use]
    pub fn verdict(&self, state: &MachineState, now_ms: u64) -> Verdict {
        let expired: HashSet<CommitId> = self.policy.expired(&state.points, now_ms).into_iter().collect();
        let shared = self.shared.kept(&self.policy, now_ms);
        let mut verdict = Verdict::default();
        let goes = |point: &&PointRecord| expired.contains(&point.id) && !shared.contains(&point.id);
        for point in state.points.iter().filter(goes) {
            let is_protected =
                state.holds.contains_key(&point.id) || self.immutable_until_ms(point.stored_at_ms) > now_ms;
            if is_protected { &mut verdict.protected } else { &mut verdict.expire }.push(point.id);
        }
        verdict
    }
}

/// The policies of a machine, or `default`, in their order.
pub async fn policies(vault: &Vault, whose: &str) -> Result<Vec<PolicyDocument>> {
    let mut documents: Vec<PolicyDocument> = Vec::new();
    for name in vault.control_list(&format!("policies/{whose}")).await? {
        let document: PolicyDocument = read(vault, &name).await?;
        // Said by a clock that was behind, it would take back what protected points until then.
        let since_ms = document.since_ms.max(vault.control_modified_ms(&name).await?);
        // A copy of the vault may have been made in any order: none is superseded before it begins.
        let since_ms = since_ms.max(documents.last().map_or(0, |last| last.since_ms + 1));
        documents.push(PolicyDocument { since_ms, ..document });
    }
    Ok(documents)
}

/// Sets the policy of a machine, or `default`; none: no own one any more. What it protects, nobody expires once this has returned: who
/// maintains a machine by what was said before is fenced.
///
/// # Errors
/// [`VaultError::Policy`]: it contradicts itself, or somebody else has just set one. After others it may have been set, and hold from the next
/// round of maintenance on.
pub async fn set_policy(
    vault: &Vault,
    whose: Option<MachineId>,
    policy: Option<Policy>,
    now_ms: u64,
) -> Result<()> {
    if let Some(policy) = &policy {
        policy.check()?;
    }
    // The default may protect what a machine's own did not.
    let protects = match &policy {
        Some(policy) => !policy.immutable_for.is_zero(),
        None => whose.is_some(),
    };
    let machines = match whose {
        _ if !protects => Vec::new(),
        Some(machine) => vec![machine],
        None => vault.machines().await?,
    };
    let whose = whose.map_or_else(|| "default".to_owned(), |machine| machine.to_string());
    let before = policies(vault, &whose).await?;
    // Their order is that of time too.
    let since_ms = now_ms.max(before.last().map_or(0, |last| last.since_ms + 1));
    let name = format!("policies/{whose}/{:08}", before.len() + 1);
    create(vault, &name, &PolicyDocument { policy, since_ms }).await?;
    for machine in machines {
        maintain::fence(vault, machine).await?;
    }
    Ok(())
}

async fn read<T: for<'de> Deserialize<'de>>(vault: &Vault, name: &str) -> Result<T> {
    let damaged = |cause: String| VaultError::corrupt(format!("control/{name}"), cause);
    let text = vault.control_get(name).await?.ok_or_else(|| damaged("it is gone".to_owned()))?;
    serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))
}

async fn create<T: Serialize>(vault: &Vault, name: &str, document: &T) -> Result<()> {
    let text = serde_json::to_vec(document).map_err(|_| VaultError::Limit("bytes of a document"))?;
    match vault.control_create(name, &text).await? {
        true => Ok(()),
        false => Err(VaultError::Policy("somebody else has just said something else of it".to_owned())),
    }
}
