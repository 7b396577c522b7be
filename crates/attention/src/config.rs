//! The model around a layer, errors of settings, and costs.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// The model around a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Channels of the residual stream.
    pub d_model: usize,
    /// Layers of the model.
    pub n_layers: usize,
    /// Index of this layer, from 0.
    pub layer: usize,
    /// Whether queries and keys are rotated by position, which needs an even head_dim.
    pub rope: bool,
    /// Inside the square root of the model's norms.
    pub norm_eps: f64,
    /// Rows and columns of the grid that the positions form, where they form one; [`UNKNOWN_GRID`] before the data is known.
    pub grid: Option<[usize; 2]>,
}

/// A grid of any size.
pub const UNKNOWN_GRID: [usize; 2] = [usize::MAX; 2];

impl Dims {
    /// The model that [`MechanismConfig::example`](crate::MechanismConfig::example) fits into.
    pub fn example() -> Self {
        Self { d_model: 24, n_layers: 4, layer: 1, rope: true, norm_eps: 1e-5, grid: Some([1, 8]) }
    }
}

/// A setting that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The path of the setting, from the outermost table: `softmax.n_heads`. Empty for a table as a whole.
    pub field: String,
    /// The value, the rule and the way out, as a sentence about the field.
    pub problem: String,
}

impl ConfigError {
    /// `field` is named as the recipe names it; `problem` reads on after it: `n_heads (12) must be ...`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same error, seen from the table around.
    pub fn within(self, table: &str) -> Self {
        let field = if self.field.is_empty() { table.to_owned() } else { format!("{table}.{}", self.field) };
        Self { field, ..self }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for ConfigError {}

/// `Ok` if `rule` holds, else an error about `field`.
///
/// # Errors
/// If it does not.
pub fn require(rule: bool, field: &str, problem: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if rule { Ok(()) } else { Err(ConfigError::new(field, problem())) }
}

/// `Ok` if a value is in a range, both ends included.
///
/// # Errors
/// If it is not.
pub fn require_range<T: PartialOrd + fmt::Display>(
    field: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), ConfigError> {
    let rule = || format!("{field} ({value}) must be {} to {}", range.start(), range.end());
    require(range.contains(&value), field, rule)
}

/// `Ok` for a finite number above 0.
///
/// # Errors
/// For any other.
pub fn require_positive(field: &str, value: f64) -> Result<(), ConfigError> {
    require(value.is_finite() && value > 0.0, field, || format!("{field} ({value}) must be a positive number"))
}

/// The rules that do not hold, of those that are given as whether one holds, its field, and the problem.
pub fn broken<'a>(rules: impl IntoIterator<Item = (bool, &'a str, String)>) -> Vec<ConfigError> {
    let broken = rules.into_iter().filter(|(holds, ..)| !holds);
    broken.map(|(_, field, problem)| ConfigError::new(field, problem)).collect()
}

/// A number for all layers, or a list with one per layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged, expecting = "a number, or a list of numbers with one per layer")]
pub enum PerLayerCount {
    /// The same in all layers.
    Same(usize),
    /// The first layer's, the second layer's, ...
    Each(Vec<usize>),
}

impl PerLayerCount {
    /// The number of a layer, counted from 0. `None` where the list is too short.
    pub fn of_layer(&self, layer: usize) -> Option<usize> {
        match self {
            Self::Same(count) => Some(*count),
            Self::Each(counts) => counts.get(layer).copied(),
        }
    }

    /// The numbers of a model whose layers are `sources` of this one's; of a single layer, its own.
    pub(crate) fn moved(self, sources: &[usize]) -> Self {
        match (self, sources) {
            (Self::Each(counts), [layer]) => Self::Same(counts[*layer]),
            (Self::Each(counts), _) => Self::Each(sources.iter().map(|&layer| counts[layer]).collect()),
            (same, _) => same,
        }
    }

    /// `Ok` if a list has one number per layer.
    pub fn check(&self, field: &str, dims: &Dims) -> Result<(), ConfigError> {
        let Self::Each(counts) = self else { return Ok(()) };
        require(counts.len() == dims.n_layers, field, || {
            format!("{field} lists {} numbers for n_layers ({}): give one per layer", counts.len(), dims.n_layers)
        })
    }
}

/// The cost of one attention layer. A multiplication with its addition counts as two operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Weights of the layer.
    pub parameters: u64,
    /// Operations of a forward pass per token, besides those that grow with the context.
    pub flops_per_token: u64,
    /// Operations of a forward pass per pair of a query and a key that it sees.
    pub flops_per_pair: u64,
    /// Elements kept per token while decoding.
    pub kv_cache_elements_per_token: u64,
    /// Elements kept while decoding however many tokens there are: the state of a recurrent mechanism.
    pub state_elements: u64,
    /// Elements kept of each token for the backward pass, besides what projections read and write.
    pub kept_elements_per_token: u64,
    /// Keys that a query of a decoder sees at most, and tokens that are kept at most; `None` without a window.
    pub window: Option<u64>,
}

impl Cost {
    /// Operations of a forward pass per token, on average over a sequence in which query t, counted from 1, sees
    /// min(t, window) keys.
    pub fn causal_flops(&self, seq_len: u64) -> u64 {
        let of_pairs = match self.window.filter(|&window| window < seq_len) {
            None => self.flops_per_pair.saturating_mul(seq_len + 1) / 2,
            Some(window) => {
                let twice = (2 * seq_len).saturating_sub(window - 1).saturating_mul(window);
                self.flops_per_pair.saturating_mul(twice) / (2 * seq_len)
            }
        };
        self.flops_per_token.saturating_add(of_pairs)
    }

    /// Elements kept per token of a sequence of `seq_len`: all, or those of the last `window` tokens, shared out.
    pub fn cached_per_token(&self, seq_len: u64) -> u64 {
        let all = self.kv_cache_elements_per_token;
        match self.window.filter(|&window| window < seq_len) {
            None => all,
            Some(window) => all.saturating_mul(window) / seq_len,
        }
    }
}

impl std::ops::Add for Cost {
    type Output = Self;

    /// The cost of two layers with the same window.
    fn add(self, other: Self) -> Self {
        debug_assert_eq!(self.window, other.window, "costs are added up by window");
        Self {
            parameters: self.parameters.saturating_add(other.parameters),
            flops_per_token: self.flops_per_token.saturating_add(other.flops_per_token),
            flops_per_pair: self.flops_per_pair.saturating_add(other.flops_per_pair),
            kv_cache_elements_per_token: self
                .kv_cache_elements_per_token
                .saturating_add(other.kv_cache_elements_per_token),
            state_elements: self.state_elements.saturating_add(other.state_elements),
            kept_elements_per_token: self.kept_elements_per_token.saturating_add(other.kept_elements_per_token),
            window: self.window,
        }
    }
}
