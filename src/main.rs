//! The `sarai` program.
fn main() {}
