//! The control socket, with a stand-in for the engine.

use highwater_agent::{
    control::{
        ControlError, Desk, REQUEST_BYTES_MAX, Request, Response, SOCKET_NAME, Work, bind, call, serve,
    },
    error::OperatorError,
    throttle::Throttle,
};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(5);

/// Answers each request with its own debug form.
fn start(run_dir: &Path) -> tokio::task::JoinHandle<()> {
    let listener = bind(run_dir).expect("free");
    let (asks, mut requests) = mpsc::channel(4);
    let desk = Desk::new(asks, Arc::default(), Arc::new(Throttle::new(None)));
    tokio::spawn(serve(listener, desk));
    tokio::spawn(async move {
        while let Some((request, answer)) = requests.recv().await {
            let response = match request {
                Work::Unprotect { .. } => {
                    Response::Error(OperatorError { code: 1450, cause: "no".into(), action: "Do.".into() })
                }
                // The engine forgets to answer.
                Work::Resync { .. } => continue,
                other => Response::Done { message: format!("{other:?}"), point: None },
            };
            let _ = answer.send(response);
        }
    })
}

fn ask(run_dir: &Path, request: Request) -> Result<Response, ControlError> {
    tokio::task::block_in_place(|| call(run_dir, &request, PATIENCE))
}

fn raw(run_dir: &Path, bytes: &[u8]) -> String {
    tokio::task::block_in_place(|| {
        let mut stream = UnixStream::connect(run_dir.join(SOCKET_NAME)).expect("listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("can be set");
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut line = String::new();
        let _ = BufReader::new(stream).read_line(&mut line);
        line
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asks_and_answers() {
    let dir = tempfile::tempdir().expect("a directory");
    let run_dir = dir.path().join("run");
    assert!(matches!(ask(&run_dir, Request::Status), Err(ControlError::NotRunning { .. })));
    let engine = start(&run_dir);
    let mode = std::fs::metadata(run_dir.join(SOCKET_NAME)).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let request = Request::Protect { path: "/dev/x".into(), name: Some("data".into()) };
    let work = Work::Protect { path: "/dev/x".into(), name: Some("data".into()) };
    let expected = Response::Done { message: format!("{work:?}"), point: None };
    assert_eq!(ask(&run_dir, request).expect("answers"), expected);
    let refused = ask(&run_dir, Request::Unprotect { disk: "x".into() }).expect("answers");
    assert!(matches!(refused, Response::Error(OperatorError { code: 1450, .. })));
    let forgotten = ask(&run_dir, Request::ResyncNow { disk: "x".into() }).expect("answers");
    assert!(matches!(forgotten, Response::Error(_)));
    assert!(matches!(bind(&run_dir), Err(ControlError::AlreadyRunning { .. })));
    engine.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_and_bounded() {
    let dir = tempfile::tempdir().expect("a directory");
    let _engine = start(dir.path());
    for bad in
        ["{}\n", "garbage\n", "{\"request\":\"nonsense\"}\n", "{\"request\":\"point\",\"x\":1}\n", "no end"]
    {
        assert!(raw(dir.path(), bad.as_bytes()).contains("\"response\":\"error\""), "{bad:?}");
    }
    let long = vec![b' '; REQUEST_BYTES_MAX + 10];
    assert!(raw(dir.path(), &long).contains("too long"));
    assert!(raw(dir.path(), b"\xff\xfe\n").contains("error"));
    assert_eq!(raw(dir.path(), b""), "");
    assert!(ask(dir.path(), Request::Status).is_ok(), "still serves");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_agents_socket_is_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    drop(std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET_NAME)).expect("free"));
    let _engine = start(dir.path());
    assert!(ask(dir.path(), Request::Point { application: false }).is_ok());
}
