//! The status as a person reads it.

use super::status::{CaptureStatus, ConnectionState, DiskStatus, GuestStatus, StatusReport};
use crate::{
    group::{GroupStatus, MarkerStatus},
    units::ByteSize,
};
use highwater_group::Kind;
use std::fmt::Write;

/// A copy that has got nowhere yet is no cause for concern for so long.
const BEGUN_MS: u64 = 10_000;

/// A report as old as this is told to be old.
const STALE_S: u64 = 3;
const HEAD: [&str; 7] = ["NAME", "DEVICE", "SIZE", "STATE", "DIRTY", "PENDING", "CHURN/S"];

/// The status as text; `now_ms` is the present time.
#[must_use]
pub fn render(status: &StatusReport, now_ms: u64) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = fill(&mut text, status, now_ms);
    text
}

fn fill(out: &mut String, status: &StatusReport, now_ms: u64) -> std::fmt::Result {
    let machine = status.machine.map_or_else(|| "not enrolled".to_owned(), |id| id.to_string());
    writeln!(
        out,
        "agent      {} (pid {}), up {}",
        status.agent_version,
        status.pid,
        ago(status.started_at_ms, now_ms)
    )?;
    writeln!(out, "machine    {machine}")?;
    let endpoint = status.collector.endpoint.as_deref().unwrap_or("none configured");
    let state = match status.collector.state {
        ConnectionState::NotEnrolled => "not enrolled",
        ConnectionState::Connecting => "connecting",
        ConnectionState::Connected => "connected",
        ConnectionState::BackingOff => "backing off",
        ConnectionState::Critical => "CRITICAL",
    };
    write!(out, "collector  {endpoint}: {state} for {}", ago(status.collector.since_ms, now_ms))?;
    if let Some(at) = status.collector.retry_at_ms {
        let wait = span(at.saturating_sub(now_ms) / 1000);
        let failures = match status.collector.failures {
            1 => "1 failure".to_owned(),
            more => format!("{more} failures"),
        };
        write!(out, ", {failures}, next try in {wait}")?;
    }
    writeln!(out)?;
    if let Some(error) = &status.collector.last_error {
        writeln!(out, "           {error}")?;
    }
    match &status.last_point {
        None => writeln!(out, "last point none yet")?,
        Some(point) => writeln!(
            out,
            "last point {} of {} ago, {}-consistent, frozen {:.1} ms",
            point.id,
            ago(point.taken_at_ms, now_ms),
            format!("{:?}", point.consistency).to_lowercase(),
            point.freeze_us as f64 / 1000.0
        )?,
    }
    writeln!(out, "bandwidth  {}", status.bandwidth)?;
    capture(out, &status.capture, now_ms)?;
    if let Some(told) = &status.group {
        group(out, told, now_ms)?;
    }
    for guest in &status.guests {
        guest_line(out, guest, now_ms)?;
    }
    if status.guardian_pid.is_none() {
        writeln!(out, "guardian   NOT RUNNING: nothing is frozen, so no points of filesystems")?;
    }
    writeln!(out)?;
    table(out, &status.disks)?;
    for disk in &status.disks {
        details(out, disk, now_ms)?;
    }
    let seconds_ago = now_ms.saturating_sub(status.as_of_ms) / 1000;
    if status.as_of_ms > 0 && seconds_ago >= STALE_S {
        writeln!(out, "! All this is from {} ago: the agent is busy sending.", span(seconds_ago))?;
    }
    for note in &status.notes {
        writeln!(out, "! {note}")?;
    }
    Ok(())
}

fn capture(out: &mut String, capture: &CaptureStatus, now_ms: u64) -> std::fmt::Result {
    if let Some(reason) = &capture.unavailable {
        return writeln!(out, "capture    none: {reason}");
    }
    if capture.active || capture.entering {
        write!(
            out,
            "capture    {}: ring {} of {}, buffers {} of {}",
            if capture.active { "in order" } else { "in order soon, what is pending is read" },
            size(capture.ring_filled_bytes),
            size(capture.ring_bytes),
            size(capture.buffered_bytes),
            size(capture.buffer_bytes)
        )?;
        if capture.captured_bytes > 0 {
            write!(
                out,
                "; {} captured, {} sent",
                size(capture.captured_bytes),
                size(capture.coalesced_bytes)
            )?;
        }
        if let Some(at) = capture.next_point_at_ms {
            let wait = span(at.saturating_sub(now_ms).div_ceil(1000));
            write!(out, "; next point in {wait}, if something is written")?;
        }
        writeln!(out)?;
    } else if let Some(at) = capture.retry_at_ms {
        let wait = span(at.saturating_sub(now_ms).div_ceil(1000));
        writeln!(out, "capture    not now: tried again in {wait}")?;
    } else {
        writeln!(out, "capture    not now: no disk is there, or no collector")?;
    }
    if let (Some(reason), Some(at)) = (&capture.last_left, capture.last_left_at_ms) {
        let times: Vec<String> = capture.left.iter().map(|(kind, times)| format!("{kind} {times}")).collect();
        writeln!(out, "           left since the agent started: {}", times.join(", "))?;
        writeln!(out, "           the last time {} ago: HW-1494 {reason}", ago(at, now_ms))?;
        if let Some(action) = &capture.last_left_action {
            writeln!(out, "           \u{2192} {action}")?;
        }
    }
    Ok(())
}

fn group(out: &mut String, group: &GroupStatus, now_ms: u64) -> std::fmt::Result {
    writeln!(
        out,
        "group      {} ({} member{}, {} connected now)",
        group.name,
        group.members,
        if group.members == 1 { "" } else { "s" },
        group.connected
    )?;
    match &group.listening {
        Some(listening) => {
            let called = group.address.as_deref().unwrap_or("an address that they do not know yet");
            writeln!(out, "           listens on {listening}; the others call {called}")?;
        }
        None => writeln!(out, "           NOT LISTENING: the others cannot call this machine")?,
    }
    let kind = |marker: &MarkerStatus| if marker.kind == Kind::Application { "application" } else { "crash" };
    if let Some(kept) = &group.last_kept {
        writeln!(out, "           kept its last marker ({}) {} ago", kind(kept), ago(kept.at_ms, now_ms))?;
    }
    if let Some(failed) = &group.last_failed {
        let why = failed.why.as_deref().unwrap_or("for an unknown cause");
        writeln!(out, "           none ({}) {} ago: {why}", kind(failed), ago(failed.at_ms, now_ms))?;
    }
    Ok(())
}

fn guest_line(out: &mut String, guest: &GuestStatus, now_ms: u64) -> std::fmt::Result {
    let name = &guest.name;
    match (guest.frozen_at_ms, &guest.trouble) {
        (None, _) => writeln!(out, "guest      {name}: no point with a freeze yet"),
        (Some(at), None) => {
            writeln!(out, "guest      {name}: stood still for the point of {} ago", ago(at, now_ms))
        }
        (Some(at), Some(why)) => {
            writeln!(out, "guest      {name}: did NOT stand still {} ago: {why}", ago(at, now_ms))
        }
    }
}

fn table(out: &mut String, disks: &[DiskStatus]) -> std::fmt::Result {
    if disks.is_empty() {
        return writeln!(out, "No disk is protected. Protect one with `highwater-agent protect DEVICE`.");
    }
    let cells = |disk: &DiskStatus| {
        [
            disk.name.clone(),
            disk.path.clone().unwrap_or_else(|| "absent".into()),
            size(disk.size_bytes),
            disk.state.to_string(),
            size(disk.dirty_bytes),
            size(disk.pending_bytes),
            size(disk.churn_bytes_per_s),
        ]
    };
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(disks.iter().map(cells));
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            write!(line, "{cell:<width$}  ")?;
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn details(out: &mut String, disk: &DiskStatus, now_ms: u64) -> std::fmt::Result {
    if let Some(reason) = &disk.reason {
        writeln!(out, "  {}: {} for {}: {reason}", disk.name, disk.state, ago(disk.since_ms, now_ms))?;
    }
    if let Some(progress) = disk.progress {
        let percent = progress.done_bytes.saturating_mul(100) / progress.total_bytes.max(1);
        let rate = size(progress.bytes_per_s);
        let pace = match progress.eta_s {
            Some(seconds) => format!("{rate}/s, {} left", span(seconds)),
            None if now_ms.saturating_sub(disk.since_ms) < BEGUN_MS => "just begun".to_owned(),
            None => format!("{rate}/s, no end in sight"),
        };
        writeln!(
            out,
            "  {}: {} of {} ({percent} %), {pace}",
            disk.name,
            size(progress.done_bytes),
            size(progress.total_bytes)
        )?;
    }
    let t = disk.tracker;
    if let (Some(written), Some(discarded)) = (t.kernel_sectors_written, t.kernel_sectors_discarded)
        && (t.sectors_written, t.sectors_discarded) != (written, discarded)
    {
        writeln!(
            out,
            "  {}: the tracker saw {} sectors, the kernel counted {}",
            disk.name,
            t.sectors_written + t.sectors_discarded,
            written + discarded
        )?;
    }
    Ok(())
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).rounded()
}

fn ago(then_ms: u64, now_ms: u64) -> String {
    span(now_ms.saturating_sub(then_ms) / 1000)
}

/// The two largest units: `2d 4h`, `3m 12s`.
fn span(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let mut rest = seconds;
    let mut parts = Vec::new();
    for (length, name) in units {
        if rest >= length {
            parts.push(format!("{}{name}", rest / length));
            rest %= length;
        }
    }
    parts.truncate(2);
    if parts.is_empty() { "0s".into() } else { parts.join(" ") }
}

#[cfg(test)]
pub(super) mod tests;
