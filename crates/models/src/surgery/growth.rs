//! A larger model that computes the same function: signal heads of grouped differential attention, channels, layers.
//!
//! Growing signal heads alone, while noise heads stay and are shared by more of them, is group-differentiated growth (arXiv
//! 2510.06949); channels are cloned as in HyperCloning (Samragh et al. 2024, arXiv 2409.12903); new layers are copies that
//! add nothing yet (LLaMA-Pro: Wu et al. 2024, arXiv 2401.02415). The scaling of the output projection is ours: the paper's
//! was not readable.
//!
//! Everything is one rule. Growing repeats units: signal heads, channels of the residual stream, units of feed-forward
//! layers. Whatever *writes* them is repeated with them; whatever *reads* them (the rows of a projection) is repeated and
//! divided by the number of replicas, so that the sum is what it was.
//!
//! Exact replicas would get the same gradients for ever. So noise is added to what reads them, with a sum of zero over the
//! replicas of a unit: the function stays, and the gradients of the replicas differ from the first step on.
//!
//! What grows in its own way (signal heads) or follows the depth of a layer (λ_init, windows) the mechanism tells
//! ([`MechanismConfig::grown`](polyhead_attention::MechanismConfig::grown)); the grown model keeps every layer's numbers.

use std::collections::BTreeMap;

use polyhead_attention::{AttentionConfig, Dims, HeadChannels};
use polyhead_kernels::without_drawing;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::SurgeryError;
use super::convert::refused;
use crate::weights::{Held, Named, held, layer_of, load_held};
use crate::{Decoder, DecoderConfig, MlpKind, PerLayer};

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// Signal heads become this many times as many; 1 leaves them.
    pub signal_heads: usize,
    /// Channels of the residual stream and units of feed-forward layers become this many times as many; 1 leaves them.
    pub width: usize,
    /// Layers afterwards; `None` leaves them.
    pub depth: Option<usize>,
    /// Standard deviation of the noise, in shares of the root mean square of the weights it is added to.
    pub noise: f64,
    /// Decides the noise.
    pub seed: u64,
}

impl Growth {
    /// 10 dB below the weights, HyperCloning's noisy variant.
    pub const NOISE: f64 = 0.316;
}

impl Default for Growth {
    fn default() -> Self {
        Self { signal_heads: 1, width: 1, depth: None, noise: Self::NOISE, seed: 0 }
    }
}

/// The grown model: the same logits but for rounding.
///
/// # Errors
/// If nothing would grow, or the model has no such parts.
pub fn grow(parent: &Decoder, growth: &Growth) -> Result<Decoder, SurgeryError> {
    let config = grown_config(parent.config(), growth)?;
    let sources = sources(parent.config().n_layers, config.n_layers);
    let device = parent.device();
    let mut by_layer: BTreeMap<Option<usize>, Vec<Held>> = BTreeMap::new();
    for tensor in held(parent) {
        by_layer.entry(layer_of(&tensor.name)).or_default().push(tensor);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(growth.seed);
    let mut grown = BTreeMap::new();
    let mut put = |name: String, tensor: &Named, rng: &mut ChaCha8Rng| {
        let plan = Plan::of(&tensor.name, parent.config(), growth);
        let tensor = Named { name: name.clone(), ..plan.apply(tensor, growth.noise, rng) };
        grown.insert(name, Held::on_device(tensor, &device));
    };
    for tensor in by_layer.get(&None).into_iter().flatten() {
        put(tensor.name.clone(), &tensor.named(), &mut rng);
    }
    for (layer, source) in sources.iter().enumerate() {
        let old = format!("layers.{}.", source.layer());
        for tensor in by_layer.get(&Some(source.layer())).into_iter().flatten() {
            let name = tensor.name.replacen(&old, &format!("layers.{layer}."), 1);
            let adds = tensor.name.contains(".o_proj.") || tensor.name.contains(".down_proj.");
            match source {
                Source::Copy(_) if adds => {
                    let mut nothing = tensor.named();
                    nothing.values.fill(0.0);
                    put(name, &nothing, &mut rng);
                }
                _ => put(name, &tensor.named(), &mut rng),
            }
        }
    }
    Ok(load_held(without_drawing(|| config.init(parent.vocab_size(), &device)), grown)?)
}

/// Where a layer of the grown model comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// It is this layer of the parent.
    Kept(usize),
    /// It is a copy of this one that adds nothing yet.
    Copy(usize),
}

impl Source {
    fn layer(self) -> usize {
        match self {
            Self::Kept(layer) | Self::Copy(layer) => layer,
        }
    }
}

/// New layers stand behind those that they copy, spread evenly over the depth.
fn sources(before: usize, after: usize) -> Vec<Source> {
    let new = after - before;
    let mut sources = Vec::with_capacity(after);
    for layer in 0..before {
        sources.push(Source::Kept(layer));
        let copies = (layer + 1) * new / before - layer * new / before;
        sources.extend(std::iter::repeat_n(Source::Copy(layer), copies));
    }
    sources
}

/// What factors may be at most: a grown size beyond that is no model's, and is refused as such. Chosen by us.
const MOST: usize = 1 << 20;

/// What a grown model is, before any of its weights is made.
///
/// # Errors
/// As [`grow`].
pub fn grown_config(parent: &DecoderConfig, growth: &Growth) -> Result<DecoderConfig, SurgeryError> {
    let Growth { signal_heads, width, depth, noise, .. } = *growth;
    let after = depth.unwrap_or(parent.n_layers);
    if signal_heads == 0 || width == 0 || !(noise.is_finite() && noise >= 0.0) {
        return refused(format!(
            "signal heads (x{signal_heads}) and width (x{width}) grow by whole numbers from 1 on, noise ({noise}) is 0 or more"
        ));
    }
    for (name, value) in [("signal heads", signal_heads), ("width", width), ("depth", after)] {
        if value > MOST {
            return refused(format!("{name} ({value}) must be at most {MOST}"));
        }
    }
    if after < parent.n_layers {
        return refused(format!("depth ({after}) must be at least the model's n_layers ({})", parent.n_layers));
    }
    if signal_heads == 1 && width == 1 && after == parent.n_layers {
        return refused("nothing grows: give signal heads, width or depth".into());
    }
    if parent.mlp == MlpKind::Identity || parent.autoencoder {
        return refused(
            "a model with mlp = \"identity\", whose layers add their normalised stream, or with autoencoder cannot grow".into(),
        );
    }
    if parent.attention_gate.is_some() {
        return refused(
            "a model with attention_gate cannot grow: its gates take statistics over channels that would be there \
                        twice"
                .into(),
        );
    }
    let from: Vec<usize> = sources(parent.n_layers, after).into_iter().map(Source::layer).collect();
    let grown = |layer: usize, sources: &[usize]| {
        let grown = grown_attention(layer, parent, signal_heads)?;
        Ok::<_, SurgeryError>(if after > parent.n_layers { grown.moved(sources) } else { grown })
    };
    let attention = match &parent.attention {
        PerLayer::Same(_) => PerLayer::Same(grown(0, &from)?),
        PerLayer::Each(_) => {
            PerLayer::Each(from.iter().map(|&layer| grown(layer, &[layer])).collect::<Result<_, _>>()?)
        }
    };
    let grown = DecoderConfig {
        d_model: parent.d_model * width,
        d_ff: Some(parent.feed_forward() * width),
        n_layers: after,
        attention,
        ..parent.clone()
    };
    grown.validate().map_err(|error| SurgeryError::Refused(error.to_string()))?;
    Ok(grown)
}

/// The attention of a layer, grown.
fn grown_attention(layer: usize, parent: &DecoderConfig, signal_heads: usize) -> Result<AttentionConfig, SurgeryError> {
    let old = parent.mechanism(layer);
    old.grown(&parent.dims(layer), signal_heads).or_else(|problem| {
        let grows = |config: &AttentionConfig| config.grown(&Dims::example(), 1).is_ok();
        let can: Vec<&str> =
            AttentionConfig::examples().iter().filter(|config| grows(config)).map(AttentionConfig::name).collect();
        let others = if grows(old) { String::new() } else { format!("; {} can", can.join(" and ")) };
        refused(format!("layer {layer} has {} attention, which {problem}{others}", old.name()))
    })
}

/// How a tensor grows: which row and column of the parent's each of its own comes from.
struct Plan {
    rows: Option<Vec<usize>>,
    columns: Option<Vec<usize>>,
    /// What all values are multiplied by, besides the division of rows that read replicas.
    factor: f32,
    /// Whether rows read what they stand for, so that those of replicas share the parent's.
    reads: bool,
}

impl Plan {
    fn of(name: &str, parent: &DecoderConfig, growth: &Growth) -> Self {
        let channels = || Some(cloned(parent.d_model, growth.width));
        let units = || Some(cloned(parent.feed_forward(), growth.width));
        let heads = |of| {
            let layer = layer_of(name)?;
            parent.mechanism(layer).repeated_channels(&parent.dims(layer), growth.signal_heads, of)
        };
        let last = |depth: usize| name.split('.').rev().nth(depth).unwrap_or_default();
        let (module, kind) = (last(1), last(0));
        let plan = |rows, columns, reads| Self { rows, columns, factor: 1.0, reads };
        match (module, kind) {
            ("embedding" | "positions", _) => plan(None, channels(), false),
            ("q_proj", "weight") => plan(channels(), heads(HeadChannels::Queries), true),
            ("q_proj", "bias") => plan(None, heads(HeadChannels::Queries), false),
            ("k_proj" | "v_proj" | "head", "weight") => plan(channels(), None, true),
            ("o_proj", "weight") => plan(heads(HeadChannels::Outputs), channels(), true),
            ("gate_proj" | "up_proj", "weight") => plan(channels(), units(), true),
            ("down_proj", "weight") => plan(units(), channels(), true),
            ("gate_proj" | "up_proj", "bias") => plan(None, units(), false),
            ("attention_norm" | "mlp_norm", _) | ("o_proj" | "down_proj", "bias") => plan(None, channels(), false),
            // A tied head reads all clones of the embedding and cannot be divided: what it reads is.
            ("norm", _) if parent.tie_embeddings => {
                Self { factor: 1.0 / growth.width as f32, ..plan(None, channels(), false) }
            }
            ("norm", _) => plan(None, channels(), false),
            _ => plan(None, None, false),
        }
    }

    fn apply(&self, tensor: &Named, noise: f64, rng: &mut ChaCha8Rng) -> Named {
        let (old_rows, old_columns) = match tensor.shape[..] {
            [rows, columns] => (rows, columns),
            _ => (1, tensor.values.len()),
        };
        let all = |n: usize| (0..n).collect::<Vec<_>>();
        let rows = self.rows.clone().unwrap_or_else(|| all(old_rows));
        let columns = self.columns.clone().unwrap_or_else(|| all(old_columns));
        let mut replicas = vec![0usize; old_rows];
        rows.iter().for_each(|&source| replicas[source] += 1);
        let share = |source: usize| if self.reads { self.factor / replicas[source] as f32 } else { self.factor };
        let noise = match self.reads && rows.len() > old_rows {
            true => zero_sum_noise(tensor, &rows, &replicas, noise, rng),
            false => vec![0.0; rows.len() * old_columns],
        };
        let values = rows.iter().enumerate().flat_map(|(row, &source)| {
            let (old, noise) = (&tensor.values[source * old_columns..], &noise[row * old_columns..]);
            columns.iter().map(move |&column| old[column] * share(source) + noise[column])
        });
        let shape = if tensor.shape.len() == 2 { vec![rows.len(), columns.len()] } else { vec![columns.len()] };
        Named { name: tensor.name.clone(), values: values.collect(), shape }
    }
}

/// `n` units and their clones.
fn cloned(n: usize, times: usize) -> Vec<usize> {
    (0..n * times).map(|unit| unit % n).collect()
}

/// `[rows, old columns]`: normal numbers whose sum over the replicas of each of the parent's rows is zero.
fn zero_sum_noise(tensor: &Named, rows: &[usize], replicas: &[usize], noise: f64, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let (old_rows, columns) = (tensor.shape[0], tensor.shape[1]);
    let square = tensor.values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    let scale = noise * (square / tensor.values.len().max(1) as f64).sqrt();
    let mut drawn: Vec<f64> = (0..rows.len() * columns)
        .map(|at| {
            if replicas[rows[at / columns]] > 1 {
                scale * normal(rng) / replicas[rows[at / columns]] as f64
            } else {
                0.0
            }
        })
        .collect();
    let mut means = vec![0.0; old_rows * columns];
    for (row, &source) in rows.iter().enumerate() {
        for column in 0..columns {
            means[source * columns + column] += drawn[row * columns + column] / replicas[source] as f64;
        }
    }
    for (row, &source) in rows.iter().enumerate() {
        for column in 0..columns {
            drawn[row * columns + column] -= means[source * columns + column];
        }
    }
    drawn.into_iter().map(|value| value as f32).collect()
}

/// Box-Muller.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests;
