//! What a model is turned into: the flags of `polyhead convert`, which are the keys of a stage's `convert` table too.
//!
//! A target is a variant of [`Target`] and an arm of [`Conversion::make`].

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use polyhead_attention::{AttentionConfig, DecoupledHeadConfig, LearnedRouterConfig, QueryNormConfig, RouterConfig};
use polyhead_models::surgery::{self, AllocationRule, Grouping, Pool, Routed, SurgeryError};
use polyhead_models::{Batch, Decoder};
use polyhead_training::ProcedureConfig;
use polyhead_training::fusion::FusionMode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::assemble::{self, Trained};
use crate::console::talk;
use crate::report::{Failure, Problems};

/// What a model is turned into, and how.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Conversion {
    /// What its attention becomes.
    #[arg(long)]
    pub to: Target,
    /// Key/value heads of every layer.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// decoupled_head: the share of all key and value heads to keep, given to layers by the likeness of their heads.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_budget: Option<f64>,
    /// How several heads become one; ward: the mean of heads that are alike, instead of neighbours.
    #[arg(long, default_value = "mean")]
    #[serde(default)]
    pub pool: PoolName,
    /// decoupled_head: what the budget is shared by. static: the likeness of heads. dynamic: what was left to fuse in the run
    /// that is converted, a Lagrangian fusion; its weights are dropped, and those that it started from are grouped anew.
    #[arg(long, default_value = "static")]
    #[serde(default)]
    pub search: Search,
    /// --search dynamic: the model that was being fused, where it is no more where the run's recipe says.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<PathBuf>,
    /// decoupled_head: fuse nothing yet; every head gets an operator that is the identity, for [procedure.fusion].
    #[arg(long)]
    #[serde(default)]
    pub fusing: bool,
    /// decoupled_head of a model that was being fused: the largest scatter at which groups may become single heads.
    #[arg(long, default_value_t = scatter_limit())]
    #[serde(default = "scatter_limit")]
    pub scatter_limit: f64,
    /// key_driven: how norms of keys, measured on text, become numbers of query heads.
    #[arg(long, default_value = "range")]
    #[serde(default)]
    pub allocation: AllocationName,
    /// mixture_of_head: heads that take part at every position, the first ones.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<usize>,
    /// mixture_of_head: of the other heads, those that take part at each position.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// mixture_of_head: who chooses them.
    #[arg(long, default_value = "query_norm")]
    #[serde(default)]
    pub router: RouterName,
}

/// Chosen by us: in recipes/compare/scatter.toml, collapses at 4e-4 to 7e-4 cost 0.04 to 0.19 nats at once.
fn scatter_limit() -> f64 {
    1e-3
}

/// What attention becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Fewer key/value heads, each shared by the same number of query heads.
    GroupedQuery,
    /// Numbers of their own of key heads and value heads in each layer; of a model being fused: its groups become heads; of a
    /// key-driven one: heads that nobody reads are dropped.
    DecoupledHead,
    /// Fewer key/value heads, each shared by as many query heads as its keys call for, measured once on text.
    KeyDriven,
    /// The same heads, of which some rest at each position.
    MixtureOfHead,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::GroupedQuery => "grouped_query",
            Self::DecoupledHead => "decoupled_head",
            Self::KeyDriven => "key_driven",
            Self::MixtureOfHead => "mixture_of_head",
        }
    }
}

/// What a budget of heads is shared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Search {
    /// The likeness of heads.
    #[default]
    Static,
    /// What was left to fuse.
    Dynamic,
}

/// How norms of keys become numbers of query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AllocationName {
    /// KDGQA: by how far they lie above the smallest one, whose head nobody reads.
    #[default]
    Range,
    /// DGQA: in proportion.
    Proportion,
}

/// Who chooses the heads of a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum RouterName {
    /// The norms of the queries: no parameters, gates of 0 and 1.
    #[default]
    QueryNorm,
    /// Linear maps with fresh weights, which have to be trained.
    Learned,
}

/// How several heads become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub enum PoolName {
    /// The mean of neighbours.
    #[default]
    Mean,
    /// The first of neighbours.
    First,
    /// The mean of heads that are alike; keys and values are grouped apart, which makes the heads decoupled.
    Ward,
    /// The mean of neighbours, as long as they were on average.
    NormRestoring,
}

impl PoolName {
    fn pool(self) -> Pool {
        match self {
            Self::Mean | Self::Ward => Pool::Mean,
            Self::First => Pool::First,
            Self::NormRestoring => Pool::NormRestoring,
        }
    }
}

impl From<SurgeryError> for Failure {
    fn from(error: SurgeryError) -> Self {
        match error {
            SurgeryError::Refused(problem) => Problems::plain(problem).into(),
            SurgeryError::Weights(error) => error.into(),
        }
    }
}

fn usage(problem: impl Into<String>) -> Failure {
    Problems::plain(problem.into()).into()
}

impl Conversion {
    /// What can be told without the model.
    ///
    /// # Errors
    /// Names the setting that is missing, or that goes with none of the others.
    pub fn check(&self) -> Result<(), String> {
        let dynamic = self.search == Search::Dynamic;
        let rule = |holds: bool, problem: &str| if holds { Ok(()) } else { Err(problem.to_owned()) };
        rule(self.kv_heads.is_none() || self.kv_budget.is_none(), "give --kv-heads or --kv-budget, not both")?;
        rule(dynamic || self.original.is_none(), "--original goes with --search dynamic")?;
        rule(self.scatter_limit >= 0.0, "--scatter-limit must be a number of at least 0")?;
        rule(
            !self.fusing || self.pool == PoolName::Mean,
            "--pool goes without --fusing: nothing is pooled until heads are fused",
        )?;
        use Target::{DecoupledHead, GroupedQuery, KeyDriven, MixtureOfHead};
        for (flag, given, targets) in [
            ("--kv-heads", self.kv_heads.is_some(), &[GroupedQuery, DecoupledHead, KeyDriven][..]),
            ("--kv-budget", self.kv_budget.is_some(), &[DecoupledHead]),
            ("--pool", self.pool != PoolName::Mean, &[GroupedQuery, DecoupledHead, KeyDriven]),
            ("--search dynamic", dynamic, &[DecoupledHead]),
            ("--fusing", self.fusing, &[DecoupledHead]),
            ("--scatter-limit", self.scatter_limit != scatter_limit(), &[DecoupledHead]),
            ("--allocation", self.allocation != AllocationName::Range, &[KeyDriven]),
            ("--shared", self.shared.is_some(), &[MixtureOfHead]),
            ("--top-k", self.top_k.is_some(), &[MixtureOfHead]),
            ("--router", self.router != RouterName::QueryNorm, &[MixtureOfHead]),
        ] {
            let names: Vec<String> = targets.iter().map(|target| format!("--to {}", target.name())).collect();
            rule(!given || targets.contains(&self.to), &format!("{flag} goes with {}", names.join(" or ")))?;
        }
        let needs = |holds: bool, what: &str| rule(holds, &format!("--to {} needs {what}", self.to.name()));
        match self.to {
            GroupedQuery | KeyDriven => needs(self.kv_heads.is_some(), "--kv-heads N"),
            MixtureOfHead => needs(self.shared.is_some() && self.top_k.is_some(), "--shared N and --top-k K"),
            DecoupledHead => Ok(()),
        }
    }

    /// The converted model; `calibration` gives batches of text to measure keys on.
    ///
    /// # Errors
    /// If the model or a setting does not allow it.
    pub fn make(
        &self,
        parent: &Trained,
        calibration: &mut dyn Iterator<Item = Result<Batch, Failure>>,
    ) -> Result<Decoder, Failure> {
        self.check().map_err(usage)?;
        let (model, kv_heads) = (&parent.model, self.kv_heads.unwrap_or_default());
        match (self.to, self.pool) {
            (Target::GroupedQuery, PoolName::Ward) => {
                Ok(surgery::decouple(model, &Grouping::Ward(kv_heads), Pool::Mean)?)
            }
            (Target::GroupedQuery, pool) => Ok(surgery::group_queries(model, kv_heads, pool.pool())?),
            (Target::MixtureOfHead, _) => {
                let router = match self.router {
                    RouterName::QueryNorm => RouterConfig::QueryNorm(QueryNormConfig::default()),
                    RouterName::Learned => RouterConfig::Learned(LearnedRouterConfig::default()),
                };
                let [shared_heads, top_k] = [self.shared, self.top_k].map(Option::unwrap_or_default);
                Ok(surgery::route_heads(model, &Routed { shared_heads, top_k, router })?)
            }
            (Target::KeyDriven, PoolName::Ward) => Err(usage(
                "--pool ward groups keys and values apart, which key_driven cannot: take mean, first or norm_restoring",
            )),
            (Target::KeyDriven, pool) => {
                let grouped = surgery::group_queries(model, kv_heads, pool.pool())?;
                let mut norms = Vec::new();
                for batch in calibration {
                    surgery::measure_keys(&grouped, &batch?, &mut norms)?;
                }
                let rule = match self.allocation {
                    AllocationName::Range => AllocationRule::Range,
                    AllocationName::Proportion => AllocationRule::Proportion,
                };
                Ok(surgery::drive_by_keys(&grouped, &norms, rule)?)
            }
            (Target::DecoupledHead, pool) => self.decoupled(parent, pool.pool()),
        }
    }

    fn decoupled(&self, parent: &Trained, pool: Pool) -> Result<Decoder, Failure> {
        let config = parent.model.config();
        let (original, grouping) = match (self.search, surgery::scatter(&parent.model)) {
            (Search::Dynamic, left) => self.dynamic(parent, left)?,
            (Search::Static, Some(_)) => return self.collapse(&parent.model),
            (Search::Static, None) => match (self.kv_heads, self.kv_budget) {
                (Some(kv_heads), _) => (parent.model.clone(), Grouping::Ward(kv_heads)),
                (None, Some(share)) => (parent.model.clone(), Grouping::Budget(share)),
                (None, None)
                    if config.mechanism(0).name() == "key_driven" && !self.fusing && self.pool == PoolName::Mean =>
                {
                    return Ok(surgery::decouple_key_driven(&parent.model)?);
                }
                (None, None) => return Err(usage("--to decoupled_head needs --kv-budget SHARE or --kv-heads N")),
            },
        };
        match self.fusing {
            true => Ok(surgery::begin_fusion(&original, &grouping)?),
            false => Ok(surgery::decouple(&original, &grouping, pool)?),
        }
    }

    fn collapse(&self, fused: &Decoder) -> Result<Decoder, Failure> {
        if self.kv_heads.is_some() || self.kv_budget.is_some() || self.fusing || self.pool != PoolName::Mean {
            return Err(usage(
                "the model is being fused already: --to decoupled_head makes its groups single heads, without --kv-heads, \
                 --kv-budget, --fusing or --pool",
            ));
        }
        let (scatter, limit) = (surgery::mean_scatter(fused).unwrap_or_default(), self.scatter_limit);
        if scatter.is_nan() || scatter > limit {
            return Err(Failure::Run(format!(
                "the scatter ({scatter:.2e}) is above --scatter-limit ({limit:.2e}): single heads would not do what their groups \
                 do. Fuse for longer ([procedure.fusion], to the end of its steps), or raise the limit"
            )));
        }
        talk!("scatter: {scatter:.2e}");
        Ok(surgery::collapse(fused)?)
    }

    /// The weights that a Lagrangian fusion started from, and the heads that each cell needs by what was left to fuse: more
    /// where more was left.
    fn dynamic(&self, fused: &Trained, left: Option<Vec<f64>>) -> Result<(Decoder, Grouping), Failure> {
        let recipe = fused.recipe.as_ref();
        let lagrangian = recipe.is_some_and(|recipe| match &recipe.procedure {
            ProcedureConfig::Fusion(fusion) => fusion.mode == FusionMode::Lagrangian,
            _ => false,
        });
        let (Some(left), true) = (left, lagrangian) else {
            let problem = format!(
                "--search dynamic reads what a Lagrangian fusion left to fuse, and {} is no such run: convert a model with \
                 --to decoupled_head --kv-heads N --fusing, train it with procedure.fusion.mode = \"lagrangian\", and name that run",
                fused.path.display()
            );
            return Err(usage(problem));
        };
        let started_from = self.original.as_ref().or(recipe.and_then(|recipe| recipe.model.pretrained.as_ref()));
        let Some(path) = started_from else {
            let problem =
                format!("{} does not say what it started from: name that model with --original", fused.path.display());
            return Err(usage(problem));
        };
        let original = assemble::open_trained(path, None).map_err(|error| {
            Failure::Run(format!("the model that was being fused: {error}\n  hint: --original says where it is now"))
        })?;
        let original = surgery::unfused(&original.model)?;
        let cells: Vec<_> = decoupled_layers(&fused.model).collect();
        let n_heads = cells[0].n_heads;
        if cells.iter().any(|layer| layer.n_heads != n_heads) {
            return Err(usage("--search dynamic takes a model with as many heads in every layer"));
        }
        let all = left.len() * n_heads;
        let budget = match (self.kv_heads, self.kv_budget) {
            (Some(kv_heads), _) => kv_heads * left.len(),
            (None, Some(share)) => surgery::heads_of_budget(share, left.len(), all)?,
            (None, None) => cells.iter().flat_map(|layer| layer.fused_heads()).sum(),
        };
        talk!("left to fuse: {}", left.iter().map(|cell| format!("{cell:.2e}")).collect::<Vec<_>>().join(" "));
        Ok((original, Grouping::Each(surgery::allocate_by_need(&left, n_heads, budget))))
    }
}

/// The settings of the layers with decoupled heads.
fn decoupled_layers(model: &Decoder) -> impl Iterator<Item = &DecoupledHeadConfig> {
    let config = model.config();
    (0..config.n_layers).filter_map(|layer| match config.mechanism(layer) {
        AttentionConfig::DecoupledHead(heads) => Some(heads),
        _ => None,
    })
}
