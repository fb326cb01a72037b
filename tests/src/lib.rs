//! The harness under the end-to-end tests: devices, load, processes, networks that fail, and comparison.
//!
//! Everything made here is unmade by its destructor, on panic too, in the reverse order of its making. A test
//! starts with [`Arena::enter`], which runs one test at a time on the machine's devices and, when it goes, checks that
//! nothing was left: no loop device, zram, mount, pinned object or process.

pub mod arena;
pub mod azurite;
pub mod bpf_map;
pub mod buffer;
pub mod causal;
pub mod census;
pub mod chain;
pub mod churn;
pub mod command;
pub mod compare;
pub mod daemon;
pub mod device;
pub mod fio;
pub mod fleet;
pub mod free_space;
pub mod freeze;
pub mod hot_pages;
pub mod lan;
pub mod load;
pub mod mariadb;
pub mod memory_limit;
pub mod mount;
pub mod other_site;
pub mod postgres;
pub mod promises;
pub mod proxy;
pub mod random;
pub mod raw;
pub mod redis;
pub mod s3;
pub mod scrape;
pub mod sector;
pub mod shipped_hook;
pub mod site;
pub mod sql;
pub mod sqlite;
pub mod synced;
pub mod twin;
pub mod vm;

pub use arena::Arena;
pub use azurite::Azurite;
pub use bpf_map::BpfMap;
pub use causal::Causal;
pub use census::Census;
pub use chain::{Chains, Plan};
pub use churn::Churn;
pub use compare::{FrozenCopy, compare_devices};
pub use daemon::Daemon;
pub use device::{Backing, LoopDisk, Zram};
pub use fio::{Fio, FioKind};
pub use fleet::{Fleet, FleetOptions};
pub use freeze::Freeze;
pub use hot_pages::HotPages;
pub use lan::Lan;
pub use load::Load;
pub use mariadb::MariaDb;
pub use memory_limit::MemoryLimit;
pub use mount::{FileSystem, Mounted};
pub use other_site::OtherSite;
pub use postgres::Postgres;
pub use promises::{Promises, Writer, Writers};
pub use proxy::Proxy;
pub use random::Random;
pub use redis::Redis;
pub use s3::S3Server;
pub use scrape::{metric, scrape};
pub use sector::{Sectors, Wrong};
pub use shipped_hook::ShippedHook;
pub use site::{Site, SiteOptions, write_all_within};
pub use sqlite::Sqlite;
pub use twin::Twin;
