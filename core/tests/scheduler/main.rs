//! The scheduler, driven as plain function calls: no runtime, no clock, no sleep.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod hazards;
mod properties;
mod sharing;
mod world;
