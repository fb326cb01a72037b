use super::*;
use crate::control::{render::tests::report, status::StatusReport};

fn desk() -> (Desk, mpsc::Receiver<Ask>, Arc<Board>) {
    let (asks, engine) = mpsc::channel(4);
    let board = Arc::new(Board::default());
    (Desk::new(asks, board.clone(), Arc::new(Throttle::new(None))), engine, board)
}

fn as_of(response: Response) -> Option<u64> {
    match response {
        Response::Status(status) => Some(status.as_of_ms),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_busy_engine_does_not_keep_operators_waiting() {
    let (desk, mut engine, board) = desk();
    board.put(report());
    // Far more than the queue takes.
    for _ in 0..20 {
        assert_eq!(as_of(desk.answer(Request::Status).await), Some(report().as_of_ms));
    }
    let limit = Bandwidth(Some(1 << 20));
    let done = desk.answer(Request::SetBandwidth { bandwidth: limit }).await;
    assert!(matches!(done, Response::Done { .. }));
    let Response::Status(status) = desk.answer(Request::Status).await else { panic!("no status") };
    assert_eq!(status.bandwidth, limit);
    // One question waits for the engine, and its answer is nobody's any more; the next is the engine's own again.
    let (work, answer) = engine.try_recv().unwrap();
    assert_eq!(work, Work::Status);
    assert!(engine.try_recv().is_err());
    let _ = answer.send(refused("late"));
    let own = StatusReport { as_of_ms: 77, ..report() };
    let serve = async {
        let (_, answer) = engine.recv().await.unwrap();
        let _ = answer.send(Response::Status(Box::new(own)));
    };
    let (said, ()) = tokio::join!(desk.answer(Request::Status), serve);
    assert_eq!(as_of(said), Some(77));
}

#[tokio::test]
async fn an_engine_that_is_gone_is_told() {
    let (desk, engine, _) = desk();
    drop(engine);
    for request in [Request::Status, Request::Point { application: false }] {
        let Response::Error(error) = desk.answer(request).await else { panic!("answered") };
        assert!(error.cause.contains("stopping"), "{error}");
    }
}
