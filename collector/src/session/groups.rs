//! A session's part in groups: what the machine is to hear, and what it says.

use super::Owner;
use super::state::Word;
use crate::CollectorError;
use crate::groups::{Line, Order, markers};
use highwater_delta::Code;
use highwater_wire::message::CollectorMessage;
use std::future::pending;
use tokio::io::AsyncWrite;
use tracing::Level;

/// The next thing to say, if the machine is to hear of groups. Cancellation-safe.
pub(super) async fn next(line: &mut Option<Line>) -> Order {
    match line {
        Some(line) => line.next().await,
        None => pending().await,
    }
}

impl<W: AsyncWrite + Unpin> Owner<'_, W> {
    pub(super) async fn order(&mut self, order: Order) -> Result<(), CollectorError> {
        let message = match order {
            Order::Group(roster) => CollectorMessage::Group(roster.map(|roster| (*roster).clone())),
            Order::Wanted { request, group, application } => {
                CollectorMessage::PointWanted { request, group, application }
            }
        };
        self.out.send(&message).await
    }

    /// What cannot be so is passed over, and so is what is said beyond the machine's allowance, or what the vault does not take: it is counted and
    /// logged, and the session goes on. What its last markers were the machine says again in its next one.
    pub(super) async fn word(&mut self, word: Word) -> Result<(), CollectorError> {
        let (shared, machine) = (self.shared, self.machine);
        let Err(error) = self.take(word).await? else { return Ok(()) };
        shared.metrics.word_passed_over(error.code());
        if let Some(left_out) = shared.say_of_machine(machine, Level::WARN) {
            tracing::warn!(%machine, code = %Code(error.code()), action = error.action(), %error, left_out, "a word on groups is passed over");
        }
        Ok(())
    }

    /// Fails where the session has to end; what is answered says what became of the word.
    async fn take(&mut self, word: Word) -> Result<Result<(), CollectorError>, CollectorError> {
        let (shared, machine) = (self.shared, self.machine);
        // Whoever asked waits for an answer, and it costs nothing.
        if !matches!(word, Word::Answer(..))
            && let Err(error) = shared.allow_word(machine)
        {
            return Ok(Err(error));
        }
        Ok(match word {
            Word::Kept(kept) => self.out.alive(markers::kept(shared, self.writer.state(), kept)).await?,
            Word::Withdrawn(group, marker) => {
                if let Err(error) = shared.allow_withdrawal(machine) {
                    return Ok(Err(error));
                }
                self.out.alive(markers::withdrawn(shared, machine, group, marker)).await?
            }
            Word::Reachable(reachable) => {
                let line = self.line.as_ref();
                let known = line.is_none_or(|line| line.reachable(reachable.host.as_deref(), reachable.port));
                if known { Ok(()) } else { Err(CollectorError::Address(machine)) }
            }
            Word::Ended(group, marker, kind, failed) => {
                markers::ended(shared, machine, group, marker, kind, failed).await;
                Ok(())
            }
            Word::Answer(request, answer) => {
                if let Some(line) = &mut self.line {
                    line.answer(request, answer);
                }
                Ok(())
            }
        })
    }
}
