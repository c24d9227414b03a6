//! Processes that share one budget.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use sarai::core::memory::SharedBudget;
use sarai::core::units::Bytes;

use super::{Site, nobody};

/// A program that answers what it is asked and goes on holding its model.
struct Chat {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Chat {
    fn start(site: &Site, more: &[&str]) -> Self {
        let mut child = Command::new(assert_cmd::cargo::cargo_bin!("sarai"))
            .current_dir(site.path(""))
            .env_clear()
            .envs([("HOME", site.path("")), ("XDG_RUNTIME_DIR", site.path("run"))])
            .env("OLLAMA_BASE_URL", nobody())
            .args(["--config", "config/site.yaml", "chat", "lfm2", "--max-tokens", "4"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    fn ask(&mut self) {
        writeln!(self.child.stdin.as_mut().unwrap(), "hola").unwrap();
    }

    fn answer(&mut self) {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(!line.trim().is_empty());
    }

    /// Ends in order.
    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

fn shared() -> Site {
    let site = Site::new();
    let shared = include_str!("site.yaml").replace("\nmemory:", "\nmemory:\n  shared: true");
    site.write("config/site.yaml", shared);
    site
}

#[test]
fn a_process_that_is_killed_leaves_its_share_to_the_others() {
    let site = shared();
    let mut chats = [Chat::start(&site, &[]), Chat::start(&site, &[])];
    for chat in &mut chats {
        chat.ask();
        chat.answer();
    }
    let mut own = SharedBudget::join(site.path("run/sarai/budget-1")).unwrap();
    let both = own.others().unwrap().held;
    let [mut first, second] = chats;
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let one = own.others().unwrap().held;
    assert!(both.0 > 1_000_000 && one < both && one > Bytes::ZERO, "{both} {one}");
    second.end();
    assert_eq!(own.others().unwrap().held, Bytes::ZERO);
}

#[test]
fn two_processes_that_compete_for_room_take_turns_and_never_hold_more_than_there_is() {
    let site = shared();
    // One model fits, two do not.
    let budget = Bytes::from_gb(0.02);
    let mut chats = [(); 2].map(|()| Chat::start(&site, &["--max-ram-gb", "0.02"]));
    let mut own = SharedBudget::join(site.path("run/sarai/budget-1")).unwrap();
    let (done, is_done) = std::sync::mpsc::sync_channel::<()>(0);
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let mut most = Bytes::ZERO;
            while is_done.recv_timeout(Duration::from_millis(5)) == Err(RecvTimeoutError::Timeout) {
                most = most.max(own.others().map_or(Bytes::ZERO, |others| others.held));
            }
            most
        });
        for _ in 0..3 {
            chats.iter_mut().for_each(Chat::ask);
            chats.iter_mut().for_each(Chat::answer);
        }
        drop(done);
        watch.join().unwrap()
    });
    assert!(most > Bytes(1_000_000) && most <= budget, "{most} of {budget}");
    chats.into_iter().for_each(Chat::end);
}

#[test]
fn a_runtime_folder_that_cannot_be_used_is_named_at_start() {
    let site = shared();
    site.write("file", "not a folder");
    let mut sarai = site.sarai(&nobody(), &["ps"]);
    let output = sarai.env("XDG_RUNTIME_DIR", site.path("file")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("memory.shared") && stderr.contains("file/sarai/budget-1"), "{stderr}");
}
