//! An embedder: what the layers of a frozen model made of a text becomes one vector of length 1, so that texts that belong
//! together lie close (Tang and Yang 2024, arXiv 2409.02727).
//!
//! The model whose features are read stays as it is: it has been run over the texts before, once. What is trained is the
//! pooling, by the contrastive loss of its authors ([`contrastive_loss`]). Features are pooled over the tokens of each text
//! already, so that a layer has one state; of the inputs of `mltp` those of each layer and the last are left.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{ConfigError, Cost, Observation, Observe, require_positive};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::contrastive::{CONTRASTIVE_SCALE, contrastive_loss};
use crate::pooling::{PoolInput, Pooling, PoolingConfig, unit};
use crate::retrieval::Retrieval;
use crate::{ContextMask, EvalTotals, Evaluated, Loss, Part, TrainBatch, Trainable};

/// `[model.embedder]`: what makes one vector of the features of all layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbedderConfig {
    /// How the features of the layers become one vector.
    pub pooling: PoolingConfig,
    /// Factor of the cosines in the loss. Default: 20, what the authors train with.
    #[serde(default = "scale")]
    pub scale: f64,
}

fn scale() -> f64 {
    CONTRASTIVE_SCALE
}

/// Texts that belong together, as features: a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// `[n, parts, layers, dim]` row-major: of each a query, a document that belongs to it, and where there are three parts a
    /// document that does not.
    pub values: Vec<f32>,
    /// 2 or 3.
    pub parts: usize,
    /// Layers of a part.
    pub layers: usize,
    /// Numbers of a layer.
    pub dim: usize,
}

impl Pairs {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len() / (self.parts * self.layers * self.dim)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

impl TrainBatch for Pairs {
    fn inputs(&self) -> u64 {
        (self.len() * self.parts) as u64
    }

    fn targets(&self) -> u64 {
        self.len() as u64
    }
}

impl EmbedderConfig {
    /// Checks everything that a user can get wrong, against the numbers of a layer where they are known.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, dim: Option<usize>) -> Result<(), ConfigError> {
        require_positive("scale", self.scale)?;
        match &self.pooling {
            PoolingConfig::Mltp(config) if config.input == PoolInput::TokensOfLastLayer => Err(ConfigError::new(
                "pooling.mltp.input",
                "pooling.mltp.input (tokens_of_last_layer) needs every token, and features hold one vector of a layer: take \
                 last_of_last_layer, which of one vector is the same",
            )),
            PoolingConfig::Mltp(_) => match dim {
                Some(dim) => self.pooling.validate(dim).map_err(|error| error.within("pooling")),
                None => Ok(()),
            },
            PoolingConfig::Mean | PoolingConfig::ClassToken | PoolingConfig::LastToken | PoolingConfig::Ggem(_) => {
                Err(ConfigError::new(
                    "pooling",
                    "pooling: nothing of it can be trained on one vector of a layer; take mltp (`polyhead embed` tells of plain features by itself)",
                ))
            }
        }
    }

    /// Parameters and costs by part; operations are not counted.
    pub fn parts(&self, layers: usize, dim: usize) -> Vec<Part> {
        let parameters = self.pooling.parameters(dim, layers);
        vec![Part { name: "pooling".into(), cost: Cost { parameters, ..Cost::default() } }]
    }

    /// An embedder with fresh weights. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, layers: usize, dim: usize, device: &Device) -> Embedder {
        Embedder { pooling: self.pooling.init(dim, layers, device), scale: self.scale, layers }
    }
}

/// An embedder.
#[derive(Module, Debug)]
pub struct Embedder {
    /// What is trained.
    pub pooling: Pooling,
    scale: f64,
    layers: usize,
}

impl Embedder {
    /// `[n, dim]`, each of length 1, from features `[n, layers, dim]`.
    pub fn embed(&self, features: Tensor<3>) -> Tensor<2> {
        let layers: Vec<Tensor<3>> = (0..self.layers).map(|layer| features.clone().narrow(1, layer, 1)).collect();
        unit(self.pooling.forward(&layers, None))
    }

    /// Embeddings of the parts of a batch, each `[n, dim]`.
    fn parts(&self, batch: &Pairs) -> Vec<Tensor<2>> {
        let _span = tracing::info_span!("forward").entered();
        let Pairs { values, parts, layers, dim } = batch;
        let all = TensorData::new(values.clone(), [batch.len(), *parts, *layers, *dim]);
        let all = Tensor::<4>::from_data(all, &self.device());
        (0..*parts).map(|part| self.embed(all.clone().narrow(1, part, 1).squeeze_dim(1))).collect()
    }

    /// The summed loss of embedded parts.
    fn loss_of(&self, parts: &[Tensor<2>]) -> Tensor<1> {
        let n = parts[0].dims()[0] as f64;
        contrastive_loss(parts[0].clone(), parts[1].clone(), parts.get(2).cloned(), self.scale) * n
    }
}

/// What an evaluation adds up: all embeddings, because every query looks among all documents.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EmbedTotals {
    loss: f64,
    dim: usize,
    /// `[n, dim]`
    queries: Vec<f32>,
    /// `[n, dim]`
    documents: Vec<f32>,
}

impl EmbedTotals {
    /// How well each query finds its document among all that were evaluated.
    pub fn retrieval(&self) -> Retrieval {
        Retrieval::of(&self.queries, &self.documents, self.dim)
    }
}

impl EvalTotals for EmbedTotals {
    fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.dim = other.dim;
        self.queries.extend(other.queries);
        self.documents.extend(other.documents);
    }

    /// The loss is that of the batches as they were cut; right are the queries that find their document first among all.
    fn evaluated(&self) -> Evaluated {
        let targets = self.queries.len() / self.dim.max(1);
        let correct = (self.retrieval().recall[0] * targets as f64).round() as u64;
        Evaluated { loss: self.loss, correct, targets: targets as u64, bytes: 0 }
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        let Retrieval { recall: [_, at_5, at_10], mrr } = self.retrieval();
        vec![("recall_at_5/validation", at_5), ("recall_at_10/validation", at_10), ("mrr/validation", mrr)]
    }
}

impl Trainable for Embedder {
    type Batch = Pairs;
    type Totals = EmbedTotals;

    fn device(&self) -> Device {
        match &self.pooling {
            Pooling::Ggem(pooling) => pooling.p.val().device(),
            Pooling::Mltp(pooling) => pooling.latents.val().device(),
            Pooling::Mean(_) | Pooling::ClassToken(_) | Pooling::LastToken(_) => {
                unreachable!("validate: a pooling that can be trained")
            }
        }
    }

    fn n_layers(&self) -> usize {
        self.layers
    }

    fn loss_under(&self, batch: &Pairs, _context: ContextMask) -> Loss {
        Loss::of(self.loss_of(&self.parts(batch)))
    }

    fn totals(&self, batch: &Pairs) -> EmbedTotals {
        let parts = self.parts(batch);
        let values = |part: &Tensor<2>| part.clone().into_data().iter::<f32>().collect::<Vec<f32>>();
        EmbedTotals {
            loss: f64::from(self.loss_of(&parts).into_scalar::<f32>()),
            dim: batch.dim,
            queries: values(&parts[0]),
            documents: values(&parts[1]),
        }
    }

    fn observe_layers(&self, _batch: &Pairs, _observe: Observe) -> Vec<Observation> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Distribution;
    use polyhead_kernels::{random, seed_random};

    use super::*;
    use crate::testing::reach_every_parameter;

    const DIM: usize = 8;

    fn model(input: &str) -> Embedder {
        let json = format!(r#"{{"pooling": {{"mltp": {{"n_heads": 2, "n_latents": 3, "input": "{input}"}}}}}}"#);
        let config: EmbedderConfig = serde_json::from_str(&json).unwrap();
        config.validate(Some(DIM)).unwrap();
        let device = Device::flex().autodiff();
        seed_random(3);
        config.init(4, DIM, &device)
    }

    fn pairs(n: usize, parts: usize) -> Pairs {
        let values: Tensor<1> = random([n * parts * 4 * DIM], Distribution::Normal(0.0, 1.0), &Device::flex());
        Pairs { values: values.into_data().try_to_vec().unwrap(), parts, layers: 4, dim: DIM }
    }

    #[test]
    fn gradients_reach_what_is_trained() {
        for parts in [2, 3] {
            let (model, batch) = (model("mean_of_each_layer"), pairs(5, parts));
            assert_eq!((batch.len(), batch.inputs(), batch.targets()), (5, 5 * parts as u64, 5));
            let loss = model.loss_under(&batch, ContextMask::Causal).cross_entropy;
            assert!(reach_every_parameter(&model, &loss.backward()) > 10);
        }
    }

    #[test]
    fn only_pooling_over_layers_reads_all_layers() {
        let batch = pairs(2, 2);
        let features = |values: &[f32]| {
            Tensor::<3>::from_data(TensorData::new(values[..4 * DIM].to_vec(), [1, 4, DIM]), &Device::flex().autodiff())
        };
        for (input, all) in [("mean_of_each_layer", true), ("last_of_each_layer", true), ("last_of_last_layer", false)]
        {
            let model = model(input);
            let embedded = |values: &[f32]| model.embed(features(values)).into_data().try_to_vec::<f32>().unwrap();
            let length = embedded(&batch.values).iter().map(|x| x * x).sum::<f32>();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
            for layer in 0..4 {
                let mut other = batch.values.clone();
                other[layer * DIM] += 1.0;
                let felt = embedded(&other) != embedded(&batch.values);
                assert_eq!(felt, all || layer == 3, "{input}, layer {layer}");
            }
        }
    }

    #[test]
    fn an_evaluation_looks_among_the_documents_of_all_batches() {
        let model = model("mean_of_each_layer").valid();
        let (a, b) = (pairs(3, 2), pairs(4, 2));
        let mut sums = EmbedTotals::default();
        sums.add(model.totals(&a));
        sums.add(model.totals(&b));
        let both = Pairs { values: [a.values, b.values].concat(), ..pairs(1, 2) };
        let whole = model.totals(&both);
        assert_eq!(sums.retrieval(), whole.retrieval());
        assert_eq!((sums.evaluated().targets, sums.evaluated().correct), (7, whole.evaluated().correct));
        // A text is its own best document.
        let own =
            Pairs { values: both.values.chunks(4 * DIM).step_by(2).flat_map(|x| [x, x].concat()).collect(), ..both };
        assert_eq!(model.totals(&own).retrieval().recall, [1.0; 3]);
    }

    #[test]
    fn mistakes_are_told_by_name() {
        let field = |json: &str| {
            let config: EmbedderConfig = serde_json::from_str(json).unwrap();
            config.validate(Some(DIM)).unwrap_err().field
        };
        assert_eq!(field(r#"{"pooling": "mean"}"#), "pooling");
        assert_eq!(field(r#"{"pooling": {"mltp": {"n_heads": 3}}}"#), "pooling.mltp.n_heads");
        assert_eq!(field(r#"{"scale": 0.0, "pooling": {"mltp": {"n_heads": 2}}}"#), "scale");
    }
}
