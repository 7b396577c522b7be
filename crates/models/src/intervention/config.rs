//! Interventions as they are written: in a recipe or a file of their own.

use std::path::PathBuf;

use polyhead_attention::sparse::SparseConfig;
use polyhead_attention::{ConfigError, QuerySite, Site, require};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Changes that are made to a forward on its way, from outside of the weights.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InterventionConfig {
    /// A safetensors file with the tensors that edits name, beside this file. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensors: Option<PathBuf>,
    /// The changes; those of one site are made in this order.
    #[serde(default)]
    pub edits: Vec<EditConfig>,
    /// Which keys queries read, where it is not all of them: one of shifted, blocks, dhsa, rectified and h2o. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse: Option<SparseConfig>,
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

/// Some of the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "\"all\", \"system\", \"context\", \"question\", \"response\", \"prompt\", \"first\" or \"last_prompt_token\", a range \
                              { from = 0, to = 4 }, or a text { text = \"Paris\" }"
)]
pub enum Span {
    /// By name.
    Named(SpanName),
    /// By position.
    Range(RangeConfig),
    /// By what they say.
    Text(TextSpan),
}

impl Default for Span {
    fn default() -> Self {
        Self::Named(SpanName::All)
    }
}

/// Positions by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeConfig {
    /// The first position, from 0.
    pub from: usize,
    /// The position behind the last.
    pub to: usize,
}

/// The tokens of a text, wherever it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextSpan {
    /// What to look for, to the letter.
    pub text: String,
}

/// Tokens that have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpanName {
    /// Every token
    All,
    /// Instructions that come before, in conversations and generated tasks
    System,
    /// What an answer can be read off: what a tool gave back, and what users said before their last turn
    Context,
    /// The last turn of the user
    Question,
    /// What the assistant says, and what is generated
    Response,
    /// Every token that is not generated
    Prompt,
    /// The first token, the usual attention sink
    First,
    /// The token that the first generated one is predicted from; in a conversation the one before the first answer
    LastPromptToken,
}

impl SpanName {
    /// Whether it depends on whose tokens are whose.
    pub fn needs_roles(self) -> bool {
        matches!(self, Self::System | Self::Context | Self::Question | Self::Response)
    }
}

/// Tokens of the prompt, or those that are generated behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The prompt.
    Prefill,
    /// What is generated.
    Decode,
    /// Both.
    #[default]
    Both,
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
    /// Weights times a factor, after which rows have the sum that they had.
    Reweight(AmountConfig),
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
            Self::Reweight(amount) => vec![("reweight", amount)],
            Self::Clamp { .. } => Vec::new(),
        }
    }
}

impl InterventionConfig {
    /// The text spans and the names of its tensors.
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
        require(!self.edits.is_empty() || self.sparse.is_some(), "edits", || {
            "edits is empty: give at least one [[edits]], or a table of [sparse]".into()
        })?;
        if let Some(sparse) = &self.sparse {
            sparse.validate().map_err(|error| error.within("sparse"))?;
        }
        if let (None, Some((at, key, name))) = (&self.tensors, self.tensor_names().next()) {
            let field = format!("edits.{at}.change.{key}");
            let problem = format!("{key} names the tensor \"{name}\", and tensors names no file that it could be in");
            return Err(ConfigError::new(field, problem));
        }
        for (at, edit) in self.edits.iter().enumerate() {
            edit.validate(nearest).map_err(|error| error.within(&format!("edits.{at}")))?;
        }
        Ok(())
    }
}

impl EditConfig {
    /// The layer that the site names, if any, and the site.
    pub fn place(&self) -> Option<(Option<usize>, Site)> {
        let whole = Site::in_layer(&self.site).map(|(layer, site)| (Some(layer), site));
        whole.or_else(|| Some((None, Site::named(&self.site)?)))
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
        for (field, span) in [("tokens", &self.tokens), ("keys", &self.keys)] {
            if let Span::Range(RangeConfig { from, to }) = span {
                require(from < to, field, || format!("{field} is from {from} to {to}, which are no positions"))?;
            }
            if let Span::Text(TextSpan { text }) = span {
                require(!text.is_empty(), field, || format!("{field}.text is empty: give some text to look for"))?;
            }
        }
        require(
            !matches!(self.change, ChangeConfig::Reweight(_)) || site == QuerySite::Weights.into(),
            "change",
            || format!("reweight is for weights, whose rows have a sum to keep, and the site is {site}: use scale"),
        )?;
        require(!matches!(self.change, ChangeConfig::Clamp { .. }) || !of_maps, "change", || {
            format!("clamp needs channels, and {site} has keys: use add or scale")
        })?;
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
