//! Embeds the eBPF object that `cargo xtask build-ebpf` made. Without it the agent still builds (so that the rest can
//! be worked on without an eBPF toolchain), and says at run time what is missing.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=HIGHWATER_EBPF_OBJECT");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let object = env::var_os("HIGHWATER_EBPF_OBJECT")
        .map_or_else(|| root.join("../target/ebpf/highwater-agent-ebpf.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("highwater-agent-ebpf.o");
    let bytes = fs::read(&object).unwrap_or_default();
    if bytes.is_empty() {
        println!(
            "cargo::warning=no eBPF object at {}: this agent will not track; run `cargo xtask build-ebpf` first",
            object.display()
        );
    }
    if let Err(error) = fs::write(&out, bytes) {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}
