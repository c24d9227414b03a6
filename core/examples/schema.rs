//! Writes the JSON schema of the configuration file:
//! `cargo run --release -p sarai-core --example schema > config/sarai.schema.json`

use std::io::{self, Write};

fn main() -> io::Result<()> {
    let schema = serde_json::to_string_pretty(&sarai_core::config::json_schema())?;
    writeln!(io::stdout().lock(), "{schema}")
}
