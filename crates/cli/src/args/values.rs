//! Values of options: sizes, times, tiers and parts.

use highwater_vault::policy::Tier;
use std::time::Duration;

/// A rate or size, like `64MiB`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    highwater_delta::size::parse(text).ok_or_else(|| format!("{text:?} is no size; write it like 64MiB"))
}

/// A time, like `6h`.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is no time; write it like 90s, 2h or 15days"))
}

/// A tier, as `1h:1day`: one point of each hour, for a day.
pub(crate) fn parse_tier(text: &str) -> Result<Tier, String> {
    let refuse = || format!("{text:?} is no tier; write it like 1h:1day (one point of each hour, for a day)");
    let (every, keep_for) = text.split_once(':').ok_or_else(refuse)?;
    Ok(Tier {
        every: parse_time(every).map_err(|_| refuse())?,
        keep_for: parse_time(keep_for).map_err(|_| refuse())?,
    })
}

/// A part in percent, like `5` or `0.1%`.
pub(crate) fn parse_percent(text: &str) -> Result<f64, String> {
    let percent = text.trim_end_matches('%').parse::<f64>().ok();
    percent
        .filter(|percent| *percent > 0.0 && *percent <= 100.0)
        .ok_or_else(|| format!("{text:?} is no part; write it like 5 or 0.1, up to 100"))
}

/// How often something is done by itself, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Every(pub(crate) Option<Duration>);

/// A time, like `5min`, or `never`.
pub(crate) fn parse_every(text: &str) -> Result<Every, String> {
    match text {
        "never" => Ok(Every(None)),
        time => parse_time(time).map(|time| Every(Some(time))),
    }
}
