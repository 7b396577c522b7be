//! Classifiers: a class for an image, a text or the features of another model.
//!
//! A classifier is a body ([`ClassifierConfig`] has one variant for each) that turns inputs into scores of the classes, what
//! its scores are trained by ([`Objective`]), and what an evaluation adds up ([`ClassTotals`]). What the inputs are and how
//! many classes there are is told by the data ([`Sizes`]). A new body is a file, a variant here and in [`Body`].

mod config;
mod encoder;
mod objective;
mod sums;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{ConfigError, Observation, Observe};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::gaussian_adaptive_transformer::{
    FeatureSizes, GaussianAdaptiveTransformer, GaussianAdaptiveTransformerConfig,
};
use crate::loss::mean;
use crate::{ActivationCheckpointing, ContextMask, Examples, InputShape, Inputs, Loss, Part, Precision, Trainable};

pub use config::{TextEncoderConfig, VisionTransformerConfig};
pub use encoder::{Encoder, EncoderRead, InputLayer};
pub use objective::{ClassWeights, LossConfig, Objective};
pub use sums::{Bin, ClassScore, ClassTotals, GroupCount, MOST_CONFUSED};

/// `[model.classifier]`: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassifierConfig {
    /// Images, or spectrograms, cut into patches.
    VisionTransformer(VisionTransformerConfig),
    /// Texts as tokens that see each other both ways.
    TextEncoder(TextEncoderConfig),
    /// Features of all layers of a frozen model, through a Gaussian adaptive gate.
    GaussianAdaptiveTransformer(GaussianAdaptiveTransformerConfig),
}

/// What the data tells a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// The shape of an input.
    pub input: InputShape,
    /// Classes to tell apart.
    pub n_classes: usize,
}

impl ClassifierConfig {
    /// The name of its table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::VisionTransformer(_) => "vision_transformer",
            Self::TextEncoder(_) => "text_encoder",
            Self::GaussianAdaptiveTransformer(_) => "gaussian_adaptive_transformer",
        }
    }

    /// Checks everything that a user can get wrong, against the shape of the inputs where it is known.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, input: Option<InputShape>) -> Result<(), ConfigError> {
        let checked = match self {
            Self::VisionTransformer(config) => config.validate(input),
            Self::TextEncoder(config) => config.validate(input),
            Self::GaussianAdaptiveTransformer(config) => match input {
                Some(InputShape::Features { layers, dim }) => config.validate(feature_sizes(layers, dim, 1)),
                Some(other) => {
                    let problem = format!("{} reads features, and the data is {}", self.name(), other.kind());
                    Err(ConfigError::new("", problem))
                }
                None => Ok(()),
            },
        };
        checked.map_err(|error| error.within(self.name()))
    }

    /// Checks that the classifier can run in this precision.
    ///
    /// # Errors
    /// Says which one it is made for.
    pub fn check_precision(&self, precision: Precision) -> Result<(), String> {
        match (self, precision) {
            (Self::GaussianAdaptiveTransformer(_), Precision::Bf16) => {
                Err(format!("must be \"f32\" for {}: bf16 is for transformers", self.name()))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the classifier can be trained with this.
    ///
    /// # Errors
    /// Says what it is made for.
    pub fn check_checkpointing(&self, checkpointing: ActivationCheckpointing) -> Result<(), String> {
        match (self, checkpointing) {
            (Self::GaussianAdaptiveTransformer(_), ActivationCheckpointing::Block) => {
                Err(format!("must be \"none\" for {}: \"block\" is for transformers", self.name()))
            }
            _ => Ok(()),
        }
    }

    /// A classifier with fresh weights. Call [`validate`](Self::validate) with the same shape first, and
    /// [`polyhead_kernels::seed_random`].
    pub fn init(&self, sizes: Sizes, device: &Device) -> Classifier {
        let body = match self {
            Self::VisionTransformer(config) => Body::Encoder(config.encoder(sizes.input).init(sizes.n_classes, device)),
            Self::TextEncoder(config) => Body::Encoder(config.encoder(sizes.input).init(sizes.n_classes, device)),
            Self::GaussianAdaptiveTransformer(config) => {
                Body::GaussianAdaptiveTransformer(config.init(features_of(sizes), device))
            }
        };
        Classifier { body, config: self.clone(), sizes, objective: Objective::default() }
    }

    /// Parameters and costs by part; operations are those of a whole example.
    pub fn parts(&self, sizes: Sizes) -> Vec<Part> {
        match self {
            Self::VisionTransformer(config) => config.encoder(sizes.input).parts(sizes.n_classes),
            Self::TextEncoder(config) => config.encoder(sizes.input).parts(sizes.n_classes),
            Self::GaussianAdaptiveTransformer(config) => config.parts(features_of(sizes)),
        }
    }

    /// Layers, without naming each.
    pub fn n_layers(&self) -> usize {
        match self {
            Self::VisionTransformer(config) => config.n_layers,
            Self::TextEncoder(config) => config.n_layers,
            Self::GaussianAdaptiveTransformer(_) => 1,
        }
    }

    /// The mechanism of each layer.
    pub fn layers(&self) -> Vec<&'static str> {
        match self {
            Self::VisionTransformer(config) => config.mechanisms(),
            Self::TextEncoder(config) => config.mechanisms(),
            Self::GaussianAdaptiveTransformer(config) => vec![config.mixer_name()],
        }
    }

    /// Numbers that a layer keeps of an example for its backward pass, roughly, as for decoders.
    pub fn kept_numbers(&self, sizes: Sizes, checkpointed: bool) -> usize {
        match self {
            Self::VisionTransformer(config) => config.encoder(sizes.input).kept_numbers(checkpointed),
            Self::TextEncoder(config) => config.encoder(sizes.input).kept_numbers(checkpointed),
            Self::GaussianAdaptiveTransformer(config) => config.kept_numbers(features_of(sizes)),
        }
    }
}

fn feature_sizes(n_layers: usize, d_model: usize, n_classes: usize) -> FeatureSizes {
    FeatureSizes { n_layers, d_model, n_classes }
}

/// What the data tells a body that reads features.
fn features_of(sizes: Sizes) -> FeatureSizes {
    let InputShape::Features { layers, dim } = sizes.input else { panic!("validate: features") };
    feature_sizes(layers, dim, sizes.n_classes)
}

/// A classifier.
#[derive(Module, Debug)]
pub struct Classifier {
    /// From inputs to scores.
    pub body: Body,
    #[module(skip)]
    config: ClassifierConfig,
    #[module(skip)]
    sizes: Sizes,
    #[module(skip)]
    objective: Objective,
}

/// What turns inputs into scores of the classes.
// A model has one: boxing would buy nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Module, Debug)]
pub enum Body {
    /// A bidirectional transformer: of images, of texts.
    Encoder(Encoder),
    /// Convolutions over gated features.
    GaussianAdaptiveTransformer(GaussianAdaptiveTransformer),
}

/// What a body gives back.
#[derive(Debug)]
pub struct Scored {
    /// `[batch, classes]`, before a softmax.
    pub logits: Tensor<2>,
    /// `[1]` each: auxiliary losses of the layers, unweighted.
    pub penalties: Vec<Tensor<1>>,
    /// One per layer, if asked for.
    pub seen: Vec<Observation>,
    /// `[batch, layers, dim]`: what features were multiplied by, where a gate did so.
    pub factor: Option<Tensor<3>>,
}

impl Classifier {
    /// The settings that this model was made from.
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }

    /// What its data told.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The model with another objective; scores and evaluation stay.
    pub fn with_objective(self, objective: Objective) -> Self {
        Self { objective, ..self }
    }

    /// The model with the head and the classes of another one whose body is of the same kind.
    pub fn with_head_of(self, other: Self) -> Self {
        let sizes = Sizes { n_classes: other.sizes.n_classes, ..self.sizes };
        let body = match (self.body, other.body) {
            (Body::Encoder(mut body), Body::Encoder(other)) => {
                body.head = other.head;
                Body::Encoder(body)
            }
            (Body::GaussianAdaptiveTransformer(mut body), Body::GaussianAdaptiveTransformer(other)) => {
                body.head = other.head;
                Body::GaussianAdaptiveTransformer(body)
            }
            (body, _) => body,
        };
        Self { body, sizes, ..self }
    }

    /// The model with dropout at this rate while it trains, where it is a transformer.
    pub fn with_dropout(self, rate: f64) -> Self {
        let body = match self.body {
            Body::Encoder(encoder) => Body::Encoder(encoder.with_dropout(rate)),
            other => other,
        };
        Self { body, ..self }
    }

    /// The model with its products in another precision, where it is a transformer; see
    /// [`ClassifierConfig::check_precision`].
    pub fn with_precision(self, precision: Precision) -> Self {
        let body = match self.body {
            Body::Encoder(encoder) => Body::Encoder(encoder.with_precision(precision)),
            other => other,
        };
        Self { body, ..self }
    }

    /// The model that keeps other activations while it is trained, where it is a transformer; see
    /// [`ClassifierConfig::check_checkpointing`].
    pub fn with_checkpointing(self, checkpointing: ActivationCheckpointing) -> Self {
        let body = match self.body {
            Body::Encoder(encoder) => Body::Encoder(encoder.with_checkpointing(checkpointing)),
            other => other,
        };
        Self { body, ..self }
    }

    /// Scores of the classes.
    ///
    /// # Panics
    /// If the inputs are of another kind or size than the model was made for.
    pub fn forward(&self, inputs: &Inputs, observe: Observe) -> Scored {
        let _span = tracing::info_span!("forward").entered();
        match &self.body {
            Body::Encoder(encoder) => encoder.forward(inputs, observe),
            Body::GaussianAdaptiveTransformer(body) => {
                let Inputs::Features { values, layers, dim } = inputs else { panic!("the model reads features") };
                let shape = [values.len() / (layers * dim), *layers, *dim];
                let classified =
                    body.forward(Tensor::from_data(TensorData::new(values.clone(), shape), &self.device()));
                let (penalties, seen) = (Vec::new(), Vec::new());
                Scored { logits: classified.logits, penalties, seen, factor: classified.factor }
            }
        }
    }
}

impl Trainable for Classifier {
    type Batch = Examples;
    type Totals = ClassTotals;

    fn device(&self) -> Device {
        match &self.body {
            Body::Encoder(encoder) => encoder.device(),
            Body::GaussianAdaptiveTransformer(body) => body.head.weight.val().device(),
        }
    }

    fn n_layers(&self) -> usize {
        match &self.body {
            Body::Encoder(encoder) => encoder.layers.len(),
            // Its layers are those of the model whose features it reads.
            Body::GaussianAdaptiveTransformer(_) => 0,
        }
    }

    fn is_due(&self, step: u64) -> bool {
        match &self.body {
            Body::Encoder(encoder) => encoder.is_due(step),
            Body::GaussianAdaptiveTransformer(_) => false,
        }
    }

    fn before_step(&mut self, batch: &Examples, step: u64) {
        match &mut self.body {
            Body::Encoder(encoder) => encoder.before_step(&batch.inputs, step),
            Body::GaussianAdaptiveTransformer(_) => {}
        }
    }

    fn loss_under(&self, batch: &Examples, _context: ContextMask) -> Loss {
        let scored = self.forward(&batch.inputs, Observe::Nothing);
        Loss {
            penalty: mean(scored.penalties),
            seen: scored.seen,
            ..Loss::of(self.objective.sum(scored.logits, &batch.labels, &batch.groups))
        }
    }

    fn totals(&self, batch: &Examples) -> ClassTotals {
        let Scored { logits, factor, .. } = self.forward(&batch.inputs, Observe::Nothing);
        let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
        let sums = ClassTotals::of(&logits, &batch.labels, &batch.groups);
        match factor {
            Some(factor) => sums.with_gates(factor),
            None => sums,
        }
    }

    fn observe_layers(&self, batch: &Examples, observe: Observe) -> Vec<Observation> {
        self.forward(&batch.row(0).inputs, observe).seen
    }
}

#[cfg(test)]
mod tests;
