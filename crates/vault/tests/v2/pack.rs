//! A vault's objects in one file: for each, in the order of names, the name's length (u32, little endian), the name, the content's length,
//! the content.

use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};
use std::sync::Arc;

pub async fn pack(store: &dyn ObjectStore) -> Vec<u8> {
    let mut names: Vec<Path> = store.list(None).map_ok(|meta| meta.location).try_collect().await.unwrap();
    names.sort_unstable();
    let mut out = Vec::new();
    for name in names {
        let content = store.get(&name).await.unwrap().bytes().await.unwrap();
        for part in [name.as_ref().as_bytes(), &content] {
            out.extend((part.len() as u32).to_le_bytes());
            out.extend_from_slice(part);
        }
    }
    out
}

pub async fn unpack(mut packed: &[u8]) -> Arc<dyn ObjectStore> {
    let mut next = || {
        let (len, rest) = packed.split_first_chunk::<4>()?;
        let (part, rest) = rest.split_at(u32::from_le_bytes(*len) as usize);
        packed = rest;
        Some(part)
    };
    let store = InMemory::new();
    while let Some(name) = next() {
        let content = next().unwrap().to_vec();
        store.put(&Path::from(std::str::from_utf8(name).unwrap()), content.into()).await.unwrap();
    }
    Arc::new(store)
}
