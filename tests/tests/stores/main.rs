//! What every kind of store must do for a vault, and what a vault does with one that misbehaves.

mod conform;
mod misfortune;

use anyhow::{Context, Result};
use highwater_tests::{Azurite, OtherSite, S3Server};
use highwater_vault::{Location, Store};
use object_store::memory::InMemory;
use std::fs;
use std::sync::Arc;

/// So many seeds for each kind of store, or the one that is named, to see its misfortune again.
const SEED_VARIABLE: &str = "HIGHWATER_SEED";

/// One test: it changes the environment.
#[test]
fn every_store_conforms_and_its_failures_lose_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let profiles = dir.path().join("credentials");
    let (id, secret) = S3Server::KEY;
    fs::write(&profiles, format!("[dr]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))?;
    // SAFETY: no other thread of this program looks at the environment.
    unsafe {
        std::env::set_var("AWS_SHARED_CREDENTIALS_FILE", &profiles);
        // Not these: the profile is named.
        std::env::set_var("AWS_ACCESS_KEY_ID", "somebody");
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "else");
        std::env::set_var("AWS_SESSION_TOKEN", "at another place");
    }
    Azurite::keys_by_environment();
    let buckets = dir.path().join("buckets");
    fs::create_dir_all(buckets.join("vaults"))?;
    let server = S3Server::start(&buckets)?;
    let azurite = Azurite::start(dir.path(), "vaults")?;
    let s3 = format!("region=us-east-1&endpoint=http://{}&profile=dr", server.address());
    let azure = format!("account={}&endpoint={}", Azurite::ACCOUNT, azurite.endpoint());
    let other = OtherSite::start(&dir.path().join("other"))?;
    // One whose own vault lies at the other.
    let third = OtherSite::start_at(&dir.path().join("third"), &other.location(other.ingest(), "/third"))?;
    let relay = |prefix: &str| other.location(other.ingest(), prefix);
    let directory = dir.path().join("vault").to_string_lossy().into_owned();
    for text in [
        "memory".to_owned(),
        directory.clone(),
        format!("s3://vaults/site/a?{s3}"),
        format!("s3://vaults?{s3}"),
        format!("az://vaults/site/a?{azure}"),
        format!("az://vaults?{azure}"),
        relay("/site/a"),
        relay(""),
        third.location(third.ingest(), ""),
    ] {
        println!("{text}");
        let open = opener(&text)?;
        runtime()?.block_on(conform::conforms(&open)).with_context(|| text)?;
    }
    let identity = relay("");
    let identity = identity.split_once('?').context("it has an identity")?.1.to_owned();
    let kinds = [
        (16, "memory".to_owned(), ""),
        (6, directory, ""),
        (4, "s3://vaults/faulty".to_owned(), s3.as_str()),
        (2, "az://vaults/faulty".to_owned(), azure.as_str()),
        (2, format!("highwater://{}/faulty", other.ingest()), identity.as_str()),
    ];
    let named = std::env::var(SEED_VARIABLE).ok().map(|seed| seed.parse()).transpose()?;
    let first = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    for (count, place, query) in kinds {
        for n in 0..named.map_or(count, |_| 1) {
            let seed = named.unwrap_or(first + n);
            let text = match query {
                "" if place == "memory" => place.clone(),
                "" => format!("{place}-{seed}"),
                query => format!("{place}-{seed}?{query}"),
            };
            println!("{SEED_VARIABLE}={seed} {text}");
            let open = opener(&text)?;
            let survived = runtime()?.block_on(misfortune::survives(&open, seed));
            survived.with_context(|| format!("{SEED_VARIABLE}={seed} {text}"))?;
        }
    }
    Ok(())
}

/// Opens the same store again and again: that of a location, or one in memory.
fn opener(text: &str) -> Result<Box<dyn Fn() -> Result<Store>>> {
    if text == "memory" {
        let memory = Arc::new(InMemory::new());
        return Ok(Box::new(move || Ok(memory.clone().into())));
    }
    let location: Location = text.parse()?;
    Ok(Box::new(move || Ok(Store::open(&location)?)))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}
