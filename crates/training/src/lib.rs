//! Placeholder.

pub mod checkpoint;
pub mod picture;
pub mod run_folder;
pub mod tensorboard;
