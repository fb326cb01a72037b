//! The order of what waits: pure, but for the clock.

use super::super::reader::Incoming;
use super::LAG;
use crate::CollectorError;
use crate::cache::Cache;
use crate::cache::spool::Spool;
use bytes::Bytes;
use highwater_delta::DeltaId;
use highwater_wire::message::AgentMessage;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

#[derive(Default)]
pub(super) struct Waiting {
    items: VecDeque<Item>,
    /// Frames among them that are in memory.
    pub(super) frames: usize,
    /// Number of the last chunk that came, and of which delta.
    counted: Option<(DeltaId, u64)>,
    /// The chunk from memory that the owner works on, until it is acknowledged.
    pub(super) in_hand: Option<(DeltaId, u64, usize)>,
    spool: Option<Arc<Spool>>,
    /// Ends the session before anything else.
    pub(super) failed: Option<CollectorError>,
}

enum Item {
    Message(AgentMessage, OwnedSemaphorePermit),
    Chunk(Chunk),
    /// So many of the spool's.
    Spooled(u64),
    /// Some are just being put there.
    Moving,
    End,
    Failed(CollectorError),
}

pub(super) struct Chunk {
    pub(super) delta: DeltaId,
    pub(super) number: u64,
    pub(super) bytes: Bytes,
    pub(super) since: Instant,
}

pub(super) enum Popped {
    Incoming(Incoming),
    Spooled(Arc<Spool>),
    Nothing,
}

impl Waiting {
    pub(super) fn push(&mut self, incoming: Incoming) {
        if matches!(incoming, Incoming::End | Incoming::Failed(_)) {
            self.drop_uncommitted();
        }
        self.frames += 1;
        let item = match incoming {
            Incoming::Message(message, permit) => {
                if let AgentMessage::DeltaBegin(delta) = &message {
                    self.counted = Some((*delta, 0));
                }
                Item::Message(message, permit)
            }
            Incoming::Chunk(delta, bytes) => {
                let number = self.counted.filter(|(of, _)| *of == delta).map_or(0, |(_, number)| number) + 1;
                self.counted = Some((delta, number));
                Item::Chunk(Chunk { delta, number, bytes, since: Instant::now() })
            }
            Incoming::End => Item::End,
            Incoming::Failed(error) => Item::Failed(error),
        };
        self.items.push_back(item);
    }

    /// Nothing more comes: chunks behind the last message are of a delta that will never be committed.
    fn drop_uncommitted(&mut self) {
        while let Some(item) = self.items.pop_back() {
            match item {
                Item::Chunk(_) => self.frames -= 1,
                // One of them may be with the owner already, who will find no commit either.
                Item::Spooled(_) => {}
                other => {
                    self.items.push_back(other);
                    return;
                }
            }
        }
    }

    pub(super) fn pop(&mut self) -> Popped {
        if let Some(error) = self.failed.take() {
            return Popped::Incoming(Incoming::Failed(error));
        }
        let incoming = match self.items.front() {
            None | Some(Item::Moving) => return Popped::Nothing,
            Some(Item::Spooled(_)) => {
                return self.spool.clone().map_or(Popped::Nothing, Popped::Spooled);
            }
            Some(_) => match self.items.pop_front() {
                Some(Item::Message(message, permit)) => Incoming::Message(message, permit),
                Some(Item::Chunk(chunk)) => {
                    self.in_hand = Some((chunk.delta, chunk.number, chunk.bytes.len()));
                    Incoming::Chunk(chunk.delta, chunk.bytes)
                }
                Some(Item::Failed(error)) => Incoming::Failed(error),
                _ => Incoming::End,
            },
        };
        self.frames -= 1;
        Popped::Incoming(incoming)
    }

    /// One of the spool's was read.
    pub(super) fn read_back(&mut self) {
        if let Some(Item::Spooled(records)) = self.items.front_mut() {
            *records -= 1;
            if *records == 0 {
                self.items.pop_front();
            }
        }
    }

    /// When the first chunk in memory is to go into the spool: at once behind others that are there.
    pub(super) fn due(&self) -> Option<Instant> {
        let spooling = self.items.iter().any(|item| matches!(item, Item::Spooled(_)));
        let first = self.items.iter().find_map(|item| match item {
            Item::Chunk(chunk) => Some(chunk.since),
            _ => None,
        });
        first.map(|since| if spooling { since } else { since + LAG })
    }

    /// The spool, a new one where there is none; none where it failed and something of it is still to be read.
    pub(super) fn spool(&mut self, cache: &Cache) -> Result<Option<Arc<Spool>>, CollectorError> {
        let in_use = self.items.iter().any(|item| matches!(item, Item::Spooled(_)));
        if self.spool.as_ref().is_some_and(|spool| spool.is_broken()) {
            if in_use {
                return Ok(None);
            }
            self.spool = None;
        }
        if self.spool.is_none() {
            self.spool = Some(Arc::new(cache.spool()?));
        }
        Ok(self.spool.clone())
    }

    /// Takes the first chunks that follow each other; they are back before anything behind them is looked at.
    pub(super) fn begin_moving(&mut self) -> Vec<Chunk> {
        let Some(first) = self.items.iter().position(|item| matches!(item, Item::Chunk(_))) else {
            return Vec::new();
        };
        let mut behind = self.items.split_off(first);
        let mut chunks = Vec::new();
        while let Some(Item::Chunk(_)) = behind.front() {
            if let Some(Item::Chunk(chunk)) = behind.pop_front() {
                chunks.push(chunk);
            }
        }
        self.items.push_back(Item::Moving);
        self.items.append(&mut behind);
        chunks
    }

    /// So many are in the spool; the rest is still in memory.
    pub(super) fn end_moving(&mut self, spooled: usize, rest: Vec<Chunk>) {
        let Some(at) = self.items.iter().position(|item| matches!(item, Item::Moving)) else { return };
        let mut behind = self.items.split_off(at);
        behind.pop_front();
        self.frames -= spooled;
        match self.items.back_mut() {
            Some(Item::Spooled(records)) => *records += spooled as u64,
            _ if spooled > 0 => self.items.push_back(Item::Spooled(spooled as u64)),
            _ => {}
        }
        self.items.extend(rest.into_iter().map(Item::Chunk));
        self.items.append(&mut behind);
    }
}

#[cfg(test)]
mod tests;
