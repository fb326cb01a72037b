//! How far a recovery is.

use crate::output::bytes_text;
use highwater_vault::recover::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Shows progress: a bar on a terminal, a line for each tenth elsewhere, nothing with `--json`.
pub(super) struct Watcher {
    pub(super) bar: ProgressBar,
    lines: bool,
    name: String,
    furthest: AtomicU64,
    tenths: AtomicU64,
    began: Instant,
}

impl Watcher {
    pub(super) fn new(terminal: bool, json: bool, name: &str, total: u64) -> Arc<Self> {
        let bar = ProgressBar::new(total);
        let template =
            "{prefix} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_owned());
        bar.set_draw_target(match terminal && !json {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        });
        let (furthest, tenths) = (AtomicU64::new(0), AtomicU64::new(0));
        let (lines, name) = (!terminal && !json, name.to_owned());
        Arc::new(Self { bar, lines, name, furthest, tenths, began: Instant::now() })
    }
}

impl Progress for Watcher {
    fn at(&self, done_bytes: u64, total_bytes: u64) {
        // Reports of several threads may pass each other.
        let furthest = self.furthest.fetch_max(done_bytes, Ordering::Relaxed).max(done_bytes);
        self.bar.set_position(furthest);
        let tenth = u128::from(furthest) * 10 / u128::from(total_bytes.max(1));
        if self.lines && self.tenths.fetch_max(tenth as u64, Ordering::Relaxed) < tenth as u64 {
            let rate = furthest as f64 / self.began.elapsed().as_secs_f64().max(0.001);
            let left = (total_bytes - furthest) as f64 / rate.max(1.0);
            let (name, of) = (&self.name, bytes_text(total_bytes));
            eprintln!(
                "{name}: {} of {of}, {}/s, {left:.0} s left",
                bytes_text(furthest),
                bytes_text(rate as u64)
            );
        }
    }
}
