//! Accepting connections, a bounded number at a time.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until shutdown, with at most `places` connections that hold their place; a newcomer beyond that takes the place
/// of the oldest. After a shutdown, connections have `drain_max` to end by themselves.
pub async fn accept<F, Fut>(
    listener: TcpListener,
    places: usize,
    shutdown: CancellationToken,
    drain_max: Duration,
    handle: F,
) where
    F: Fn(TcpStream, SocketAddr, Arc<Place>) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut held = Held { places: Arc::new(Semaphore::new(places)), holders: VecDeque::new() };
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(ended) = running.join_next(), if !running.is_empty() => report(ended),
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Small messages wait for answers.
                    let _ = stream.set_nodelay(true);
                    let place = held.take().await;
                    running.spawn(handle(stream, peer, place));
                }
                Err(error) => {
                    // Out of descriptors, mostly: wait for some to be closed.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    let ended = timeout(drain_max, async {
        while let Some(ended) = running.join_next().await {
            report(ended);
        }
    });
    if ended.await.is_err() {
        tracing::warn!(connections = running.len(), "connections do not end; they are cut");
        running.shutdown().await;
    }
}

/// A place among those who have not shown who they are. Given back when dropped.
pub struct Place {
    /// Cancelled when a newcomer is to have it.
    pub evicted: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

/// The places of a port, and who holds them, oldest first.
struct Held {
    places: Arc<Semaphore>,
    holders: VecDeque<Weak<Place>>,
}

impl Held {
    async fn take(&mut self) -> Arc<Place> {
        self.holders.retain(|place| place.strong_count() > 0);
        if self.places.available_permits() == 0
            && let Some(oldest) = self.holders.pop_front().and_then(|place| place.upgrade())
        {
            oldest.evicted.cancel();
        }
        let permit = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let place = Arc::new(Place { evicted: CancellationToken::new(), _permit: permit });
        self.holders.push_back(Arc::downgrade(&place));
        place
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection failed by a defect of this program");
    }
}
