//! Guests of this KVM host whose filesystems are frozen for recovery points.

use super::Interval;
use crate::guests::GuestOptions;
use serde::Serialize;
use std::{path::PathBuf, time::Duration};

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Guest {
    /// libvirt's or QEMU's name of it, or its UUID; with socket and disks given, any name.
    pub name: String,
    /// The host's end of the channel to its guest agent; looked for if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_socket: Option<PathBuf>,
    /// Its disks, as devices of this host; looked for if left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
    /// How long its freeze may take.
    pub freeze_timeout: Interval,
    /// The guest has hooks of its own (`qemu-ga -F`) that make its applications stand still.
    pub application: bool,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            name: String::new(),
            agent_socket: None,
            disks: vec![],
            freeze_timeout: Interval(Duration::from_secs(5)),
            application: false,
        }
    }
}

impl Guest {
    /// For the engine.
    #[must_use]
    pub fn options(&self) -> GuestOptions {
        GuestOptions {
            name: self.name.clone(),
            socket: self.agent_socket.clone(),
            disks: self.disks.clone(),
            freeze_timeout: self.freeze_timeout.0,
            application: self.application,
        }
    }
}
