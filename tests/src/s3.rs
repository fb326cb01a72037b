//! A real S3 server of our own, in this process, over a directory: `s3s-fs`.

use anyhow::Result;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use locking::Locking;
use s3s::S3;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

mod locking;

pub use locking::Locks;

/// Ends when it is dropped.
pub struct S3Server {
    address: SocketAddr,
    root: PathBuf,
    _runtime: Runtime,
}

impl S3Server {
    /// Who may use it.
    pub const KEY: (&str, &str) = ("highwater", "not-a-secret");

    /// Lets this process and those that it starts use it. Before there are other threads that look at the environment.
    pub fn keys_by_environment() {
        for (name, value) in [("AWS_ACCESS_KEY_ID", Self::KEY.0), ("AWS_SECRET_ACCESS_KEY", Self::KEY.1)] {
            // SAFETY: called at the beginning of the only test of a program.
            unsafe { std::env::set_var(name, value) };
        }
    }

    /// Serves the buckets that are directories of this one.
    pub fn start(root: &Path) -> Result<Self> {
        Self::serve(root, files(root)?)
    }

    /// The same with Object Lock, and what is locked.
    pub fn start_locking(root: &Path) -> Result<(Self, Locks)> {
        let locks = Locks::default();
        let service = Locking { files: files(root)?, root: root.to_owned(), locks: locks.clone() };
        Ok((Self::serve(root, service)?, locks))
    }

    fn serve(root: &Path, buckets: impl S3) -> Result<Self> {
        let mut service = S3ServiceBuilder::new(buckets);
        service.set_auth(SimpleAuth::from_single(Self::KEY.0, Self::KEY.1));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(async move {
            let http = Builder::new(TokioExecutor::new());
            while let Ok((stream, _)) = listener.accept().await {
                // As real servers do: or each answer in two pieces waits 40 ms for an acknowledgement.
                let _ = stream.set_nodelay(true);
                let serving = http.serve_connection(TokioIo::new(stream), service.clone()).into_owned();
                tokio::spawn(async move {
                    let _ = serving.await;
                });
            }
        });
        Ok(Self { address, root: root.to_owned(), _runtime: runtime })
    }

    /// Undoes all deletions of what was locked.
    pub fn undelete(&self) -> Result<()> {
        Ok(locking::undelete(&self.root)?)
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

fn files(root: &Path) -> Result<FileSystem> {
    FileSystem::new(root).map_err(|e| anyhow::anyhow!("{e:?}"))
}
