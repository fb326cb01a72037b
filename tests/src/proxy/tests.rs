use super::*;

/// A server that sends back whatever comes.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                io::copy(&mut from, &mut to).ok();
                stream.shutdown(Shutdown::Both).ok();
            });
        }
    });
    address
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn round_trip(stream: &mut TcpStream, sent: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(sent)?;
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back)?;
    Ok(back)
}

#[test]
fn bytes_pass_unchanged_and_are_counted() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    assert_eq!(round_trip(&mut stream, b"hello").unwrap(), b"hello");
    assert_eq!((proxy.passed_bytes(Way::Up), proxy.passed_bytes(Way::Down)), (5, 5));
    assert_eq!(proxy.connections(), 1);
}

#[test]
fn a_cut_ends_connections_and_new_ones_work() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    round_trip(&mut stream, b"x").unwrap();
    proxy.cut();
    assert!(round_trip(&mut stream, b"x").is_err());
    assert_eq!(round_trip(&mut connect(&proxy), b"y").unwrap(), b"y");
}

#[test]
fn a_severed_link_refuses_until_healed() {
    let proxy = Proxy::to(echo()).unwrap();
    proxy.sever();
    assert!(round_trip(&mut connect(&proxy), b"x").is_err());
    proxy.heal();
    assert_eq!(round_trip(&mut connect(&proxy), b"y").unwrap(), b"y");
}

#[test]
fn exactly_one_bit_is_flipped_where_asked() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    round_trip(&mut stream, b"ab").unwrap();
    proxy.flip_bit_after(Way::Down, 3);
    assert_eq!(round_trip(&mut stream, &[0; 8]).unwrap(), [0, 0, 0, 0x10, 0, 0, 0, 0]);
    assert_eq!(round_trip(&mut stream, &[0; 8]).unwrap(), [0; 8]);
}

#[test]
fn a_cut_can_fall_inside_a_message() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    proxy.cut_after(Way::Up, 3);
    stream.write_all(b"abcdef").unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).ok();
    assert!(back.len() <= 3, "{back:?}");
    assert_eq!(round_trip(&mut connect(&proxy), b"y").unwrap(), b"y");
}

#[test]
fn a_rate_and_a_delay_take_time() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    proxy.set_rate(20_000);
    let started = Instant::now();
    round_trip(&mut stream, &[1; 4000]).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    proxy.heal();
    proxy.set_delay(Duration::from_millis(50));
    let started = Instant::now();
    round_trip(&mut stream, b"x").unwrap();
    assert!(started.elapsed() >= Duration::from_millis(100), "{:?}", started.elapsed());
}

#[test]
fn a_stalled_link_passes_nothing_until_healed() {
    let proxy = Proxy::to(echo()).unwrap();
    let mut stream = connect(&proxy);
    proxy.stall();
    stream.write_all(b"z").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut back = [0];
    assert!(stream.read_exact(&mut back).is_err());
    proxy.heal();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"z");
}
