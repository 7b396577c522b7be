//! The differentiable operations that every model is made of.
//!
//! Everything above this crate calls these functions and nothing else for its softmax over scores, its loss over a
//! vocabulary, its norms, its rotary positions and its gated units. Each file holds an operation twice: in plain tensor
//! operations that Burn differentiates by itself, and fused for the CPU, with a backward of its own. The public function
//! chooses (`cpu::fuses`); the tests compare outputs and every gradient.
//!
//! No public function can be called so that it reads or writes what is not its own: shapes are checked first
//! (`shapes.rs`), matrices are views that know their sizes (`matrix.rs`), and memory without values cannot be read
//! (`scratch.rs`). A backward computes the gradients that somebody wants, and no others (`differentiable.rs`).

mod adamw;
mod adapted_linear;
mod add_rms_norm;
mod attention;
#[cfg(all(test, any(feature = "ndarray", feature = "gpu")))]
mod backends;
mod block_mask;
mod checkpointed;
pub mod comparison;
mod cpu;
mod cross_entropy;
mod delta_rule;
mod difference;
mod differentiable;
mod divergence;
mod embedding;
mod gated_mlp;
mod gpu;
mod layer_norm;
mod linear;
mod mask;
mod matrix;
mod on_backward;
mod one_row;
mod parallel;
mod precision;
mod product;
mod random;
mod rms_norm;
mod rope;
mod routed_linear;
mod scratch;
mod selected_rows;
mod shapes;
mod short_convolution;
mod simd;
mod squares;
mod swiglu;
#[cfg(test)]
mod testing;
mod total;
#[cfg(any(test, feature = "gpu"))]
mod two_outputs;
mod weight;

pub use adamw::{AdamwStep, adamw};
pub use adapted_linear::adapted_linear;
pub use add_rms_norm::{RmsNorm, add_rms_norm};
pub use attention::{
    Attention, AttentionOptions, HeadMap, MapAccess, Measure, Statistics, attention, attention_weights,
};
pub use block_mask::{BlockMask, QueryBlock};
pub use checkpointed::{Leaf, PartGrads, Rerun, checkpointed};
pub use cpu::{multiplies_bf16, threads};
pub use cross_entropy::{CrossEntropy, Targets, cross_entropy, tokens_of_a_chunk};
pub use delta_rule::{DeltaRule, delta_rule};
pub use difference::{Combination, difference, subtract_noise};
pub use divergence::{Divergence, divergence};
pub use embedding::embedding;
pub use gated_mlp::gated_mlp;
pub use gpu::{cublaslt_wanted, find_cublaslt, tensor_cores_wanted, use_cublaslt, use_tensor_cores};
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use mask::Mask;
pub use on_backward::{BackwardHook, GradsSoFar, on_backward};
pub use parallel::{in_parallel, on_the_pool};
pub use precision::in_type;
pub use random::{RandomState, random, seed_random, without_drawing};
pub use rms_norm::rms_norm;
pub use rope::{RopeLayout, rope};
pub use routed_linear::{linear_into_heads, linear_out_of_heads};
pub use selected_rows::SelectedRows;
pub use short_convolution::{Before, short_convolution};
pub use simd::instruction_set;
pub use squares::SumsOfSquares;
pub use swiglu::swiglu;
pub use total::total;
