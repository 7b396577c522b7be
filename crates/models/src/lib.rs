//! Models built from attention mechanisms, their inputs and losses, and their weights as files.
//!
//! [`Decoder`] is the pre-norm language model, [`Classifier`] everything with a class at its end, [`SuperResolution`] enlarges images, [`Trainable`] the interface
//! of both to the training loop; [`Batch`] and [`Examples`] are their inputs, [`loss`](Decoder::loss) the decoder's loss,
//! [`Past::generate`] writes text with it, [`weights`] are parameters by name, [`hf`] reads and writes Hugging Face's format.

pub mod adapters;
mod batch;
mod classifier;
mod contrastive;
mod convolution;
mod decoder;
mod diffusion;
mod embedder;
mod examples;
mod gate;
mod gaussian_adaptive_transformer;
mod generate;
mod head_overlap;
pub mod hf;
pub mod intervention;
mod layer_features;
mod loss;
mod mapped_file;
pub mod mup;
mod new_token;
mod per_layer;
mod pooling;
mod prompt_pair;
mod question;
mod resample;
mod retrieval;
mod rope_scaling;
pub mod sites;
pub mod super_resolution;
pub mod surgery;
#[cfg(test)]
mod testing;
mod trainable;
mod trained;
mod transformer;
pub mod weights;

pub use polyhead_attention::{ConfigError, broken, require, require_positive, require_range};

pub use batch::{Batch, ContextMask, IGNORE, Role, Sources};
pub use classifier::{
    Bin, Body, ClassScore, ClassTotals, ClassWeights, Classifier, ClassifierConfig, Encoder, EncoderRead, GroupCount,
    InputLayer, LossConfig, MOST_CONFUSED, Objective, Scored, Sizes, TextEncoderConfig, VisionTransformerConfig,
};
pub use contrastive::{CONTRASTIVE_SCALE, contrastive_loss};
pub use convolution::Convolution;
pub use decoder::{Decoder, DecoderConfig, Forward, ModelCosts, Pass};
pub use diffusion::{DiffusionSampling, MaskedBatch};
pub use embedder::{EmbedTotals, Embedder, EmbedderConfig, Pairs};
pub use examples::{Examples, InputShape, Inputs};
pub use gate::{Gate, GateKind};
pub use gaussian_adaptive_transformer::{
    Between, Classified, FeatureAttention, FeatureAttentionConfig, FeatureMixer, FeatureMixerConfig, FeatureSizes,
    GaussianAdaptiveTransformer, GaussianAdaptiveTransformerConfig, Gqdaam, GqdaamConfig,
};
pub use generate::{Continuation, Past, Request, Sampling, continuations, continue_all};
pub use head_overlap::head_overlap;
pub use layer_features::TokenPooling;
pub use loss::{Evaluated, Loss, TokenTotals};
pub use mapped_file::{MappedFile, irregular, mapped_file_at, open_regular};
pub use new_token::marked_message;
pub use per_layer::PerLayer;
pub use pooling::{
    GeneralizedMean, GeneralizedMeanConfig, Plain, PoolInput, Pooling, PoolingConfig, TrainablePooling,
    TrainablePoolingConfig,
};
pub use prompt_pair::PromptPair;
pub use question::{Known, Question, SkillQuestion};
pub use resample::{Filter, resampled};
pub use retrieval::{RECALL_AT, Retrieval};
pub use rope_scaling::{LinearScaling, Llama3Scaling, RopeScaling};
pub use super_resolution::{ImageTotals, Images, SuperResolution, SuperResolutionConfig};
pub use trainable::{EvalTotals, ImageRows, Matrix, TrainBatch, Trainable};
pub use trained::{Parameter, is_beside_weights, parameters, train_only};
pub use transformer::ActivationCheckpointing;
pub use transformer::{Block, Mlp, MlpKind, Norm, NormKind, Part, Precision};
