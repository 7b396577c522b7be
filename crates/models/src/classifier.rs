//! Classifiers: a class for a picture, a text or the features of another model.
//!
//! A classifier is a body ([`ClassifierConfig`] has one variant for each) that turns inputs into scores of the classes, what
//! its scores are trained by ([`Objective`]), and what an evaluation adds up ([`ClassSums`]). What the inputs are and how
//! many classes there are is told by the data ([`Sizes`]). A new body is a file, a variant here and in [`Body`].

mod config;
mod encoder;
mod mixing;
mod objective;
mod sums;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{ConfigError, Observation, Observe};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ContextMask, Examples, InputShape, Inputs, Learner, Loss, Part};

pub use config::{TextEncoderConfig, VisionTransformerConfig};
pub use encoder::{Encoder, EncoderBlock, InputLayer, Mixer};
pub use mixing::MixerConfig;
pub use objective::{ClassWeights, LossConfig, Objective};
pub use sums::{Bin, ClassScore, ClassSums};

use config::Blueprint;

/// `[model.classifier]`: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassifierConfig {
    /// Pictures, or spectrograms, cut into patches.
    VisionTransformer(VisionTransformerConfig),
    /// Texts as tokens that see each other both ways.
    TextEncoder(TextEncoderConfig),
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
        };
        checked.map_err(|error| match error.field.is_empty() {
            true => ConfigError::new(self.name(), error.problem),
            false => error.within(self.name()),
        })
    }

    /// A classifier with fresh weights. Call [`validate`](Self::validate) with the same shape first, and seed the device.
    pub fn init(&self, sizes: Sizes, device: &Device) -> Classifier {
        let body = Body::Encoder(self.blueprint(sizes.input).init(sizes.n_classes, device));
        Classifier { body, config: self.clone(), sizes, objective: Objective::default() }
    }

    /// Parameters and costs by part; operations are those of a whole example.
    pub fn parts(&self, sizes: Sizes) -> Vec<Part> {
        self.blueprint(sizes.input).parts(sizes.n_classes)
    }

    /// What mixes the positions, layer by layer.
    pub fn layers(&self) -> Vec<&'static str> {
        match self {
            Self::VisionTransformer(config) => config.mixers(),
            Self::TextEncoder(config) => config.mixers(),
        }
    }

    /// Numbers that a layer keeps of an example for its backward pass, roughly, as for decoders.
    pub fn kept_numbers(&self, sizes: Sizes) -> usize {
        self.blueprint(sizes.input).kept_numbers()
    }

    fn blueprint(&self, input: InputShape) -> Blueprint {
        match self {
            Self::VisionTransformer(config) => config.blueprint(input),
            Self::TextEncoder(config) => config.blueprint(input),
        }
    }
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
#[derive(Module, Debug)]
pub enum Body {
    /// A bidirectional transformer: of pictures, of texts.
    Encoder(Encoder),
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

    /// Scores of the classes.
    ///
    /// # Panics
    /// If the inputs are of another kind or size than the model was made for.
    pub fn forward(&self, inputs: &Inputs, observe: Observe) -> Scored {
        match &self.body {
            Body::Encoder(encoder) => encoder.forward(inputs, observe),
        }
    }
}

impl Learner for Classifier {
    type Batch = Examples;
    type Sums = ClassSums;

    fn device(&self) -> Device {
        match &self.body {
            Body::Encoder(encoder) => encoder.device(),
        }
    }

    fn n_layers(&self) -> usize {
        match &self.body {
            Body::Encoder(encoder) => encoder.layers.len(),
        }
    }

    fn before_step(&mut self, batch: &Examples, step: u64) {
        match &mut self.body {
            Body::Encoder(encoder) => encoder.regroup(&batch.inputs, step),
        }
    }

    fn loss_under(&self, batch: &Examples, _context: ContextMask) -> Loss {
        let scored = self.forward(&batch.inputs, Observe::Nothing);
        let layers = scored.penalties.len();
        let penalty = scored.penalties.into_iter().reduce(|a, b| a + b).map(|sum| sum / layers as f64);
        Loss { cross_entropy: self.objective.sum(scored.logits, &batch.labels), penalty, seen: scored.seen }
    }

    fn sums(&self, batch: &Examples) -> ClassSums {
        let logits = self.forward(&batch.inputs, Observe::Nothing).logits;
        ClassSums::of(&logits.into_data().iter::<f32>().collect::<Vec<f32>>(), &batch.labels)
    }

    fn look(&self, batch: &Examples, observe: Observe) -> Vec<Observation> {
        self.forward(&batch.row(0).inputs, observe).seen
    }
}

#[cfg(test)]
mod tests;
