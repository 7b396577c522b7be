//! What a published suite runs, and what it reached.

pub mod plan;
pub mod result;
