//! The bidirectional transformer with a class at its end.
//!
//! ```text
//! input -> linear or embedding (, class token in front), + learned positions
//!   ->  layers: x + attention(norm(x)), x + mlp(norm(x))  ->  norm  ->  pooling  ->  linear to classes
//! ```
//! Nothing is causal and nothing rotates. With `pooling = "class_token"` a learned token is in front; other poolings have
//! none. Trainable pooling over all layers reads each of them behind the last norm. Left out of ViT: the hidden layer of its
//! head while it is pretrained.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Bool, Device, Distribution, Int, Tensor, TensorData};
use polyhead_attention::{Attended, Call, INIT_STD, Mask, Observe, Sites, linear};
use polyhead_kernels::{embedding, random};

use super::Scored;
use super::config::{EncoderConfig, Source};
use crate::gate::dropout;
use crate::sites::{SitePlan, Tap};
use crate::transformer::{ActivationCheckpointing, LayerPass};
use crate::transformer::{Block, Computing, Norm, Part, Precision};
use crate::{Inputs, Pooling};

/// A bidirectional transformer with a class at its end.
#[derive(Module, Debug)]
pub struct Encoder {
    /// From the input to the residual stream.
    pub input: InputLayer,
    /// `[1, d_model]`: the token in front; `None` without.
    pub class_token: Option<Param<Tensor<2>>>,
    /// `[positions, d_model]`: learned positions, that of the class token first.
    pub positions: Param<Tensor<2>>,
    /// Layers, first to last.
    pub layers: Vec<Block>,
    /// Before the pooling.
    pub norm: Norm,
    /// From positions to one vector.
    pub pooling: Pooling,
    /// `[d_model, classes]`
    pub head: Linear,
    #[module(skip)]
    config: EncoderConfig,
    #[module(skip)]
    computing: Computing,
}

/// From the input to the residual stream.
#[derive(Module, Debug)]
pub enum InputLayer {
    /// Of patches: `[channels * side², d_model]`.
    Projection(Linear),
    /// Of tokens: `[vocab, d_model]`.
    Embedding(Param<Tensor<2>>),
}

impl EncoderConfig {
    /// Fresh weights.
    pub(super) fn init(self, n_classes: usize, device: &Device) -> Encoder {
        let (d_model, n_layers) = (self.transformer.d_model, self.transformer.n_layers);
        let class_token = self.has_class_token();
        let normal =
            |rows: usize| Param::from_tensor(random([rows, d_model], Distribution::Normal(0.0, INIT_STD), device));
        let input = match self.source {
            Source::Patches { channels, side, .. } => {
                InputLayer::Projection(linear(channels * side * side, d_model, true, INIT_STD, device))
            }
            Source::Tokens { vocab_size, .. } => InputLayer::Embedding(normal(vocab_size)),
        };
        Encoder {
            input,
            class_token: class_token.then(|| normal(1)),
            positions: normal(self.source.positions() + usize::from(class_token)),
            layers: (0..n_layers).map(|index| self.transformer.init_layer(index, device)).collect(),
            norm: self.transformer.init_norm(device),
            pooling: self.pooling.init(d_model, n_layers, device),
            head: linear(d_model, n_classes, true, INIT_STD, device),
            config: self,
            computing: Computing::default(),
        }
    }

    /// Costs by part, operations per example.
    pub(super) fn parts(&self, n_classes: usize) -> Vec<Part> {
        let (d_model, n_layers) = (self.transformer.d_model as u64, self.transformer.n_layers);
        let front = u64::from(self.has_class_token());
        let positions = self.source.positions() as u64 + front;
        let input = match self.source {
            Source::Patches { channels, side, .. } => {
                let width = (channels * side * side) as u64;
                Part::new("patches", (width + 1) * d_model, 2 * (positions - front) * width * d_model)
            }
            Source::Tokens { vocab_size, .. } => Part::new("embedding", vocab_size as u64 * d_model, 0),
        };
        let mut parts = vec![input, Part::new("positions", (positions + front) * d_model, 0)];
        parts.extend(self.transformer.parts(Some(positions)));
        parts.push(Part::new("pooling", self.pooling.parameters(self.transformer.d_model, n_layers), 0));
        parts.push(Part::new("head", (d_model + 1) * n_classes as u64, 2 * d_model * n_classes as u64));
        parts
    }

    /// Numbers that a forward pass keeps of an example for its backward pass, roughly.
    pub(super) fn kept_numbers(&self, checkpointed: bool) -> usize {
        self.source.positions().saturating_mul(self.transformer.kept_elements(checkpointed))
    }
}

/// What an encoder made of a batch, with what was read on the way.
#[derive(Debug)]
pub struct EncoderRead {
    /// Scores of the classes.
    pub scored: Scored,
    /// `[batch, d_model]`: what the head reads.
    pub pooled: Tensor<2>,
    /// What was read, in the order of layers and sites.
    pub taps: Vec<Tap>,
}

/// What a batch is, on the device.
struct Batched {
    /// `[batch, positions, d_model]`: what the first layer reads.
    hidden: Tensor<3>,
    /// `[batch, positions]`, true for padding; `None` where there is none.
    padding: Option<Tensor<2, Bool>>,
    /// The same, as mechanisms are told.
    mask: Mask,
}

impl Encoder {
    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.positions.val().device()
    }

    /// Rows and columns of the patches, which come behind a class token; `None` for texts.
    pub fn patch_grid(&self) -> Option<[usize; 2]> {
        match self.config.source {
            Source::Patches { grid, .. } => Some(grid),
            Source::Tokens { .. } => None,
        }
    }

    /// Scores of the classes.
    ///
    /// # Panics
    /// If the inputs are of another kind or size than the model was made for.
    pub fn forward(&self, inputs: &Inputs, observe: Observe) -> Scored {
        self.read(inputs, observe, &SitePlan::default()).scored
    }

    /// The same with what is read and changed on the way.
    ///
    /// # Panics
    /// If the inputs are of another kind or size than the model was made for.
    pub fn read(&self, inputs: &Inputs, observe: Observe, sites: &SitePlan) -> EncoderRead {
        let Batched { mut hidden, padding, mask } = self.embed(inputs);
        let eps = self.config.transformer.norm_eps;
        let (mut outputs, mut penalties, mut seen, mut taps) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let pass = LayerPass::new(self.computing.checkpointing);
        for (index, layer) in self.layers.iter().enumerate() {
            let _span = tracing::info_span!("layer", index).entered();
            let own = sites.of_layer(index, 0);
            let call = Call {
                observe: observe.clone(),
                sites: Sites { own: own.as_ref(), ..Sites::default() },
                ..Call::new(&mask)
            };
            let attended = self.through(&pass, layer, hidden, call);
            taps.extend(own.into_iter().flat_map(|own| Tap::of_layer(index, own)));
            hidden = attended.hidden;
            penalties.extend(attended.penalty);
            seen.extend(attended.seen);
            outputs.push(hidden.clone());
        }
        let first = if matches!(self.pooling, Pooling::Mltp(_)) { 0 } else { outputs.len() - 1 };
        let normed: Vec<Tensor<3>> = outputs.drain(first..).map(|output| self.norm.forward(output, eps)).collect();
        let pooled = self.pooling.forward(&normed, padding.as_ref());
        let bias = self.head.bias.as_ref().map(Param::val);
        let logits = polyhead_kernels::linear(pooled.clone(), self.head.weight.val(), bias);
        EncoderRead { scored: Scored { logits, penalties, seen, factor: None }, pooled, taps }
    }

    /// The model with its products in another precision.
    pub(super) fn with_precision(self, precision: Precision) -> Self {
        Self { computing: Computing { precision, ..self.computing }, ..self }
    }

    /// The model with dropout at this rate while it trains.
    pub(super) fn with_dropout(self, dropout: f64) -> Self {
        Self { computing: Computing { dropout, ..self.computing }, ..self }
    }

    /// The model that keeps other activations while it is trained.
    pub(super) fn with_checkpointing(self, checkpointing: ActivationCheckpointing) -> Self {
        Self { computing: Computing { checkpointing, ..self.computing }, ..self }
    }

    fn through(&self, pass: &LayerPass, layer: &Block, hidden: Tensor<3>, call: Call<'_>) -> Attended {
        let transformer = &self.config.transformer;
        let call = Call { grid: transformer.grid, ..call };
        pass.forward(layer, hidden, call, transformer, self.computing)
    }

    /// Whether any layer has something to do before the step `step` of training, from 0.
    pub(super) fn is_due(&self, step: u64) -> bool {
        self.layers.iter().any(|layer| layer.attention.is_due(step))
    }

    /// What layers do before the step `step` of training, from 0: each by what it reads once those before it are done.
    pub(super) fn before_step(&mut self, inputs: &Inputs, step: u64) {
        let Some(last) = self.layers.iter().rposition(|layer| layer.attention.is_due(step)) else { return };
        let Batched { mut hidden, mask, .. } = self.embed(inputs);
        let pass = LayerPass::new(ActivationCheckpointing::None);
        for index in 0..=last {
            let layer = &mut self.layers[index];
            if layer.attention.is_due(step) {
                let read = layer.attention_norm.forward(hidden.clone(), self.config.transformer.norm_eps);
                layer.attention.before_step(read, &mask, step);
            }
            hidden = self.through(&pass, &self.layers[index], hidden, Call::new(&mask)).hidden;
        }
    }

    fn embed(&self, inputs: &Inputs) -> Batched {
        let device = self.device();
        let front = usize::from(self.class_token.is_some());
        let (embedded, lengths) = match (inputs, &self.input, self.config.source) {
            (Inputs::Images { pixels, channels, height, width }, InputLayer::Projection(layer), source) => {
                let Source::Patches { side, grid, .. } = source else { unreachable!("a projection is of patches") };
                assert_eq!([height / side, width / side], grid, "images have another size than the model's");
                let count = pixels.len() / (channels * height * width);
                let pixels = TensorData::new(pixels.clone(), [count, *channels, *height, *width]);
                let patches = patches(Tensor::from_data(pixels, &device), side);
                let bias = layer.bias.as_ref().map(Param::val);
                (polyhead_kernels::linear(patches, layer.weight.val(), bias), None)
            }
            (Inputs::Tokens { tokens, lengths, seq_len }, InputLayer::Embedding(table), _) => {
                let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
                let count = ids.len();
                let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &device);
                let rows =
                    embedding(table.val(), ids).reshape([lengths.len(), *seq_len, self.config.transformer.d_model]);
                let lengths: Vec<usize> = lengths.iter().map(|&length| length as usize + front).collect();
                (rows, Some(lengths))
            }
            (_, layer, _) => panic!("the model reads through {layer:?}"),
        };
        let [batch, _, d_model] = embedded.dims();
        let token = self.class_token.as_ref().map(|token| token.val().unsqueeze::<3>().expand([batch, 1, d_model]));
        let all = Tensor::cat(token.into_iter().chain([embedded]).collect(), 1);
        let count = all.dims()[1];
        let hidden = all + self.positions.val().narrow(0, 0, count).unsqueeze::<3>();
        let hidden = dropout(hidden, self.computing.dropout);
        let lengths = lengths.filter(|lengths| lengths.iter().any(|&length| length < count));
        let mask = lengths.as_ref().map_or_else(Mask::none, |lengths| Mask::none().with_lengths(lengths));
        let padding = lengths.map(|lengths| behind(&lengths, count, &device));
        Batched { hidden, padding, mask }
    }
}

/// `[batch, channels, height, width]` to `[batch, patches, channels * side²]`, patches row by row.
fn patches(images: Tensor<4>, side: usize) -> Tensor<3> {
    let [batch, channels, height, width] = images.dims();
    let (rows, columns) = (height / side, width / side);
    let cut = images.reshape([batch, channels, rows, side, columns, side]);
    cut.permute([0, 2, 4, 1, 3, 5]).reshape([batch, rows * columns, channels * side * side])
}

/// `[batch, positions]`: true behind each length.
fn behind(lengths: &[usize], count: usize, device: &Device) -> Tensor<2, Bool> {
    let hidden: Vec<i32> =
        lengths.iter().flat_map(|&length| (0..count).map(move |position| i32::from(position >= length))).collect();
    Tensor::<2, Int>::from_data(TensorData::new(hidden, [lengths.len(), count]), device).equal_elem(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_cut_row_by_row() {
        let device = Device::flex();
        // Every pixel holds the number of its patch.
        let map = Tensor::<1, Int>::arange(0..24, &device).float().reshape([1, 1, 4, 1, 6, 1]);
        let images = map.expand([2, 3, 4, 2, 6, 2]).reshape([2, 3, 8, 12]);
        let want = Tensor::<1, Int>::arange(0..24, &device).float().reshape([1, 24, 1]).expand([2, 24, 12]);
        patches(images, 2).into_data().assert_eq(&want.into_data(), true);
        // And inside of a patch: channel, then row, then column.
        let one = Tensor::<1, Int>::arange(0..12, &device).float();
        let inside = patches(one.clone().reshape([1, 3, 2, 2]), 2);
        inside.into_data().assert_eq(&one.reshape([1, 1, 12]).into_data(), true);
    }
}
