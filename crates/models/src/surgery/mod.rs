//! Turning a trained model into one with fewer key and value heads.
//!
//! `heads.rs` sees projections as heads: how alike they are, how they cluster, how several become one. `search.rs` shares a
//! budget of heads over layers. `convert.rs` makes new models of trained ones.

mod convert;
mod heads;
mod search;

pub use convert::{
    Grouping, SurgeryError, begin_fusion, collapse, decouple, expanded, group_queries, heads_of_layer, standard_grouped,
};
pub use heads::{Cell, Heads, Merge, Pool, labels_after};
pub use search::{allocate, allocate_by_need, search};
