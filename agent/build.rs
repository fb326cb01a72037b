//! Embeds the eBPF objects that `cargo xtask build-ebpf` made. Without them the agent still builds (so that the rest can
//! be worked on without an eBPF toolchain), and says at run time what is missing.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=HIGHWATER_EBPF_OBJECTS");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let objects =
        env::var_os("HIGHWATER_EBPF_OBJECTS").map_or_else(|| root.join("../target/ebpf"), PathBuf::from);
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for name in ["highwater-agent-ebpf.o", "highwater-capture-ebpf.o"] {
        embed(&objects.join(name), &out.join(name));
    }
}

fn embed(object: &PathBuf, out: &PathBuf) {
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = fs::read(object).unwrap_or_default();
    if bytes.is_empty() {
        println!(
            "cargo::warning=no eBPF object at {}: this agent will not track; run `cargo xtask build-ebpf` first",
            object.display()
        );
    }
    if let Err(error) = fs::write(out, bytes) {
        println!("cargo::error=cannot write {}: {error}", out.display());
    }
}
