//! Models built from attention mechanisms: what they compute, what they learn from, and their weights as files.
//!
//! [`Decoder`] is the pre-norm language model; [`Batch`] what it is given, [`loss`](Decoder::loss) what it is told,
//! [`generate`] what it says, [`weights`] its parameters by name, [`hf`] the same under other projects' names.

pub mod adapters;
mod batch;
mod decoder;
mod gate;
mod generate;
pub mod hf;
mod loss;
mod per_layer;
mod question;
mod rope_scaling;
mod trained;
pub mod weights;

pub use batch::{Batch, ContextMask, IGNORE, Role};
pub use decoder::{Decoder, DecoderConfig, Forward, MlpKind, NormKind, Part, Pass, Precision};
pub use gate::{Gate, GateKind};
pub use generate::{Continuation, Sampling, continuations, generate};
pub use loss::{Evaluated, Loss};
pub use per_layer::PerLayer;
pub use question::{Known, Question};
pub use rope_scaling::{LinearScaling, Llama3Scaling, RopeScaling};
pub use trained::{Parameter, parameters, train_only};
