//! `highwater-agent`: see `highwater-agent --help`.

fn main() {
    println!("not yet");
}
