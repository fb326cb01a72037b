//! Azure's own emulator of Blob Storage, Azurite, as a process on the loopback.

use crate::daemon::Daemon;
use anyhow::{Context, Result, ensure};
use object_store::ClientOptions;
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::{HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::runtime::Builder;

/// Node takes seconds to load it on a busy machine.
const START_MAX: Duration = Duration::from_secs(120);
const SAYS: &str = "successfully listens on ";

/// Ends when it is dropped; it keeps everything in memory.
pub struct Azurite {
    endpoint: String,
    _daemon: Daemon,
}

impl Azurite {
    /// The account that every Azurite has, and its key, which everybody knows.
    pub const ACCOUNT: &str = "devstoreaccount1";
    const KEY: &str =
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

    /// Lets this process and those that it starts use it. Before there are other threads that look at the environment.
    pub fn keys_by_environment() {
        // SAFETY: called at the beginning of the only test of a program.
        unsafe { std::env::set_var("AZURE_STORAGE_ACCOUNT_KEY", Self::KEY) };
    }

    /// Starts one with an empty container; its log is put into a directory.
    pub fn start(dir: &Path, container: &str) -> Result<Self> {
        let mut command = Command::new(program()?);
        command.current_dir(dir).args(["--blobHost", "127.0.0.1", "--blobPort", "0", "--silent"]);
        // It lags behind the versions that clients name, and they are compatible.
        command.args(["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]);
        let mut daemon = Daemon::spawn("azurite", dir, command)?;
        daemon.wait_for(SAYS, START_MAX)?;
        let log = daemon.log();
        let at = log.split_once(SAYS).and_then(|(_, rest)| rest.split_whitespace().next());
        let endpoint = format!("{}/{}", at.context("no address")?, Self::ACCOUNT);
        let azurite = Self { endpoint, _daemon: daemon };
        Builder::new_current_thread().enable_all().build()?.block_on(azurite.make(container))?;
        Ok(azurite)
    }

    /// For `endpoint=`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes a container, which no object store does.
    async fn make(&self, container: &str) -> Result<()> {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = "PUT".parse()?;
        *request.uri_mut() = format!("{}/{container}?restype=container", self.endpoint).parse()?;
        let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(Self::KEY)?);
        AzureAuthorizer::new(&credential, Self::ACCOUNT).try_authorize(&mut request)?;
        let client = ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true))?;
        let status = client.execute(request).await?.status();
        ensure!(status.is_success(), "no container: {status}");
        Ok(())
    }
}

/// On PATH, or where `cargo xtask setup` puts it, beside what is built.
fn program() -> Result<PathBuf> {
    const NAME: &str = "azurite-blob";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let test = std::env::current_exe()?;
    let tools = test.ancestors().map(|dir| dir.join("tools/bin"));
    let mut places = std::env::split_paths(&path).chain(tools).map(|dir| dir.join(NAME));
    places.find(|path| path.is_file()).context("no Azurite: cargo xtask setup --for test")
}
