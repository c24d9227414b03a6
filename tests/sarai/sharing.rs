//! Processes that share one budget.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use sarai::core::memory::SharedBudget;
use sarai::core::units::Bytes;

use super::{Site, nobody};

/// A program that has answered and goes on holding its model.
fn chatting(site: &Site) -> Child {
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("sarai"))
        .current_dir(site.path(""))
        .env_clear()
        .envs([("HOME", site.path("")), ("XDG_RUNTIME_DIR", site.path("run"))])
        .env("OLLAMA_BASE_URL", nobody())
        .args(["--config", "config/demo.yaml", "chat", "lfm2", "--max-tokens", "4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(child.stdin.as_mut().unwrap(), "hola").unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(!line.trim().is_empty());
    child
}

#[test]
fn a_process_that_is_killed_leaves_its_share_to_the_others() {
    let site = Site::new();
    let shared = include_str!("../../config/demo.yaml").replace("\nmemory:", "\nmemory:\n  shared: true");
    site.write("config/demo.yaml", shared);
    let mut children = [chatting(&site), chatting(&site)];
    let own = SharedBudget::join(site.path("run/sarai/budget-1")).unwrap();
    let both = own.others().unwrap().held;
    children[0].kill().unwrap();
    children[0].wait().unwrap();
    let one = own.others().unwrap().held;
    assert!(both.0 > 1_000_000 && one == Bytes(both.0 / 2), "{both} {one}");
    // This one ends in order.
    drop(children[1].stdin.take());
    assert!(children[1].wait().unwrap().success());
    assert_eq!(own.others().unwrap().held, Bytes::ZERO);
}

#[test]
fn a_runtime_folder_that_cannot_be_used_is_named_at_start() {
    let site = Site::new();
    let shared = include_str!("../../config/demo.yaml").replace("\nmemory:", "\nmemory:\n  shared: true");
    site.write("config/demo.yaml", shared);
    site.write("file", "not a folder");
    let mut sarai = site.sarai(&nobody(), &["ps"]);
    let output = sarai.env("XDG_RUNTIME_DIR", site.path("file")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("memory.shared") && stderr.contains("file/sarai/budget-1"), "{stderr}");
}
