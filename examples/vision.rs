//! An image and a question: one model says what is there, another one answers with that.
//!
//! On the demo's toy models:
//! `cargo run --release --example vision -- config/demo.yaml config/demo/picture.png "What is it?"`

#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use futures::StreamExt;
use sarai::{AnswerEvent, AnswerStream, CallOptions, GenerateRequest, Image, Message, Sarai};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let sarai = Sarai::from_file(arguments.next().ok_or("name a configuration")?).await?;
    let image = Image::new(std::fs::read(arguments.next().ok_or("name an image file")?)?)?;
    let question = arguments.next().unwrap_or_else(|| "What is on the image?".to_owned());

    let options = CallOptions::default();
    let omni = sarai.pool().handle("omni")?;
    let seen = text(omni.describe(image, "Describe the image.", options).await?).await?;
    println!("omni sees: {seen}");

    let request = GenerateRequest::chat(vec![Message::system(seen), Message::user(question)]);
    let solar = sarai.pool().handle("solar")?;
    println!("solar says: {}", text(solar.generate(request, options).await?).await?);
    sarai.shutdown(std::time::Duration::from_secs(10)).await;
    Ok(())
}

/// A whole answer.
async fn text(mut answer: AnswerStream) -> Result<String, sarai::Error> {
    let mut whole = String::new();
    while let Some(event) = answer.next().await {
        if let AnswerEvent::Text(text) = event? {
            whole.push_str(&text);
        }
    }
    Ok(whole)
}
