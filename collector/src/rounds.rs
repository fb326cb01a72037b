//! What is done again and again beside sessions until the collector ends.

use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Something that is done in rounds.
pub trait Rounds: Send {
    /// Does one; answers how long it is until the next. It may be dropped at any moment, and must be as safe under that as after a kill.
    fn round(&mut self) -> impl Future<Output = Duration> + Send;
}

/// Waits, does a round, waits, and so on. A shutdown ends it at once, in the middle of a round too.
pub async fn run(shutdown: &CancellationToken, first: Duration, rounds: &mut impl Rounds) {
    let mut wait = first;
    loop {
        let next = async {
            tokio::time::sleep(wait).await;
            rounds.round().await
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            after = next => wait = after,
        }
    }
}
