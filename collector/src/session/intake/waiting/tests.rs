use super::*;
use crate::cache::spool::Appended;
use crate::metrics::CacheMetrics;
use highwater_delta::CommitKind;
use highwater_wire::message::DeltaCommit;
use proptest::prelude::*;
use tokio::sync::Semaphore;

#[derive(Clone, Debug)]
enum Step {
    Message,
    Chunk,
    Pop,
    BeginMoving,
    /// So many of those that are being moved fit.
    EndMoving(usize),
    End,
}

/// What must come out: the n-th chunk, or the n-th message.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Message(u64),
    Chunk(u64),
    End,
}

fn number(chunk: &[u8]) -> u64 {
    u64::from_le_bytes(chunk.try_into().unwrap())
}

struct Model {
    waiting: Waiting,
    cache: Cache,
    permits: Arc<Semaphore>,
    expected: VecDeque<Expected>,
    moving: Vec<Chunk>,
    next: u64,
    delta: DeltaId,
}

impl Model {
    fn step(&mut self, step: &Step) {
        self.next += 1;
        let n = self.next;
        match step {
            Step::Message => {
                let permit = self.permits.clone().try_acquire_owned().unwrap();
                let commit = DeltaCommit { delta: self.delta, chunks: n, kind: CommitKind::Partial };
                self.waiting.push(Incoming::Message(AgentMessage::DeltaCommit(commit), permit));
                self.expected.push_back(Expected::Message(n));
            }
            Step::Chunk => {
                let bytes = Bytes::copy_from_slice(&n.to_le_bytes());
                self.waiting.push(Incoming::Chunk(self.delta, bytes));
                self.expected.push_back(Expected::Chunk(n));
            }
            Step::Pop => {
                self.pop();
            }
            Step::BeginMoving if self.moving.is_empty() => self.moving = self.waiting.begin_moving(),
            Step::EndMoving(fit) if !self.moving.is_empty() => {
                let spool = self.waiting.spool(&self.cache).unwrap().unwrap();
                let rest = self.moving.split_off((*fit).min(self.moving.len()));
                for chunk in &self.moving {
                    assert_eq!(spool.append(chunk.delta, &chunk.bytes).unwrap(), Appended::Yes);
                }
                spool.sync().unwrap();
                self.waiting.end_moving(self.moving.len(), rest);
                self.moving.clear();
            }
            Step::BeginMoving | Step::EndMoving(_) => {}
            Step::End => {
                self.waiting.push(Incoming::End);
                // Chunks that no message follows can never be committed; those being moved are found when they are back.
                self.expected.push_back(Expected::End);
            }
        }
    }

    /// Whether anything came.
    fn pop(&mut self) -> bool {
        let got = match self.waiting.pop() {
            Popped::Nothing => return false,
            Popped::Spooled(spool) => {
                let (delta, chunk) = spool.take().unwrap();
                self.waiting.read_back();
                assert_eq!(delta, self.delta);
                Expected::Chunk(number(&chunk))
            }
            Popped::Incoming(Incoming::Chunk(_, chunk)) => Expected::Chunk(number(&chunk)),
            Popped::Incoming(Incoming::Message(AgentMessage::DeltaCommit(commit), _)) => {
                Expected::Message(commit.chunks)
            }
            Popped::Incoming(_) => Expected::End,
        };
        let mut expected = self.expected.pop_front().unwrap();
        // An end passes by what nobody will commit.
        while got == Expected::End && matches!(expected, Expected::Chunk(_)) {
            expected = self.expected.pop_front().unwrap();
        }
        assert_eq!(got, expected);
        true
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => Just(Step::Message),
        6 => Just(Step::Chunk),
        4 => Just(Step::Pop),
        2 => Just(Step::BeginMoving),
        2 => (0..6_usize).prop_map(Step::EndMoving),
    ];
    proptest::collection::vec(step, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn everything_comes_out_in_the_order_it_came(steps in steps(), end in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model {
            waiting: Waiting::default(),
            cache: Cache::open(dir.path(), 1 << 30, &CacheMetrics::default()).unwrap(),
            permits: Arc::new(Semaphore::new(1000)),
            expected: VecDeque::new(),
            moving: Vec::new(),
            next: 0,
            delta: DeltaId::new(),
        };
        for step in &steps {
            model.step(step);
        }
        if end {
            model.step(&Step::End);
        }
        while model.pop() {}
        model.step(&Step::EndMoving(usize::MAX));
        while model.pop() {}
        prop_assert!(model.expected.is_empty(), "{:?}", model.expected);
        prop_assert_eq!(model.waiting.frames, 0);
    }
}
