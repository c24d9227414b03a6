//! Memory: what a model will take, what it takes, and the ledger that keeps the sum within the budget.

mod cgroup;
mod estimate;
mod ledger;
mod probe;
#[cfg(target_os = "linux")]
mod psi;
mod shared;

pub use estimate::{Estimate, Footprint, Freed, WeightsId};
pub use ledger::{Claim, Ledger, Reservation, Shortfall};
pub use probe::{Probe, SystemMemory, SystemProbe};
pub use shared::{Others, SharedBudget};
