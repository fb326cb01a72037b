//! Who belongs to the group: rosters taken over, an earlier life's recalled, and the listener while there is a group.

use super::{
    super::{
        GroupStatus, ToEngine,
        peers::{self, Table},
    },
    Member, Owner,
    words::{now_ms, refusal},
};
use highwater_delta::{DeltaId, MachineId};
use highwater_group::{Input, Life, Machine};
use highwater_wire::{
    Credential, PeerMessage, Roster, SignedRoster, codec, files::write_secret, message::PointAnswer,
};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Between two attempts to listen.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);
/// Where the newest roster lies, in the run directory.
const ROSTER_FILE: &str = "group-roster";

impl Owner {
    pub(super) fn belongs(&self, credential: &Credential) -> bool {
        let member = self.member.as_ref().and_then(|member| member.roster.member(credential.machine));
        member.is_some_and(|member| credential.generation >= member.generation_min)
    }

    pub(super) fn name(&self, machine: MachineId) -> String {
        let member = self.member.as_ref().and_then(|member| member.roster.member(machine));
        member
            .map(|member| member.host_name.clone())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| machine.to_string())
    }

    /// Takes over a roster that is newer, whoever brought it. `collector`: it may also be of another group.
    pub(super) fn adopt(&mut self, signed: &SignedRoster, collector: bool) {
        if self.member.as_ref().is_some_and(|member| member.signed == *signed) {
            return;
        }
        let opened = signed.open(&self.peers.identity().ca);
        let (roster, membership) = match opened.and_then(|roster| Ok((roster.membership()?, roster))) {
            Ok((membership, roster)) => (roster, membership),
            Err(error) if collector => {
                return tracing::warn!(code = error.code(), %error, "the collector's roster of the group is not believed");
            }
            // Any machine of the vault may say so as often as it likes.
            Err(error) => return tracing::debug!(%error, "a roster that was passed on is not believed"),
        };
        match &self.member {
            Some(member) if member.roster.group == roster.group => {
                if !holds(&roster, member, collector) {
                    return;
                }
                if roster.epoch < member.roster.epoch {
                    tracing::warn!(code = "HW-1499", group = %roster.group, epoch = roster.epoch, before = member.roster.epoch,
                        "the members of the group are those of an earlier time again: was the vault restored? Look at them with `highwater group show`");
                }
            }
            _ if !collector => return,
            Some(_) => self.leave(),
            None => {}
        }
        let timing = roster.timing();
        let is_new = self.member.is_none();
        let newest = self.member.as_ref().map_or(0, |member| member.newest_issued_ms);
        let newest_issued_ms = newest.max(roster.issued_ms);
        let mut machine = match self.member.take() {
            Some(member) => member.machine,
            None => {
                tracing::info!(group = %roster.group, name = roster.name, members = roster.members.len(), "this machine belongs to a group");
                Machine::new(self.own, new_life(), timing)
            }
        };
        machine.set_timing(self.now(), timing);
        self.status.set(Some(self.new_status(&roster)));
        let path = self.options.run_dir.join(ROSTER_FILE);
        let kept =
            codec::encode(&PeerMessage::Roster(signed.clone())).and_then(|bytes| write_secret(&path, &bytes));
        if let Err(error) = kept {
            tracing::debug!(%error, "the roster cannot be kept for the agent's next life");
        }
        self.member = Some(Member { roster, newest_issued_ms, signed: signed.clone(), machine });
        let strangers = std::mem::take(&mut self.strangers);
        for (since, connection) in strangers {
            if self.belongs(&connection.credential) {
                self.welcome(connection);
            } else {
                self.strangers.push_back((since, connection));
            }
        }
        let member = self.member.as_ref();
        self.table.keep(|credential| {
            let known = member.and_then(|member| member.roster.member(credential.machine));
            known.is_some_and(|known| credential.generation >= known.generation_min)
        });
        if !is_new {
            self.table.tell_all(&PeerMessage::Roster(signed.clone()));
        }
        self.input(Input::Membership(membership));
    }

    fn new_status(&self, roster: &Roster) -> GroupStatus {
        let before = self.status.get().filter(|status| status.group == roster.group);
        let (last_kept, last_failed) =
            before.map_or((None, None), |before| (before.last_kept, before.last_failed));
        GroupStatus {
            group: roster.group,
            name: roster.name.clone(),
            epoch: roster.epoch,
            members: roster.members.len(),
            connected: self.table.len(),
            address: roster.member(self.own).and_then(|member| member.address.clone()),
            listening: self.listening.as_ref().map(|_| self.options.listen.to_string()),
            last_kept,
            last_failed,
        }
    }

    /// The machine belongs to no group any more.
    pub(super) fn leave(&mut self) {
        let Some(member) = self.member.take() else { return };
        tracing::info!(group = %member.roster.group, name = member.roster.name, "this machine belongs to its group no longer");
        if let Some((marker, _)) = self.part.take() {
            self.ask(ToEngine::Drop { marker });
        }
        self.table = Table::default();
        self.strangers.clear();
        self.listening = None;
        self.status.set(None);
        self.kept.clear();
        self.said.clear();
        self.withdrawn.clear();
        for request in std::mem::take(&mut self.requests) {
            let cause = "this machine belongs to its group no longer".to_owned();
            self.answer(request.number, PointAnswer::Failed(refusal(cause)));
        }
        let _ = std::fs::remove_file(self.options.run_dir.join(ROSTER_FILE));
    }

    /// What an earlier life knew, until the collector tells what holds now.
    pub(super) fn recall(&mut self) {
        let Ok(bytes) = std::fs::read(self.options.run_dir.join(ROSTER_FILE)) else { return };
        if let Ok(PeerMessage::Roster(signed)) = codec::decode(&bytes) {
            self.adopt(&signed, true);
        }
    }

    /// Listens while there is somebody to listen to.
    pub(super) async fn listen(&mut self) {
        if self.member.is_none() || self.listening.is_some() || Instant::now() < self.listen_at {
            return;
        }
        match peers::bind(self.options.listen).await {
            Ok(listener) => {
                let stop = CancellationToken::new();
                tokio::spawn(peers::listen(self.peers.clone(), listener, stop.clone()));
                self.listening = Some(stop.drop_guard());
                self.listen_failures = 0;
                let listening = self.options.listen.to_string();
                self.status.change(|status| status.listening = Some(listening));
            }
            Err(error) => {
                self.listen_at = Instant::now() + LISTEN_AGAIN;
                self.listen_failures += 1;
                // Its own last listener may not have gone yet; then now and then only.
                if self.listen_failures % 16 != 3 {
                    return;
                }
                tracing::warn!(code = "HW-1459", address = %self.options.listen, %error,
                    "the members of the group cannot call this machine; free the port, or change group.listen in the configuration");
            }
        }
    }
}

/// Whether a roster takes the place of the present one of its group.
///
/// What another member passes on must be later than all that were ever believed: whoever's certificate was revoked may have kept one of before, and a
/// collector's clock may have been set back since. The collector's own word holds, but if it is earlier in both ways: then it has not read
/// the vault lately. An earlier epoch that was signed later is what a restored vault says.
fn holds(roster: &Roster, member: &Member, collector: bool) -> bool {
    if !collector {
        return roster.issued_ms > member.newest_issued_ms;
    }
    roster.epoch >= member.roster.epoch || roster.issued_ms > member.newest_issued_ms
}

fn new_life() -> Life {
    // Bytes 8 to 16 of such an id are random but for two bits.
    let mut nonce = [0; 8];
    nonce.copy_from_slice(&DeltaId::new().as_bytes()[8..]);
    Life { since: now_ms(), nonce: u64::from_le_bytes(nonce) }
}
