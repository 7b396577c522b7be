//! Interventions as they are written: in a recipe or a file of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use polyhead_attention::sparse::SparseConfig;
use polyhead_attention::{ConfigError, QuerySite, Site, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gift::GazeConfig;
use super::locore::RecentConfig;
use super::visual_sinks::VarConfig;
use super::{Phase, Span};

/// Changes that are made to a forward on its way, from outside of the weights.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InterventionConfig {
    /// Of a recipe: a file with the intervention, beside the recipe, in the place of edits and tensors. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A safetensors file with the tensors that edits name, beside the file that names it. Runs keep a copy. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensors: Option<PathBuf>,
    /// Which keys queries read, where it is not all of them: one of shifted, blocks, dhsa, rectified and h2o. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse: Option<SparseConfig>,
    /// Of a recipe: tensors that are trained while all weights stay as they are, by the names that edits have for them. Default:
    /// none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub train: BTreeMap<String, TrainedConfig>,
    /// Predictions are steered away from those under the edits, which leave the model itself as it is (SoftPAG, arXiv 2506.10978).
    /// Default: none, the edits change the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<GuidanceConfig>,
    /// The changes; those of one site are made in this order.
    #[serde(default)]
    pub edits: Vec<EditConfig>,
}

/// How far predictions are steered away from those under the edits: log p + weight · (log p - log p under the edits).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuidanceConfig {
    /// The weight. Below 0 predictions are steered towards those under the edits; at -1 they are those.
    pub weight: f64,
}

/// A tensor that is trained: for all layers of the model, of which those are trained that an edit names.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainedConfig {
    /// Its numbers before the first step, before any sigmoid. Default: those of the tensor of this name in the file `tensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial: Option<f64>,
    /// Whether it has a number for each head (default) or for each channel of each head.
    pub per: Per,
    /// Whether edits read σ(θ), which is between 0 and 1, where θ is trained. Default: false.
    pub sigmoid: bool,
}

/// What has a number of its own in a tensor that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Each head.
    #[default]
    Head,
    /// Each channel of each head.
    Channel,
}

/// A change at one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EditConfig {
    /// The site: "z", "scores", "resid_post", ..., or as TransformerLens calls it, "attn.hook_z"; with "layers.3." or "blocks.3."
    /// before it, that of one layer.
    pub site: String,
    /// Layers, from 0. Default: all of them, or the one that the site names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Query heads, from 0; of z and result the heads that the output projection reads. Default: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<Vec<usize>>,
    /// Key/value heads, from 0, for k, rot_k and v. Default: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<Vec<usize>>,
    /// The tokens whose numbers change; of scores and weights, the queries. Default: "all".
    #[serde(default)]
    pub tokens: Span,
    /// The keys, for scores and weights. Default: "all".
    #[serde(default)]
    pub keys: Span,
    /// Whether tokens of the prompt change, tokens that are generated behind it, or both. Default: "both".
    #[serde(default)]
    pub phase: Phase,
    /// What becomes of the numbers.
    pub change: ChangeConfig,
}

/// What becomes of the numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ChangeConfig {
    /// Times a factor; 0 switches heads off.
    Scale(AmountConfig),
    /// Plus a number.
    Add(AmountConfig),
    /// Other numbers in their place.
    Replace(AmountConfig),
    /// gate · x + value
    Mix {
        /// The factor.
        gate: AmountConfig,
        /// The addend.
        value: AmountConfig,
    },
    /// (1 - gate) · x + gate · value
    Blend {
        /// The share of the value.
        gate: AmountConfig,
        /// What x is replaced by where the gate is 1.
        value: AmountConfig,
    },
    /// Weights pulled to the identity by a share: of 1, each token attends to itself.
    ToIdentity(f64),
    /// Weights times a factor, after which rows have the sum that they had.
    Reweight(AmountConfig),
    /// Scores raised by this share of their size (the boosts of arXiv 2501.12206, as released).
    Boost(f64),
    /// Scores of the newest tokens raised (LocoRE, arXiv 2601.20279).
    Recent(RecentConfig),
    /// Weights of a span and of a question shifted to what the question looks at (GIFT, arXiv 2510.22067).
    Gaze(GazeConfig),
    /// Weights taken from sinks and given to the keys that the edit names (VAR, arXiv 2503.03321).
    Redistribute(VarConfig),
    /// The component along a direction becomes a number.
    Clamp {
        /// A tensor of the file, `[width]`; its length does not matter.
        direction: String,
        /// The component.
        to: f64,
    },
}

/// A number, or the name of a tensor of the file. Its axes are [layers of the model, heads], [layers, heads, width] or [layers,
/// batch or 1, heads or 1, positions or 1, width or keys or 1].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number, or the name of a tensor")]
pub enum AmountConfig {
    /// One number for all.
    Number(f64),
    /// A tensor.
    Tensor(String),
}

impl ChangeConfig {
    /// The amounts, each with its key.
    pub(super) fn amounts(&self) -> Vec<(&'static str, &AmountConfig)> {
        match self {
            Self::Scale(amount) => vec![("scale", amount)],
            Self::Add(amount) => vec![("add", amount)],
            Self::Replace(amount) => vec![("replace", amount)],
            Self::Mix { gate, value } => vec![("mix.gate", gate), ("mix.value", value)],
            Self::Blend { gate, value } => vec![("blend.gate", gate), ("blend.value", value)],
            Self::Reweight(amount) => vec![("reweight", amount)],
            Self::ToIdentity(_)
            | Self::Clamp { .. }
            | Self::Boost(_)
            | Self::Recent(_)
            | Self::Gaze(_)
            | Self::Redistribute(_) => Vec::new(),
        }
    }
}

impl InterventionConfig {
    /// The tensors that edits name, each with the place of the edit and the key of the change.
    pub fn tensor_names(&self) -> impl Iterator<Item = (usize, &'static str, &str)> {
        self.edits.iter().enumerate().flat_map(|(at, edit)| {
            let amounts = edit.change.amounts().into_iter().filter_map(|(key, amount)| match amount {
                AmountConfig::Tensor(name) => Some((key, name.as_str())),
                AmountConfig::Number(_) => None,
            });
            let direction = match &edit.change {
                ChangeConfig::Clamp { direction, .. } => Some(("clamp.direction", direction.as_str())),
                _ => None,
            };
            amounts.chain(direction).map(move |(key, name)| (at, key, name)).collect::<Vec<_>>()
        })
    }

    /// What can be said of it without a model; `nearest` finds the name that was meant by an unknown one.
    ///
    /// # Errors
    /// Names the field, its value, the rule and the way out.
    pub fn validate(&self, nearest: &dyn Fn(&str, &[&str]) -> Option<String>) -> Result<(), ConfigError> {
        if let Some(GuidanceConfig { weight }) = self.guidance {
            require(!self.edits.is_empty(), "guidance", || {
                "guidance needs edits, which make the predictions that it steers away from: give at least one [[edits]]"
                    .into()
            })?;
            require(weight.is_finite() && weight != 0.0, "guidance.weight", || {
                format!("weight ({weight}) must be a finite number other than 0, which changes nothing")
            })?;
        }
        require(!self.edits.is_empty() || self.sparse.is_some(), "edits", || {
            "edits is empty: give at least one [[edits]], or a table of [sparse]".into()
        })?;
        if let Some(sparse) = &self.sparse {
            sparse.validate().map_err(|error| error.within("sparse"))?;
        }
        let unknown = self.tensor_names().find(|(.., name)| self.tensors.is_none() && !self.train.contains_key(*name));
        if let Some((at, key, name)) = unknown {
            let field = format!("edits.{at}.change.{key}");
            let problem = format!("{key} names the tensor \"{name}\", and tensors names no file that it could be in");
            return Err(ConfigError::new(field, problem));
        }
        for (name, trained) in &self.train {
            self.validate_trained(name, trained).map_err(|error| error.within(&format!("train.{name}")))?;
        }
        for (at, edit) in self.edits.iter().enumerate() {
            edit.validate(nearest).map_err(|error| error.within(&format!("edits.{at}")))?;
        }
        Ok(())
    }
}

impl InterventionConfig {
    fn validate_trained(&self, name: &str, trained: &TrainedConfig) -> Result<(), ConfigError> {
        let initial = trained.initial.unwrap_or_default();
        require(initial.is_finite(), "initial", || format!("initial ({initial}) must be a finite number"))?;
        require(trained.initial.is_some() || self.tensors.is_some(), "", || {
            format!(
                "\"{name}\" has no initial number, and tensors names no file that it could be read from: give initial"
            )
        })?;
        let mut uses =
            self.tensor_names().filter(|(_, key, used)| *used == name && *key != "clamp.direction").peekable();
        require(uses.peek().is_some(), "", || {
            format!("no edit has the tensor \"{name}\": name it in a change, such as {{ add = \"{name}\" }}")
        })?;
        let generated = uses.find(|(at, ..)| self.edits[*at].phase == Phase::Decode);
        require(generated.is_none(), "", || {
            format!(
                "\"{name}\" is trained, and the phase of edits.{} is \"decode\": no token of a training batch is generated",
                generated.map_or(0, |(at, ..)| at)
            )
        })
    }
}

impl EditConfig {
    /// A change of all heads and tokens, in all layers.
    pub fn new(site: &str, change: ChangeConfig) -> Self {
        Self {
            site: site.to_owned(),
            layers: None,
            heads: None,
            kv_heads: None,
            tokens: Span::default(),
            keys: Span::default(),
            phase: Phase::default(),
            change,
        }
    }

    /// The layer that the site names, if any, and the site.
    pub fn place(&self) -> Option<(Option<usize>, Site)> {
        let whole = Site::in_layer(&self.site).map(|(layer, site)| (Some(layer), site));
        whole.or_else(|| Some((None, Site::named(&self.site)?)))
    }

    /// Its spans, each with its key.
    pub(super) fn spans(&self) -> Vec<(&'static str, &Span)> {
        let sinks = match &self.change {
            ChangeConfig::Redistribute(how) => &how.sinks[..],
            _ => &[],
        };
        let sinks = sinks.iter().map(|span| ("change.redistribute.sinks", span));
        [("tokens", &self.tokens), ("keys", &self.keys)].into_iter().chain(sinks).collect()
    }

    fn validate(&self, nearest: &dyn Fn(&str, &[&str]) -> Option<String>) -> Result<(), ConfigError> {
        let Some((layer, site)) = self.place() else { return Err(unknown_site(&self.site, nearest)) };
        require(!site.is_read_only(), "site", || format!("site ({site}) can be read, not changed"))?;
        require(layer.is_none() || self.layers.is_none(), "layers", || {
            format!("layers and the site \"{}\" both name layers: keep one of them", self.site)
        })?;
        let of_maps = site.is_map();
        require(of_maps || self.keys == Span::default(), "keys", || {
            format!("keys are of scores and weights, and the site is {site}: leave them out")
        })?;
        let (query, kv) = (matches!(site, Site::Query(_)), matches!(site, Site::Kv(_)));
        let unfit = |field, instead: &str| format!("{field} do not fit the site {site}: {instead}");
        require(query || self.heads.is_none(), "heads", || {
            unfit("heads", if kv { "it has key/value heads, kv_heads" } else { "it has no heads" })
        })?;
        require(kv || self.kv_heads.is_none(), "kv_heads", || {
            unfit("kv_heads", if query { "it has query heads, heads" } else { "it has no heads" })
        })?;
        for (field, listed) in [("layers", &self.layers), ("heads", &self.heads), ("kv_heads", &self.kv_heads)] {
            require(listed.as_ref().is_none_or(|list| !list.is_empty()), field, || {
                format!("{field} is empty: leave it out for all of them")
            })?;
        }
        self.spans().into_iter().try_for_each(|(field, span)| span.validate(field))?;
        self.validate_change(site)?;
        for (key, amount) in self.change.amounts() {
            if let AmountConfig::Number(number) = amount {
                let field = format!("change.{key}");
                require(number.is_finite(), &field, || format!("{key} ({number}) must be a finite number"))?;
                let negative = key == "reweight" && *number < 0.0;
                require(!negative, &field, || format!("reweight ({number}) must not be negative: weights are shares"))?;
            }
        }
        Ok(())
    }

    /// What changes of some kinds need of their site and of their numbers.
    fn validate_change(&self, site: Site) -> Result<(), ConfigError> {
        let (scores, weights) = (QuerySite::Scores.into(), QuerySite::Weights.into());
        let is_for = |key: &str, wanted: Site, why: &str| {
            require(site == wanted, &format!("change.{key}"), || {
                format!("{key} is for {wanted}{why}, and the site is {site}")
            })
        };
        match &self.change {
            ChangeConfig::Reweight(_) => is_for("reweight", weights, ", whose rows have a sum to keep"),
            ChangeConfig::ToIdentity(share) => {
                is_for("to_identity", weights, "")?;
                require((0.0..=1.0).contains(share), "change.to_identity", || {
                    format!("to_identity ({share}) must be 0 to 1")
                })
            }
            ChangeConfig::Boost(gain) => {
                is_for("boost", scores, ": in weights it is scale or reweight")?;
                require(gain.is_finite(), "change.boost", || format!("boost ({gain}) must be a finite number"))
            }
            ChangeConfig::Recent(how) => {
                is_for("recent", scores, "")?;
                how.validate().map_err(|error| error.within("change.recent"))
            }
            ChangeConfig::Gaze(how) => {
                is_for("gaze", weights, "")?;
                how.validate(&self.keys).map_err(|error| error.within("change.gaze"))
            }
            ChangeConfig::Redistribute(how) => {
                is_for("redistribute", weights, "")?;
                require(self.keys != Span::default(), "change.redistribute", || {
                    "redistribute needs keys: the span of the prompt that gets what sinks lose".into()
                })?;
                how.validate().map_err(|error| error.within("change.redistribute"))
            }
            ChangeConfig::Clamp { .. } => require(!site.is_map(), "change", || {
                format!("clamp needs channels, and {site} has keys: use add or scale")
            }),
            _ => Ok(()),
        }
    }
}

/// A site that is none, with the one that may have been meant.
fn unknown_site(typed: &str, nearest: &dyn Fn(&str, &[&str]) -> Option<String>) -> ConfigError {
    let names: Vec<&str> = Site::names().collect();
    // Of a full name, what is behind the layer.
    let (before, name) = match typed.splitn(3, '.').collect::<Vec<_>>()[..] {
        [stack @ ("layers" | "blocks"), layer, name] => (format!("{stack}.{layer}."), name),
        _ => (String::new(), typed),
    };
    let meant = nearest(name, &names).map(|name| format!("; did you mean \"{before}{name}\"?")).unwrap_or(".".into());
    let own: Vec<&str> = Site::all().filter(|site| !site.is_read_only()).map(Site::name).collect();
    ConfigError::new("site", format!("there is no site \"{typed}\"{meant} Sites are {}", own.join(", ")))
}
