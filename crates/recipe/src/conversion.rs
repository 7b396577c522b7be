//! What a model is turned into: the flags of `polyhead convert`, which are the keys of a stage's `convert` table too.
//!
//! A target is a variant of [`Target`]; `polyhead-runs` makes the conversion.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::flags::flags_of;

/// What a model is turned into, and how.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Conversion {
    /// What its attention becomes.
    #[arg(long)]
    pub to: Target,
    /// Key/value heads of every layer, whatever number the model has: for grouped_query a divisor of its query heads.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// decoupled_head: the share of all key and value heads of the model to keep, given to layers by the likeness of their
    /// heads.
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
    /// decoupled_head: fuse nothing yet; every key and value head gets an operator that is the identity, for
    /// [procedure.fusion].
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
    /// mixture_of_head: what selects them.
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
    /// key-driven one: heads without readers are dropped.
    DecoupledHead,
    /// Fewer key/value heads, each shared by as many query heads as its keys call for, measured once on text.
    KeyDriven,
    /// The same heads, of which some are selected at each position.
    MixtureOfHead,
    /// Not offered: refused with the reason.
    #[value(hide = true)]
    #[schemars(skip)]
    GroupedDifferential,
}

/// Why no parent becomes grouped differential; checked against the literature that its own file names.
const NOT_DIFFERENTIAL: &str = "no conversion leads to grouped_differential: none from softmax attention has been published \
    with numbers to check it against. The authors of differential attention train from scratch, Motif grows a model that is \
    differential already (`polyhead grow`), and DEX (arXiv 2505.16333) subtracts values, not attention maps, which is another \
    mechanism. Train it from scratch: model.decoder.attention.grouped_differential, as in recipes/quickstart.toml";

impl Target {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::GroupedQuery => "grouped_query",
            Self::DecoupledHead => "decoupled_head",
            Self::KeyDriven => "key_driven",
            Self::MixtureOfHead => "mixture_of_head",
            Self::GroupedDifferential => "grouped_differential",
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
    /// KDGQA: by how far they are above the smallest one, whose head is read by no query head.
    #[default]
    Range,
    /// DGQA: in proportion.
    Proportion,
}

/// What selects the heads of a position.
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

impl Conversion {
    /// What can be told without the model.
    ///
    /// # Errors
    /// Names the setting that is missing, or that goes with none of the others.
    pub fn check(&self) -> Result<(), String> {
        let dynamic = self.search == Search::Dynamic;
        let rule = |holds: bool, problem: &str| if holds { Ok(()) } else { Err(problem.to_owned()) };
        rule(self.to != Target::GroupedDifferential, NOT_DIFFERENTIAL)?;
        rule(self.kv_heads.is_none() || self.kv_budget.is_none(), "give --kv-heads or --kv-budget, not both")?;
        rule(dynamic || self.original.is_none(), "--original goes with --search dynamic")?;
        rule(self.scatter_limit >= 0.0, "--scatter-limit must be a number of at least 0")?;
        rule(
            !self.fusing || self.pool == PoolName::Mean,
            "--pool goes without --fusing: nothing is pooled until heads are fused",
        )?;
        use Target::{DecoupledHead, GroupedDifferential, GroupedQuery, KeyDriven, MixtureOfHead};
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
            DecoupledHead | GroupedDifferential => Ok(()),
        }
    }

    /// As flags of `polyhead convert`.
    pub fn flags(&self) -> String {
        let default = Self::to(self.to);
        let rest = flags_of(self, &default);
        format!("--to {}{}{rest}", self.to.name(), if rest.is_empty() { "" } else { " " })
    }

    /// A conversion with all else as it is by default.
    pub fn to(to: Target) -> Self {
        Self {
            to,
            kv_heads: None,
            kv_budget: None,
            pool: PoolName::default(),
            search: Search::default(),
            original: None,
            fusing: false,
            scatter_limit: scatter_limit(),
            allocation: AllocationName::default(),
            shared: None,
            top_k: None,
            router: RouterName::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use polyhead_attention::AttentionConfig;

    use super::*;

    #[test]
    fn every_conversion_of_the_table_of_mechanisms_can_be_asked_for() {
        let mut table: Vec<&str> = AttentionConfig::conversions().map(|to| to.name).collect();
        let offered = Target::value_variants().iter().filter(|&&target| target != Target::GroupedDifferential);
        let mut targets: Vec<&str> = offered.map(|target| target.name()).collect();
        table.sort_unstable();
        targets.sort_unstable();
        assert_eq!(table, targets);
        let problem = Conversion::to(Target::GroupedDifferential).check().unwrap_err();
        assert!(problem.contains("published") && problem.contains("from scratch"), "{problem}");
    }
}
