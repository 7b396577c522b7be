//! The differentiable operations that every model is made of.
//!
//! Everything above this crate calls these functions and nothing else for its softmax over scores, its loss over a
//! vocabulary, its norms, its rotary positions and its gated units. What stands here is the plain form, written with
//! tensor operations that Burn differentiates by itself: it is the reference that a fused form is tested against.

mod attention;
mod cross_entropy;
mod mask;
mod rms_norm;
mod rope;
mod swiglu;

pub use attention::{Attention, AttentionOptions, HeadMap, Statistics, attention};
pub use cross_entropy::{CrossEntropy, Targets, cross_entropy};
pub use mask::Mask;
pub use rms_norm::rms_norm;
pub use rope::{RopeLayout, rope};
pub use swiglu::swiglu;
