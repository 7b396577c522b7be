//! A [`Decoder`] in Hugging Face's format.
//!
//! It becomes the family that its mechanism names for its settings (softmax attention: Llama, Qwen2, Qwen3 or GPT-NeoX), where
//! the layers around are that family's too. Heads that are shared in equal groups are written as such (GQA), whatever
//! mechanism shared them. What no family has is written under a class of our own, whose code (`python/`) goes into the folder.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{self, Write};

use polyhead_attention::{AttentionConfig, Family, Form, GroupedDifferentialConfig, Published, RopeLayout};
use serde_json::{Value, json};

use super::files;
use super::import::transpose;
use super::names::{Layout, MASKED, POLYHEAD, place};
use super::own;
use crate::surgery::{SurgeryError, standard_grouped};
use crate::weights::{Held, Named, ToWrite, held, write_safetensors};
use crate::{Decoder, DecoderConfig, MlpKind, NormKind, RopeScaling};

/// What the format needs to know besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExportOptions {
    /// The longest sequence that the model was trained on.
    pub max_positions: usize,
    /// The id that begins a text, where there is one of its own.
    pub begin_of_text: Option<u32>,
    /// The id that ends a text.
    pub end_of_text: Option<u32>,
    /// The id that fills up rows; there is one where there is a tokenizer.
    pub pad: Option<u32>,
    /// Whether the class has to be one of transformers' own, its tensors rearranged where that is needed.
    pub native: bool,
}

impl ExportOptions {
    fn begins(self) -> Option<u32> {
        self.begin_of_text.or(self.end_of_text)
    }
}

/// Why a model cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Query heads could not be put in groups.
    #[error(transparent)]
    Surgery(#[from] SurgeryError),
    /// Neither a class of transformers nor the code that is written beside the weights computes this.
    #[error(
        "models with autoencoder predict a row from one vector, which exports are not for: train one without it to export it"
    )]
    Autoencoder,
    /// The code that is written beside the weights knows groups of query heads that are the same for all texts.
    #[error(
        "key_driven groups the heads of a masked diffusion model by the text, which exports do not: allocation even or fixed can be exported"
    )]
    Grouping,
    /// No class of transformers computes this.
    #[error("--native: {0}; without --native, code for transformers is written beside the weights")]
    NotNative(String),
}

/// The code of decoders that transformers does not have, by file name.
const REMOTE_CODE: [(&str, &str); 2] = [
    ("configuration_polyhead.py", include_str!("python/configuration_polyhead.py")),
    ("modeling_polyhead.py", include_str!("python/modeling_polyhead.py")),
];

/// A model in the format.
#[derive(Debug)]
pub struct Exported {
    /// All files but model.safetensors, by name: config.json, generation_config.json, and the code of the model in PyTorch where
    /// transformers has none.
    pub files: Vec<(String, Vec<u8>)>,
    tensors: Vec<Placed>,
}

impl Exported {
    /// Bytes of model.safetensors, but for its header.
    pub fn bytes(&self) -> u64 {
        4 * self.tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum::<u64>()
    }

    /// Writes model.safetensors tensor by tensor: the weights are never held twice.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn write_weights(&self, out: &mut dyn Write) -> io::Result<()> {
        write_safetensors(&self.tensors, &[("format", "pt".into())], out).map(drop)
    }
}

/// A decoder in the format.
///
/// # Errors
/// If it cannot be said as asked for.
pub fn export(model: &Decoder, options: ExportOptions) -> Result<Exported, ExportError> {
    if model.config().autoencoder {
        return Err(ExportError::Autoencoder);
    }
    let masked = model.is_masked_diffusion();
    if masked && (0..model.layers.len()).any(|layer| model.config().mechanism(layer).check_causal().is_err()) {
        return Err(ExportError::Grouping);
    }
    // A predictor of boundaries is no part of what others compute.
    let model = &model.clone().without_boundaries();
    let grouped = standard_grouped(model)?;
    let grouped = grouped.as_ref().and_then(|grouped| Some((grouped, published(grouped.config()).ok()?)));
    let (model, published) = match grouped {
        Some((grouped, published)) => (grouped, Some(published)),
        None => (model, published(model.config()).ok()),
    };
    let rearranged = options.native && published.as_ref().is_none_or(|published| published.family.remote_code);
    let (published, tensors) = match rearranged {
        true => (Some(diff_llama(model.config()).map_err(ExportError::NotNative)?), unstriped(model)),
        false => (published, held(model)),
    };
    let family = published.as_ref().map_or(own_family(model), |published| published.family);
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let mut config = match published {
        Some(published) => published_keys(model, published, options),
        None => with(about(model, family, options), own::keys(model.config())),
    };
    if family.remote_code {
        config["auto_map"] = json!({
            "AutoConfig": "configuration_polyhead.PolyheadConfig", "AutoModel": "modeling_polyhead.PolyheadModel",
        });
        let auto = if masked { "AutoModelForMaskedLM" } else { "AutoModelForCausalLM" };
        let class = if masked { &MASKED } else { &POLYHEAD }.class();
        config["auto_map"][auto] = format!("modeling_polyhead.{class}").into();
    }
    let generation =
        json!({ "bos_token_id": options.begins(), "eos_token_id": options.end_of_text, "do_sample": true });
    let tensors = placed(tensors, model.config(), family);
    let mut made = vec![(files::CONFIG.into(), text(&config))];
    if !masked {
        made.push((files::GENERATION_CONFIG.into(), text(&generation)));
    }
    if family.remote_code {
        made.extend(REMOTE_CODE.map(|(name, code)| (name.into(), code.as_bytes().to_vec())));
    }
    Ok(Exported { files: made, tensors })
}

/// The family of ours that a decoder is of where no published one has it.
fn own_family(model: &Decoder) -> &'static Family {
    if model.is_masked_diffusion() { &MASKED } else { &POLYHEAD }
}

/// The published family that has such a decoder, and what its config.json says of attention.
///
/// # Errors
/// Why no family has it.
fn published(config: &DecoderConfig) -> Result<Published, String> {
    let layers: Vec<_> = (0..config.n_layers).map(|layer| config.mechanism(layer)).collect();
    AttentionConfig::published(&layers, &config.dims(0), form(config)?)
}

/// The same of transformers' DiffLlama.
///
/// # Errors
/// Why it does not have such a decoder.
fn diff_llama(config: &DecoderConfig) -> Result<Published, String> {
    let layers: Option<Vec<&GroupedDifferentialConfig>> =
        (0..config.n_layers).map(|layer| config.mechanism(layer).get()).collect();
    let layers = layers.ok_or(
        "of mechanisms without a class in transformers, only the Differential Transformer has another form there",
    )?;
    GroupedDifferentialConfig::diff_llama(&layers, &config.dims(0), form(config)?)
}

/// The form of the layers around attention.
///
/// # Errors
/// If it is no published family's.
fn form(config: &DecoderConfig) -> Result<Form, String> {
    let whole = config.rope_fraction == 1.0;
    match (config.norm, config.mlp) {
        _ if config.masked_diffusion => {
            Err("model.decoder.masked_diffusion = true: published families read from left to right".into())
        }
        _ if !config.rope => Err("model.decoder.rope = false: published families rotate positions".into()),
        _ if config.learned_positions.is_some() || config.head_bias => {
            Err("model.decoder.learned_positions, head_bias: published families have neither".into())
        }
        _ if config.attention_gate.is_some() => {
            Err("model.decoder.attention_gate: published families have no such gates".into())
        }
        (NormKind::Layer, MlpKind::Gelu) => Ok(Form::GptNeox),
        (NormKind::Rms, MlpKind::Swiglu) if whole && !config.parallel_residual => Ok(Form::Llama),
        (norm, mlp) => Err(format!(
            "norm {norm:?} with mlp {mlp:?}, rope_fraction {} and parallel_residual {} are together in no published family",
            config.rope_fraction, config.parallel_residual
        )),
    }
}

/// The tensors of a Differential Transformer as DiffLlama has them: all signal heads before all noise heads, the weights of
/// subln in the output projection.
fn unstriped(model: &Decoder) -> Vec<Held> {
    let (head_dim, device) = (model.config().head_dim(0), model.device());
    let (norms, tensors): (Vec<Held>, Vec<Held>) =
        held(model).into_iter().partition(|tensor| tensor.name.ends_with(".subln.weight"));
    let rearranged = |tensor: Held| {
        let columns = tensor.shape.last().copied().unwrap_or_default();
        let layer = tensor.name.strip_suffix(".o_proj.weight");
        let norm = layer.and_then(|layer| norms.iter().find(|norm| norm.name == format!("{layer}.subln.weight")));
        let values: Vec<f32> = if let Some(norm) = norm {
            let norm = norm.values();
            let scaled = |(at, value): (usize, f32)| value * norm[at / columns % norm.len()];
            tensor.values().into_iter().enumerate().map(scaled).collect()
        } else if [".q_proj.", ".k_proj.", ".v_proj."].iter().any(|part| tensor.name.contains(part)) {
            // Ours alternate: a signal, its noise, the next signal; of values, both halves of a pair.
            let heads = |row: &[f32], first: usize| -> Vec<f32> {
                row.chunks(head_dim).skip(first).step_by(2).flatten().copied().collect()
            };
            tensor.values().chunks(columns).flat_map(|row| [heads(row, 0), heads(row, 1)].concat()).collect()
        } else {
            return tensor;
        };
        Held::on_device(Named { name: tensor.name, shape: tensor.shape, values }, &device)
    };
    tensors.into_iter().map(rearranged).collect()
}

/// What a person has to know about the export of a decoder, as sentences.
pub fn notes(model: &Decoder, options: ExportOptions) -> Vec<String> {
    let Ok(standard) = standard_grouped(model) else { return Vec::new() };
    let of = |model: &Decoder| published(model.config());
    match standard.as_ref().map_or_else(|| of(model), |standard| of(standard).or_else(|_| of(model))) {
        Err(_) if options.native => vec![NATIVE.into()],
        Ok(published) if published.family.remote_code && options.native => vec![NATIVE.into()],
        Err(problem) => vec![remote_note(own_family(model), &format!(" ({problem})"))],
        Ok(published) if published.family.remote_code => vec![remote_note(published.family, "")],
        // For every model of the type qwen2, `AutoTokenizer` of transformers 5 builds Qwen's own tokenizer (its way of splitting,
        // and NFC) around the vocabulary, whatever the files say: some texts then get other ids than in training.
        Ok(published) if options.pad.is_some() && published.family.model_type() == "qwen2" => vec![
            "AutoTokenizer of transformers 5 gives every Qwen2 model Qwen's own rules of splitting text; unless this tokenizer \
             is Qwen's, load it with PreTrainedTokenizerFast.from_pretrained instead"
                .into(),
        ],
        Ok(_) => Vec::new(),
    }
}

/// What `native` does to a Differential Transformer.
const NATIVE: &str = "written as transformers' DiffLlamaForCausalLM, which computes the same from heads in another order and \
                      subln's weights in the output projection; Polyhead does not read it back: keep the checkpoint";

/// How transformers loads a family that it does not have.
fn remote_note(family: &Family, why: &str) -> String {
    let auto = if *family == MASKED { "AutoModelForMaskedLM" } else { "AutoModelForCausalLM" };
    format!(
        "written as {}, which transformers does not have{why}: the folder has its code in PyTorch, which \
         {auto}.from_pretrained(DIR, trust_remote_code=True) runs",
        family.class()
    )
}

/// What every config.json says of a model as a whole.
fn about(model: &Decoder, family: &Family, options: ExportOptions) -> Value {
    let rows = model.config().rows(model.vocab_size());
    let mut about = json!({
        "architectures": [family.class()], "model_type": family.model_type(),
        "vocab_size": rows, "max_position_embeddings": options.max_positions,
        "bos_token_id": options.begins(), "eos_token_id": options.end_of_text, "pad_token_id": options.pad,
        "torch_dtype": "float32",
    });
    if model.is_masked_diffusion() {
        about["mask_token_id"] = model.mask_id().into();
    }
    about
}

/// config.json of a published family.
fn published_keys(model: &Decoder, Published { family, keys }: Published, options: ExportOptions) -> Value {
    let config = model.config();
    let (rope, old_scaling) = rope(config);
    let mut json = json!({
        "architectures": [family.class()], "model_type": family.model_type(),
        "hidden_size": config.d_model, "intermediate_size": config.feed_forward(), "num_hidden_layers": config.n_layers,
        "head_dim": config.head_dim(0), "vocab_size": model.vocab_size(), "max_position_embeddings": options.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        // transformers 4 reads the first two and ignores the third without a word; 5 reads the third.
        "rope_theta": config.rope_theta, "rope_scaling": old_scaling, "rope_parameters": rope,
        "bos_token_id": options.begins(), "eos_token_id": options.end_of_text, "pad_token_id": options.pad,
        "torch_dtype": "float32", "use_cache": true, "initializer_range": polyhead_attention::INIT_STD,
    });
    let neox = family.form == Form::GptNeox;
    json[if neox { "layer_norm_eps" } else { "rms_norm_eps" }] = config.norm_eps.into();
    json["hidden_act"] = if neox { "gelu" } else { "silu" }.into();
    for (key, value) in keys {
        // Where it has always stood.
        if neox && key == "attention_bias" {
            json["use_parallel_residual"] = config.parallel_residual.into();
        }
        json[key] = json!(value);
    }
    if neox {
        json["rotary_emb_base"] = config.rope_theta.into();
        json["rotary_pct"] = config.rope_fraction.into();
    }
    json
}

/// Rotary positions as transformers 5 and as transformers 4 want them.
pub(super) fn rope(config: &DecoderConfig) -> (Value, Value) {
    let (kind, scaling) = match &config.rope_scaling {
        None => ("default", json!({})),
        Some(RopeScaling::Linear(linear)) => ("linear", json!(linear)),
        Some(RopeScaling::Llama3(llama3)) => ("llama3", json!(llama3)),
    };
    let scaling = with(json!({ "rope_type": kind }), scaling);
    let old = if config.rope_scaling.is_some() { scaling.clone() } else { Value::Null };
    let more = json!({ "rope_theta": config.rope_theta, "partial_rotary_factor": config.rope_fraction });
    (with(scaling, more), old)
}

fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

/// A tensor of the file: one of ours, or queries, keys and values in one.
#[derive(Debug)]
struct Placed {
    name: String,
    /// In the file.
    shape: Vec<usize>,
    parts: Vec<Held>,
    transposed: bool,
    /// Channels of a head, and how many of them rotate, where rotated pairs become halves.
    halves: Option<[usize; 2]>,
    head_dim: usize,
}

impl Placed {
    fn values(&self, part: &Held) -> Named {
        let tensor = if self.transposed { transposed(part.named()) } else { part.named() };
        match self.halves {
            Some([head_dim, rotated]) => halves_from_pairs(tensor, head_dim, rotated),
            None => tensor,
        }
    }
}

impl ToWrite for Placed {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn pieces(&self, take: &mut dyn FnMut(&[f32]) -> io::Result<()>) -> io::Result<()> {
        match &self.parts[..] {
            [part] if !self.transposed && self.halves.is_none() => part.pieces(take),
            [part] => take(&self.values(part).values),
            parts => take(&joined(parts.iter().map(|part| self.values(part)).collect(), self.head_dim).values),
        }
    }
}

/// The tensors under the family's names, `[out, in]` where they are projections; in the rotate-half layout, but for our own
/// class, whose config.json names the layout.
fn placed(tensors: Vec<Held>, config: &DecoderConfig, family: &Family) -> Vec<Placed> {
    let head_dim = config.head_dim(0);
    let pairs = config.rope_layout == RopeLayout::Interleaved && family.model_type() != POLYHEAD.model_type();
    let mut thirds: BTreeMap<String, Placed> = BTreeMap::new();
    let mut out = Vec::new();
    for tensor in tensors {
        let rotated = [".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."].iter().any(|part| tensor.name.contains(part));
        let place = place(family, &tensor.name);
        let mut shape = tensor.shape.clone();
        let transposed = place.layout != Layout::Same && shape.len() == 2;
        if transposed {
            shape.reverse();
        }
        let halves = (pairs && rotated).then(|| [head_dim, config.rotated(0)]);
        let name = place.name.clone();
        let mut one = Placed { name: place.name, shape, parts: vec![tensor], transposed, halves, head_dim };
        if !matches!(place.layout, Layout::Third(_)) {
            out.push(one);
            continue;
        }
        one.shape[0] *= 3;
        match thirds.entry(name) {
            // Queries, keys and values come in this order, as fields of the layer.
            Entry::Occupied(mut others) => others.get_mut().parts.extend(one.parts),
            Entry::Vacant(first) => drop(first.insert(one)),
        }
    }
    out.extend(thirds.into_values());
    out
}

/// Queries, keys and values with their rows as `[n_heads, 3, head_dim]`.
fn joined(parts: Vec<Named>, head_dim: usize) -> Named {
    let first = &parts[0];
    let head = head_dim * first.values.len() / first.shape[0];
    let mut values = Vec::with_capacity(3 * first.values.len());
    for at in (0..first.values.len()).step_by(head) {
        for part in &parts {
            values.extend_from_slice(&part.values[at..at + head]);
        }
    }
    let mut shape = first.shape.clone();
    shape[0] *= 3;
    Named { name: first.name.clone(), shape, values }
}

fn transposed(tensor: Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor };
    Named { values: transpose(&tensor.values, rows), shape: vec![columns, rows], ..tensor }
}

/// Reorders the rotated rows of every head from pairs (2i, 2i + 1) to pairs (i, i + rotated/2): scores stay the same.
fn halves_from_pairs(tensor: Named, head_dim: usize, rotated: usize) -> Named {
    let rows = tensor.shape[0];
    let width = tensor.values.len() / rows;
    let source = |row: usize| {
        let (head, channel) = (row / head_dim, row % head_dim);
        let half = rotated / 2;
        let from = match channel {
            channel if channel < half => 2 * channel,
            channel if channel < rotated => 2 * (channel - half) + 1,
            still => still,
        };
        head * head_dim + from
    };
    let row = |at: usize| &tensor.values[at * width..(at + 1) * width];
    let values = (0..rows).flat_map(|at| row(source(at)).iter().copied()).collect();
    Named { values, ..tensor }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::weights::{load, named};
    use burn::tensor::{Device, Int, Tensor};
    use polyhead_attention::{Mask, Observe};
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close};

    fn config(layout: RopeLayout, tied: bool) -> DecoderConfig {
        let attention = json!({ "softmax": { "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true } });
        serde_json::from_value(json!({
            "d_model": 16, "n_layers": 2, "d_ff": 24, "rope_layout": layout, "tie_embeddings": tied, "attention": attention,
        }))
        .unwrap()
    }

    fn exported(model: &Decoder) -> Exported {
        export(model, ExportOptions { max_positions: 32, end_of_text: Some(1), ..Default::default() }).unwrap()
    }

    #[test]
    fn names_and_shapes_are_the_formats() {
        for tied in [true, false] {
            let model = exported(&config(RopeLayout::RotateHalf, tied).init(10, &Device::flex()));
            let mut bytes = Vec::new();
            model.write_weights(&mut bytes).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
            assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [8, 16]);
            assert_eq!(shape("model.layers.0.self_attn.q_proj.bias"), [16]);
            assert_eq!(shape("model.layers.0.mlp.down_proj.weight"), [16, 24]);
            assert_eq!(shape("model.embed_tokens.weight"), [10, 16]);
            assert_eq!(tensors.tensor("lm_head.weight").is_ok(), !tied);
            assert_eq!(tensors.len(), 2 + 2 * 12 + usize::from(!tied));
            let json: Value = serde_json::from_slice(&model.files[0].1).unwrap();
            assert_eq!(json["architectures"][0], "Qwen2ForCausalLM");
            let model = config(RopeLayout::RotateHalf, tied).init(10, &Device::flex());
            let told = |pad| notes(&model, ExportOptions { pad, ..Default::default() });
            assert!(told(Some(0))[0].contains("PreTrainedTokenizerFast") && told(None).is_empty());
        }
    }

    #[test]
    fn interleaved_pairs_are_reordered_without_changing_a_logit() {
        let device = Device::flex();
        let pairs = config(RopeLayout::Interleaved, true).init(10, &device);
        // Large weights, so that rotations matter; the same in every run, as the device's random numbers are not.
        let louder = |tensor: Named| {
            let wave = |(at, value): (usize, &f32)| match tensor.shape.len() {
                2 => 0.4 * ((at * 37 + tensor.values.len()) as f32).sin(),
                _ => *value + 0.1 * (at as f32).sin(),
            };
            let values = tensor.values.iter().enumerate().map(wave).collect();
            (tensor.name.clone(), Named { values, ..tensor })
        };
        let pairs = load(pairs.clone(), named(&pairs).into_iter().map(louder).collect()).unwrap();
        let reorder = |tensor: Named| {
            let (name, rotated) =
                (tensor.name.clone(), tensor.name.contains("q_proj") || tensor.name.contains("k_proj"));
            let two = tensor.shape.len() == 2;
            let tensor = match (rotated, two) {
                (true, true) => transposed(halves_from_pairs(transposed(tensor), 4, 4)),
                (true, false) => halves_from_pairs(tensor, 4, 4),
                _ => tensor,
            };
            (name, tensor)
        };
        let halves = config(RopeLayout::RotateHalf, true).init(10, &device);
        let halves = load(halves, named(&pairs).into_iter().map(reorder).collect()).unwrap();
        let logits = |model: &Decoder| {
            let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6, 7]], &device);
            model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden)
        };
        assert_tensors_close("logits", logits(&pairs), logits(&halves), Tolerance::absolute(1e-4));
    }
}
