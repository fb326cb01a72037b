use super::*;
use std::{net::SocketAddr, time::Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
const PATIENCE: Duration = Duration::from_secs(30);

async fn serve(limits: Limits) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
    let metrics = Metrics { content_type: "text/plain", render: Arc::new(|| "up 1\n".to_owned()) };
    tokio::spawn(serve_metrics(listener, metrics, limits, shutdown.clone()));
    (address, shutdown)
}

async fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Until the other side closes; how long that took.
async fn closed(mut stream: TcpStream) -> Duration {
    let began = Instant::now();
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it is never closed");
    began.elapsed()
}

#[tokio::test]
async fn only_metrics_are_told() {
    let (address, shutdown) = serve(Limits::default()).await;
    let text = ask(address, REQUEST).await;
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("up 1\n"), "{text}");
    for other in ["GET /", "POST /metrics", "GET /metrics/../etc"] {
        let request = format!("{other} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(ask(address, request.as_bytes()).await.starts_with("HTTP/1.1 404"), "{other}");
    }
    shutdown.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(TcpStream::connect(address).await.is_err(), "it listens after the shutdown");
}

/// Whoever only holds connections is cut off by those who ask, and never keeps more than the places.
#[tokio::test]
async fn a_thousand_idle_connections_keep_nobody_out() {
    let (address, _shutdown) = serve(Limits { places: 4, ..Limits::default() }).await;
    let mut idle = Vec::new();
    for number in 0..1000 {
        idle.push(TcpStream::connect(address).await.unwrap());
        if number % 100 == 99 {
            let text = timeout(Duration::from_secs(5), ask(address, REQUEST)).await.expect("kept out");
            assert!(text.ends_with("up 1\n"), "{text}");
        }
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let open = idle.iter().filter(|stream| stream.try_read(&mut [0]).is_err()).count();
    assert!(open <= 4, "{open} idle connections are held open");
}

/// A header that trickles in, and a connection that keeps asking, both end in time.
#[tokio::test]
async fn slow_clients_are_cut_off() {
    let limits =
        Limits { places: 4, header: Duration::from_millis(300), connection: Duration::from_millis(1500) };
    let (address, _shutdown) = serve(limits).await;
    let mut loris = TcpStream::connect(address).await.unwrap();
    let began = Instant::now();
    for byte in REQUEST.iter().cycle() {
        if loris.write_all(&[*byte]).await.is_err() || loris.try_read(&mut [0]).is_ok() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "a slow header is waited for");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let silent = TcpStream::connect(address).await.unwrap();
    assert!(closed(silent).await < Duration::from_secs(5));
    // It never reads its answers: writing to it must not last for ever either.
    let mut busy = TcpStream::connect(address).await.unwrap();
    let began = Instant::now();
    while busy.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.is_ok() {
        assert!(began.elapsed() < PATIENCE, "a busy connection is kept for ever");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(ask(address, REQUEST).await.ends_with("up 1\n"));
}
