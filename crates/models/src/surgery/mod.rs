//! Turning a trained model into another one: with fewer key and value heads, with unselected heads, or larger.
//!
//! `heads.rs` sees projections as heads: how alike they are, how they cluster, how several become one. `search.rs` shares a
//! budget of heads over layers. `convert.rs` makes new models of trained ones, `fusion.rs`, `key_driven.rs` and
//! `mixture_of_head.rs` too. `growth.rs` makes a model larger without changing what it computes.

mod convert;
mod fusion;
mod growth;
mod heads;
mod key_driven;
mod mixture_of_head;
mod search;

#[cfg(test)]
mod grouped_parents;

pub(crate) use convert::per_layer;
pub use convert::{
    Grouping, SurgeryError, decouple, expanded, group_queries, heads_of_budget, heads_of_layers, standard_grouped,
};
pub use fusion::{begin_fusion, collapse, mean_scatter, scatter, unfused};
pub use growth::{Growth, grow, grown_config};
pub use heads::{Cell, Heads, Merge, Pool, labels_after};
pub use key_driven::{AllocationRule, decouple_key_driven, drive_by_keys, measure_keys};
pub use mixture_of_head::{Routed, route_heads};
pub use search::{allocate, allocate_by_need, search};
