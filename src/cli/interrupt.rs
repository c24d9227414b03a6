//! Ctrl-C and SIGTERM: the first one ends the command in order, so that conversations are kept; the second one at once.

use super::exit::Failure;
use super::output::Output;
use super::session;

/// Runs a command, until it ends or the program is interrupted. What it was doing is given up then.
pub(super) async fn or_interrupted(
    command: impl Future<Output = Result<(), Failure>>,
    output: &Output,
) -> Result<(), Failure> {
    let Ok(mut interrupts) = Interrupts::listen() else { return command.await };
    tokio::select! {
        result = command => result,
        () = interrupts.next() => {
            if output.is_watched() {
                output.note("\nending; once more ends at once");
            }
            tokio::select! {
                () = session::close_open() => {}
                () = interrupts.next() => {}
            }
            Err(Failure::Interrupted)
        }
    }
}

/// What asks the program to end.
#[cfg(unix)]
struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Interrupts {
    fn listen() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Interrupts;

#[cfg(not(unix))]
impl Interrupts {
    fn listen() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // One that cannot be listened for never comes.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
