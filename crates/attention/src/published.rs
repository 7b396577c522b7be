//! How attention is written in the config.json of published models, and read back.
//!
//! A mechanism that others publish states the families of models that have it, what their config.json says of its layers, and
//! which settings such keys are. One that states nothing is written with its own settings, beside code that transformers runs.

use serde::Serialize;

use crate::{HeadSplit, SoftmaxConfig};

/// A family of models that others publish: one class of transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    pub(crate) class: &'static str,
    pub(crate) model_type: &'static str,
    /// The layers around attention.
    pub form: Form,
    /// What transformers takes for keys that config.json leaves out.
    pub defaults: &'static [(&'static str, Setting)],
    /// Where its attention has a window.
    pub window: Window,
    /// Projections that are called otherwise there.
    pub projections: &'static [(&'static str, Projection)],
    /// Whether transformers has no such class, so that folders need its code beside the weights.
    pub remote_code: bool,
}

/// The layers around attention, and the names of their tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// LLaMA's: RMSNorm, SwiGLU, heads that rotate wholly.
    Llama,
    /// GPT-NeoX's: LayerNorm, GELU with biases.
    GptNeox,
}

/// Whether the tokens of a family attend within a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Never, whatever the keys say.
    Never,
    /// Where `sliding_window` gives one.
    Always,
    /// Where `use_sliding_window` switches it on.
    IfSwitchedOn,
}

/// What a projection is called elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// By another name.
    Named(&'static str),
    /// One third, from 0, of a tensor with rows `[n_heads, 3, head_dim]`.
    Third(&'static str, usize),
}

/// A value in a config.json.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Setting {
    /// `null`
    Null,
    /// `true` or `false`
    Flag(bool),
    /// A whole number.
    Count(usize),
    /// A number.
    Number(f64),
    /// A number for each layer.
    Numbers(Vec<f64>),
    /// A name for each layer.
    Names(Vec<&'static str>),
    /// A list for each layer.
    Maps(Vec<Vec<usize>>),
}

/// What the config.json of a family says of attention.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The family.
    pub family: &'static Family,
    /// Keys and values, in the order in which they are written.
    pub keys: Vec<(&'static str, Setting)>,
}

const LLAMA_DEFAULTS: &[(&str, Setting)] = &[("max_position_embeddings", Setting::Count(2048))];

impl Family {
    /// A family in LLaMA's form, with full attention.
    pub const fn llama(class: &'static str, model_type: &'static str) -> Self {
        let (form, window) = (Form::Llama, Window::Never);
        Self { class, model_type, form, defaults: LLAMA_DEFAULTS, window, projections: &[], remote_code: false }
    }

    /// A family in LLaMA's form, with full attention, that transformers does not have.
    pub const fn remote(class: &'static str, model_type: &'static str) -> Self {
        Self { remote_code: true, ..Self::llama(class, model_type) }
    }

    /// The name of the class, as in `architectures` of config.json.
    pub fn class(&self) -> &'static str {
        self.class
    }

    /// `model_type` of config.json.
    pub fn model_type(&self) -> &'static str {
        self.model_type
    }
}

/// Softmax attention whose query heads share key heads and value heads.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedHeads {
    /// The same with a key head and a value head for every query head.
    pub softmax: SoftmaxConfig,
    /// For each query head, the key head and the value head that it reads.
    pub maps: [Vec<usize>; 2],
}

/// The channels of a layer that belong to heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadChannels {
    /// Those that the query projection writes.
    Queries,
    /// Those that the output projection reads.
    Outputs,
}

/// How the heads of a layer are divided, for tables and images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadCounts {
    /// Key heads and value heads.
    KeysAndValues([usize; 2]),
    /// Query heads of each key/value head.
    QueriesOfEach(Vec<usize>),
    /// Heads that are always selected, and those that are chosen from.
    Selected(HeadSplit),
}

/// A conversion of trained attention, as `polyhead convert --to` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    /// What the model is converted to.
    pub name: &'static str,
    /// The mechanisms that it takes, by their names.
    pub from: &'static [&'static str],
}

/// The settings that all layers have.
///
/// # Errors
/// If they differ.
pub(crate) fn uniform<'a, C: PartialEq>(layers: &[&'a C]) -> Result<&'a C, String> {
    match layers {
        [first, rest @ ..] if rest.iter().all(|layer| layer == first) => Ok(first),
        _ => Err("the layers differ".into()),
    }
}
