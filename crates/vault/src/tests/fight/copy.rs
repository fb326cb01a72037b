//! A copy of the store, as any tool makes one, while everybody goes on: not at one moment.
//!
//! In the order of names, and so records before the objects that they name: what the last of these records names is there for as long as
//! the grace, whatever is merged meanwhile.

use super::sea::{Dice, Shore};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};
use std::{sync::Arc, time::Duration};
use tokio::time::sleep;

pub struct Copied {
    pub store: Arc<dyn ObjectStore>,
    pub began_ms: u64,
}

/// Takes a little less than `within`. Lists a directory when it comes to it, and passes over what is gone by then.
pub async fn copy(shore: &Shore, within: Duration, seed: u64) -> Copied {
    let (dice, store, began_ms) = (Dice::new(seed), InMemory::new(), shore.now_ms());
    let mut left = within.mul_f32(0.95);
    let mut dirs = vec!["control".to_owned(), "keys".to_owned(), "vault.json".to_owned()];
    let machines = shore.objects().list_with_delimiter(Some(&"machines".into())).await.unwrap();
    for machine in machines.common_prefixes {
        dirs.extend(
            ["checkpoint", "key", "manifest", "maps", "pruned", "rewritten", "segments"]
                .map(|dir| format!("{machine}/{dir}")),
        );
    }
    for dir in dirs {
        let pause = left.mul_f64(dice.below(100) as f64 / 100.0);
        left -= pause;
        sleep(pause).await;
        let dir = dir.as_str().into();
        let mut paths: Vec<_> =
            shore.objects().list(Some(&dir)).map_ok(|meta| meta.location).try_collect().await.unwrap();
        if paths.is_empty() {
            paths.push(dir);
        }
        paths.sort();
        for path in paths {
            // Seldom, and then for long.
            if dice.percent(3) {
                let pause = left.mul_f64(dice.below(100) as f64 / 100.0);
                left -= pause;
                sleep(pause).await;
            }
            if let Ok(got) = shore.objects().get(&path).await {
                store.put(&path, got.bytes().await.unwrap().into()).await.unwrap();
            }
        }
    }
    Copied { store: Arc::new(store), began_ms }
}
