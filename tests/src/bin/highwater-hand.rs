//! The far end of [`highwater_tests::hand`].

fn main() -> anyhow::Result<()> {
    highwater_tests::hand::serve()
}
