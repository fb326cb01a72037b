//! A hand in another machine: it runs commands there, and writes where it is told to. The program `highwater-hand` is its far end.
//!
//! Over TCP, one JSON object a line: `{"run": [ARG, …]}` is answered by `{"code", "out", "err"}`, `{"write": PATH, "offset", "value", "durable"}`
//! by `{}` when it is done, a failure by `{"error"}`. It obeys everybody: for networks that a test has made for itself.

use crate::causal::Entries;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::FileExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Where it listens.
pub const PORT: u16 = 7000;
/// For one answer; a machine that is frozen or starts again takes its time.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Until one that was lost is there again.
const RETURN_MAX: Duration = Duration::from_secs(180);

/// A connection to one.
pub struct Hand {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

impl Hand {
    /// Connects, and waits for it as long as it may take a machine to start.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let until = Instant::now() + RETURN_MAX;
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(ANSWER_MAX))?;
                    stream.set_nodelay(true)?;
                    return Ok(Self { address, stream: BufReader::new(stream) });
                }
                Err(error) => ensure!(Instant::now() < until, "no hand at {address}: {error}"),
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Runs a command to its end and returns its standard output, trimmed.
    pub fn run(&mut self, args: &[&str]) -> Result<String> {
        let said = self.ask(&json!({ "run": args }))?;
        let text = |name: &str| said[name].as_str().unwrap_or_default().trim().to_owned();
        ensure!(said["code"] == 0, "{args:?} at {}: {} {}", self.address, text("out"), text("err"));
        Ok(text("out"))
    }

    fn ask(&mut self, order: &Value) -> Result<Value> {
        self.stream.get_mut().write_all(format!("{order}\n").as_bytes())?;
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "the hand at {} let go", self.address);
        let said: Value = serde_json::from_str(&line)?;
        match said["error"].as_str() {
            Some(error) => bail!("{}: {error}", self.address),
            None => Ok(said),
        }
    }
}

/// One machine's part of a chain, written by its hand. Each write is durable when it is done, and done again if the machine was lost before it
/// said so: whatever is cut off from there holds all that came before.
pub struct HandEntries {
    path: String,
    address: SocketAddr,
    hand: Option<Hand>,
}

impl HandEntries {
    /// Of a file in the machine at this address.
    #[must_use]
    pub fn new(address: SocketAddr, path: &str) -> Self {
        Self { path: path.to_owned(), address, hand: None }
    }
}

impl Entries for HandEntries {
    fn write(&mut self, entry: u64, value: u64, _durable: bool) -> Result<()> {
        let offset = entry * crate::causal::ENTRY_BYTES;
        let order = json!({ "write": self.path, "offset": offset, "value": value, "durable": true });
        let until = Instant::now() + RETURN_MAX;
        loop {
            let mut hand = match self.hand.take() {
                Some(hand) => hand,
                None => Hand::connect(self.address)?,
            };
            match hand.ask(&order) {
                Ok(_) => {
                    self.hand = Some(hand);
                    return Ok(());
                }
                // Lost; a machine that starts has no file system yet.
                Err(error) => ensure!(Instant::now() < until, "{error:#}"),
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Obeys until the process ends.
pub fn serve() -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    println!("the hand is there");
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || obey(stream).map_err(|error| eprintln!("{error:#}")));
    }
    Ok(())
}

fn obey(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let mut files = HashMap::new();
    for line in BufReader::new(stream).lines() {
        let order: Value = serde_json::from_str(&line?)?;
        let done = match order["run"].as_array() {
            Some(args) => run(args),
            None => write(&mut files, &order),
        };
        let said = done.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        answers.write_all(format!("{said}\n").as_bytes())?;
    }
    Ok(())
}

fn run(args: &[Value]) -> Result<Value> {
    let mut args = args.iter().filter_map(Value::as_str);
    let out = Command::new(args.next().context("no program")?).args(args).stdin(Stdio::null()).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(json!({ "code": out.status.code(), "out": text(&out.stdout), "err": text(&out.stderr) }))
}

fn write(files: &mut HashMap<String, File>, order: &Value) -> Result<Value> {
    let path = order["write"].as_str().context("no order")?;
    if !files.contains_key(path) {
        // Not made anew: one that is not there tells that its file system is not.
        files.insert(path.to_owned(), OpenOptions::new().write(true).open(path)?);
    }
    let number = |name: &str| order[name].as_u64().with_context(|| format!("no {name}"));
    files[path].write_all_at(&number("value")?.to_le_bytes(), number("offset")?)?;
    if order["durable"] == true {
        files[path].sync_data()?;
    }
    Ok(json!({}))
}
