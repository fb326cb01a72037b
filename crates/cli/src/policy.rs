//! `vault policy`, `vault pin`, `vault hold` and `vault release`: how long points are kept.

use crate::{
    CliError, Console, Exit,
    args::{Global, PolicyVerb, SetPolicy},
    confirm::{Question, confirm},
    context,
    maintain::{let_go, null_if_empty, time_text},
    output::{json, plain, rfc3339},
};
use highwater_delta::{CommitId, MachineId};
use highwater_vault::{
    Hold, Vault,
    maintain::set_hold,
    policy::{self, Policy, Rules, Tier},
};
use serde_json::json as document;
use std::{collections::BTreeMap, io::Write};

pub(crate) async fn run(
    global: &Global,
    verb: &PolicyVerb,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    match verb {
        PolicyVerb::Show { machine } => {
            let machine = named(&vault, machine.as_deref()).await?;
            show(global, &vault, machine, console).await
        }
        PolicyVerb::Set(set) => {
            let machine = named(&vault, set.machine.as_deref()).await?;
            let policy = wanted(set);
            policy.check()?;
            if !set.immutable_for.is_zero() && !set.yes {
                immutable(console, global.json, &policy)?;
            }
            agree(global, &vault, machine, &policy, set.yes, console).await?;
            policy::set_policy(&vault, machine, Some(policy), vault.now_ms()).await?;
            show(global, &vault, machine, console).await
        }
        PolicyVerb::Reset { machine, yes } => {
            let machine = context::machine(&vault, machine).await?;
            let default = Rules::of(&policy::policies(&vault, "default").await?, &[]).policy;
            agree(global, &vault, Some(machine), &default, *yes, console).await?;
            policy::set_policy(&vault, Some(machine), None, vault.now_ms()).await?;
            show(global, &vault, Some(machine), console).await
        }
    }
}

/// Asks before something is promised that cannot be taken back.
fn immutable(console: &mut Console<'_>, json: bool, policy: &Policy) -> Result<(), CliError> {
    let what = format!(
        "no point, stored already or from now on, could go before {} are over",
        time_text(policy.immutable_for)
    );
    let question = Question {
        word: "yes",
        prompt: format!(
            "{what}, and NOBODY can shorten that afterwards, however full the vault is. Type yes to set it"
        ),
        unasked: format!("{what}; say --yes"),
        refused: format!("{what}; nothing was done"),
    };
    confirm(console, json, question)
}

/// Asks, if points would go by a policy: maintenance lets them go within minutes.
async fn agree(
    global: &Global,
    vault: &Vault,
    machine: Option<MachineId>,
    policy: &Policy,
    yes: bool,
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    let affected = match machine {
        Some(machine) => vec![machine],
        None => vault.machines().await?,
    };
    let mut expire = 0;
    for one in affected {
        let own = policy::policies(vault, &one.to_string()).await?;
        // The default one holds for those without one of their own.
        if machine.is_none() && own.last().is_some_and(|document| document.policy.is_some()) {
            continue;
        }
        let rules = Rules { policy: policy.clone(), ..Rules::load(vault, one).await? };
        expire += rules.verdict(&vault.machine(one).await?, vault.now_ms()).expire.len();
    }
    if expire > 0 && !yes { let_go(console, global.json, expire) } else { Ok(()) }
}

/// Lets a point go; asks first, if it is under legal hold.
pub(crate) async fn release(
    global: &Global,
    machine: &str,
    point: CommitId,
    yes: bool,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let id = context::machine(&vault, machine).await?;
    let state = vault.machine(id).await?;
    let held = state.holds.get(&point);
    if held.is_some_and(|held| held.hold == Hold::Legal) && !yes {
        let what = format!("point {point} is under legal hold");
        let question = Question {
            word: "yes",
            prompt: format!("Point {point} is under legal hold. Type yes to end that"),
            unasked: format!("{what}; say --yes to end that"),
            refused: format!("{what} still; nothing was done"),
        };
        confirm(console, global.json, question)?;
    }
    hold(global, machine, point, None, "", console).await
}

/// Holds a point or lets it go.
pub(crate) async fn hold(
    global: &Global,
    machine: &str,
    point: CommitId,
    hold: Option<Hold>,
    reason: &str,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    let machine = context::machine(&vault, machine).await?;
    set_hold(&vault, machine, point, hold, reason.to_owned()).await?;
    if global.json {
        let reason = null_if_empty(reason);
        json(console, &document!({ "machine": machine, "point": point, "hold": hold, "reason": reason }))?;
        return Ok(Exit::Success);
    }
    match hold {
        Some(Hold::Pin) => writeln!(console.out, "Point {point} is kept until it is released.")?,
        Some(Hold::Legal) => {
            writeln!(console.out, "Point {point} is under legal hold until it is released.")?
        }
        None => writeln!(console.out, "Point {point} expires as the policy says from now on.")?,
    }
    Ok(Exit::Success)
}

async fn named(vault: &Vault, machine: Option<&str>) -> Result<Option<MachineId>, CliError> {
    Ok(match machine {
        Some(text) => Some(context::machine(vault, text).await?),
        None => None,
    })
}

fn wanted(set: &SetPolicy) -> Policy {
    Policy { keep_all: set.keep_all, tiers: set.tier.clone(), immutable_for: set.immutable_for }
}

async fn show(
    global: &Global,
    vault: &Vault,
    machine: Option<MachineId>,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let default = policy::policies(vault, "default").await?;
    let own = match machine {
        Some(machine) => policy::policies(vault, &machine.to_string()).await?,
        None => vec![],
    };
    let is_own = own.last().is_some_and(|document| document.policy.is_some());
    let rules = Rules::of(&default, &own);
    // What earlier policies protect still.
    let now_ms = vault.now_ms();
    let earlier = rules.immutable.iter().filter_map(|immutable| {
        let (until_ms, keep_for) = (immutable.until_ms?, immutable.keep_for);
        let protects_ms = until_ms.saturating_add(u64::try_from(keep_for.as_millis()).unwrap_or(u64::MAX));
        (protects_ms > now_ms).then_some((until_ms, keep_for))
    });
    // A policy can be read without them.
    let holds = match machine {
        Some(machine) => match vault.machine(machine).await {
            Err(error) if error.is_damage() => None,
            state => Some(state?.holds),
        },
        None => Some(BTreeMap::new()),
    };
    if global.json {
        let holds = holds.map(|holds| {
            let documents = holds.iter().map(|(point, held)| {
                let since = rfc3339(held.since_ms);
                document!({ "point": point, "hold": held.hold, "reason": held.reason, "since": since })
            });
            documents.collect::<Vec<_>>()
        });
        let earlier: Vec<_> = earlier
            .map(|(until_ms, keep_for)| {
                document!({ "stored-until": rfc3339(until_ms), "immutable-for": time_text(keep_for) })
            })
            .collect();
        json(
            console,
            &document!({
                "machine": machine,
                "own": is_own,
                "policy": rules.policy,
                "earlier-immutable": earlier,
                "holds": holds,
            }),
        )?;
        return Ok(Exit::Success);
    }
    let out = &mut console.out;
    match machine {
        Some(machine) if is_own => {
            writeln!(out, "{}: its own policy", plain(&vault.host_name(machine).await?))?;
        }
        Some(machine) => writeln!(out, "{}: the default policy", plain(&vault.host_name(machine).await?))?,
        None => writeln!(out, "The default policy")?,
    }
    writeln!(out, "  every point is kept for {}", time_text(rules.policy.keep_all))?;
    for Tier { every, keep_for } in &rules.policy.tiers {
        writeln!(out, "  one of each {} for {}", time_text(*every), time_text(*keep_for))?;
    }
    let immutable = rules.policy.immutable_for;
    if !immutable.is_zero() {
        writeln!(out, "  none goes before {}, whatever policy comes later", time_text(immutable))?;
    }
    for (until_ms, keep_for) in earlier {
        let (until, time) = (rfc3339(until_ms), time_text(keep_for));
        writeln!(out, "  of those stored before {until} none goes before {time}, as an earlier policy said")?;
    }
    if holds.is_none() {
        writeln!(out, "  which of its points are held cannot be read; `highwater verify` says why")?;
    }
    for (point, held) in holds.iter().flatten() {
        let how = if held.hold == Hold::Legal { "under legal hold" } else { "pinned" };
        let since = rfc3339(held.since_ms);
        writeln!(out, "  point {point} is {how} since {since}: {}", plain(&held.reason))?;
    }
    Ok(Exit::Success)
}
