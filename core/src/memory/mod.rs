//! Memory: what a model will take, what it takes, and the ledger that keeps the sum within the budget.

mod estimate;

pub use estimate::{Estimate, Footprint};
