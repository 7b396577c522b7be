//! The loop: steps, checkpoints, metrics.
//!
//! [`run`](run::run) is the loop, to be read from top to bottom; [`Procedure`] is what one step does. This crate knows
//! models and files, but neither where data comes from nor what a recipe or a terminal is.

pub mod attention_shifting;
pub mod bilevel;
pub mod boundaries;
pub mod checkpoint;
pub mod config;
mod curve;
pub mod engagement;
mod error;
pub mod evaluate;
mod freeze;
pub mod fusion;
pub mod gradients;
pub mod image;
mod in_backward;
mod memory;
pub mod neuron_dropout;
pub mod optimizer;
mod procedure;
mod procedures;
pub mod ranks;
pub mod run;
pub mod run_folder;
pub mod schedule;
mod sharding;
mod standard;
pub mod state;
pub mod tensorboard;
mod update;

pub use attention_shifting::AttentionShiftingConfig;
pub use bilevel::BilevelConfig;
pub use boundaries::BoundariesConfig;
pub use error::TrainError;
pub use freeze::{FreezeConfig, NamePatterns};
pub use memory::{available_memory_bytes, peak_memory_bytes};
pub use procedure::{HeldOut, Parts, Procedure, Shown, StepContext, StepReport};
pub use procedures::{ProcedureConfig, TrainableModel};
pub use standard::{Standard, StandardConfig};
