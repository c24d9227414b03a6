//! Writes a file as large as a real model: `cargo run --release -p sarai-support --example shape -- NAME FILE`

use sarai_support::gguf::Shape;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [name, path] = std::env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| usage())?;
    let shape = Shape::ALL.into_iter().find(|shape| shape.name() == name).ok_or_else(usage)?;
    Ok(shape.write_to(path)?)
}

fn usage() -> String {
    format!("usage: shape NAME FILE, where NAME is one of {}", Shape::ALL.map(Shape::name).join(", "))
}
