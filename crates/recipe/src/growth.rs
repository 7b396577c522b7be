//! What a model grows by: the flags of `polyhead grow`, which are the keys of a preparation's `grow` table too.

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What grows.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Growth {
    /// Make the signal heads of grouped differential attention this many times as many.
    #[arg(long, value_name = "xN", default_value = "x1", value_parser = times)]
    pub signal_heads: usize,
    /// Make channels and units of feed-forward layers this many times as many; heads stay.
    #[arg(long, value_name = "xN", default_value = "x1", value_parser = times)]
    pub width: usize,
    /// Layers afterwards.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Noise that separates replicas, in shares of the weights it is added to; it sums to zero over them.
    #[arg(long, default_value_t = NOISE)]
    pub noise: f64,
    /// Decides the noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

const NOISE: f64 = polyhead_models::surgery::Growth::NOISE;

impl Default for Growth {
    fn default() -> Self {
        Self { signal_heads: 1, width: 1, depth: None, noise: NOISE, seed: 0 }
    }
}

/// `x4` or `4`.
fn times(text: &str) -> Result<usize, String> {
    text.strip_prefix('x').unwrap_or(text).parse().map_err(|_| "a factor such as x2 is expected".into())
}
