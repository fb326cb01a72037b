//! `highwater-collector machine`.

use crate::open;
use crate::say::say;
use highwater_collector::certificates::{self, Listed, State};
use highwater_collector::clock::now_ms;
use serde_json::json;
use std::path::Path;

const DAY_MS: u64 = 86_400_000;

pub async fn list(path: &Path, json: bool) -> anyhow::Result<()> {
    let (_, vault) = open(path).await?;
    let machines = certificates::list(&vault).await?;
    if json {
        say!("{}", json!({ "machines": machines }));
        return Ok(());
    }
    say!("{:<36}  {:<24}  {:<8}  certificate", "machine", "host", "state");
    for machine in &machines {
        say!(
            "{:<36}  {:<24}  {:<8}  {}",
            machine.machine,
            machine.host,
            state(machine),
            until(machine.expires_ms)
        );
    }
    Ok(())
}

fn state(machine: &Listed) -> &'static str {
    match machine.state {
        State::Enrolled => "enrolled",
        State::Expired => "expired",
        State::Revoked => "revoked",
    }
}

pub fn until(expires_ms: Option<u64>) -> String {
    let Some(expires_ms) = expires_ms else { return "-".to_owned() };
    let now_ms = now_ms();
    let (apart, word) = match expires_ms.checked_sub(now_ms) {
        Some(left) => (left, "left"),
        None => (now_ms - expires_ms, "past"),
    };
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(expires_ms);
    format!(
        "until {} ({} days {word})",
        humantime_serde::re::humantime::format_rfc3339_seconds(at),
        apart / DAY_MS
    )
}

pub async fn revoke(path: &Path, text: &str, reason: Option<String>, json: bool) -> anyhow::Result<()> {
    let (_, vault) = open(path).await?;
    let machine = certificates::find(&vault, text).await?;
    let now = certificates::revoke(&vault, machine, reason).await?;
    if json {
        say!("{}", json!({ "machine": machine, "revoked": true, "was-revoked": !now }));
    } else if now {
        say!("revoked machine {machine}: its session ends within seconds; its recovery points stay");
        say!("to let it return:\n  highwater-collector token create --machine {machine}");
    } else {
        say!("machine {machine} was revoked already; tokens made for it since are void now");
    }
    Ok(())
}
