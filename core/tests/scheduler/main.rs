//! The scheduler, driven as plain function calls: no runtime, no clock, no sleep.

mod hazards;
mod properties;
mod world;
