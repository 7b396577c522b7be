//! Conversions of a trained model, made as a [`Conversion`] says.
//!
//! A target is a variant of [`Target`] and an arm of [`convert`].

use polyhead_attention::{DecoupledHeadConfig, LearnedRouterConfig, QueryNormConfig, RouterConfig};
use polyhead_models::surgery::{self, AllocationRule, Grouping, Pool, Routed};
use polyhead_models::{Batch, Decoder};
use polyhead_recipe::Problems;
use polyhead_recipe::conversion::{AllocationName, Conversion, PoolName, RouterName, Search, Target};
use polyhead_training::ProcedureConfig;
use polyhead_training::fusion::FusionMode;

use crate::Caller;
use crate::error::Failure;
use crate::trained::{Trained, open_trained};

/// How several heads become one.
fn pool_of(name: PoolName) -> Pool {
    match name {
        PoolName::Mean | PoolName::Ward => Pool::Mean,
        PoolName::First => Pool::First,
        PoolName::NormRestoring => Pool::NormRestoring,
    }
}

fn usage(problem: impl Into<String>) -> Failure {
    Problems::plain(problem.into()).into()
}

/// Text to measure keys on.
pub struct Calibration<'a> {
    /// Its batches.
    pub batches: &'a mut dyn Iterator<Item = Result<Batch, Failure>>,
    /// Called behind each layer that has read one.
    pub passed: &'a mut dyn FnMut(),
}

/// The converted model.
///
/// # Errors
/// If the model or a setting does not allow it.
pub fn convert(
    how: &Conversion,
    parent: &Trained,
    calibration: Calibration<'_>,
    caller: Caller,
) -> Result<Decoder, Failure> {
    how.check().map_err(usage)?;
    Conversions { how, caller }.make(parent, calibration)
}

/// A conversion that is being made.
struct Conversions<'a> {
    how: &'a Conversion,
    caller: Caller,
}

impl Conversions<'_> {
    fn make(&self, parent: &Trained, calibration: Calibration<'_>) -> Result<Decoder, Failure> {
        let (model, kv_heads) = (&parent.model, self.how.kv_heads.unwrap_or_default());
        match (self.how.to, self.how.pool) {
            (Target::GroupedQuery, PoolName::Ward) => {
                Ok(surgery::decouple(model, &Grouping::Ward(kv_heads), Pool::Mean)?)
            }
            (Target::GroupedQuery, pool) => Ok(surgery::group_queries(model, kv_heads, pool_of(pool))?),
            (Target::MixtureOfHead, _) => {
                let router = match self.how.router {
                    RouterName::QueryNorm => RouterConfig::QueryNorm(QueryNormConfig::default()),
                    RouterName::Learned => RouterConfig::Learned(LearnedRouterConfig::default()),
                };
                let [shared_heads, top_k] = [self.how.shared, self.how.top_k].map(Option::unwrap_or_default);
                Ok(surgery::route_heads(model, &Routed { shared_heads, top_k, router })?)
            }
            (Target::KeyDriven, PoolName::Ward) => Err(usage(
                "--pool ward groups keys and values apart, which key_driven cannot: take mean, first or norm_restoring",
            )),
            (Target::KeyDriven, pool) => {
                let grouped = surgery::group_queries(model, kv_heads, pool_of(pool))?;
                let mut norms = Vec::new();
                for batch in calibration.batches {
                    surgery::measure_keys(&grouped, &batch?, &mut norms, calibration.passed)?;
                }
                let rule = match self.how.allocation {
                    AllocationName::Range => AllocationRule::Range,
                    AllocationName::Proportion => AllocationRule::Proportion,
                };
                Ok(surgery::drive_by_keys(&grouped, &norms, rule)?)
            }
            (Target::DecoupledHead, pool) => self.decoupled(parent, pool_of(pool)),
            (Target::GroupedDifferential, _) => Err(usage("no conversion leads to grouped_differential")),
        }
    }

    fn decoupled(&self, parent: &Trained, pool: Pool) -> Result<Decoder, Failure> {
        let config = parent.model.config();
        let (original, grouping) = match (self.how.search, surgery::scatter(&parent.model)) {
            (Search::Dynamic, left) => self.dynamic(parent, left)?,
            (Search::Static, Some(_)) => return self.collapse(&parent.model),
            (Search::Static, None) => match (self.how.kv_heads, self.how.kv_budget) {
                (Some(kv_heads), _) => (parent.model.clone(), Grouping::Ward(kv_heads)),
                (None, Some(share)) => (parent.model.clone(), Grouping::Budget(share)),
                (None, None)
                    if config.mechanism(0).name() == "key_driven"
                        && !self.how.fusing
                        && self.how.pool == PoolName::Mean =>
                {
                    return Ok(surgery::decouple_key_driven(&parent.model)?);
                }
                (None, None) => return Err(usage("--to decoupled_head needs --kv-budget SHARE or --kv-heads N")),
            },
        };
        match self.how.fusing {
            true => Ok(surgery::begin_fusion(&original, &grouping)?),
            false => Ok(surgery::decouple(&original, &grouping, pool)?),
        }
    }

    fn collapse(&self, fused: &Decoder) -> Result<Decoder, Failure> {
        if self.how.kv_heads.is_some()
            || self.how.kv_budget.is_some()
            || self.how.fusing
            || self.how.pool != PoolName::Mean
        {
            return Err(usage(
                "the model is being fused already: --to decoupled_head makes its groups single heads, without --kv-heads, \
                 --kv-budget, --fusing or --pool",
            ));
        }
        let (scatter, limit) = (surgery::mean_scatter(fused).unwrap_or_default(), self.how.scatter_limit);
        if scatter.is_nan() || scatter > limit {
            return Err(Failure::Run(format!(
                "the scatter ({scatter:.2e}) is above --scatter-limit ({limit:.2e}): single heads would not do what their groups \
                 do. Fuse for longer ([procedure.fusion], to the end of its steps), or raise the limit"
            )));
        }
        (self.caller.tell)(&format!("scatter: {scatter:.2e}"));
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
        let started_from = self.how.original.as_deref().or(recipe.and_then(|recipe| recipe.model.pretrained()));
        let Some(path) = started_from else {
            let problem =
                format!("{} does not say what it started from: name that model with --original", fused.path.display());
            return Err(usage(problem));
        };
        let original = open_trained(path, None, self.caller).map_err(|error| {
            Failure::Run(format!("the model that was being fused: {error}\n  hint: --original says where it is now"))
        })?;
        let original = surgery::unfused(&original.model)?;
        let config = fused.model.config();
        let cells: Vec<&DecoupledHeadConfig> =
            (0..config.n_layers).filter_map(|layer| config.mechanism(layer).get()).collect();
        let heads = cells[0].heads_to_fuse();
        if cells.iter().any(|layer| layer.heads_to_fuse() != heads) {
            return Err(usage("--search dynamic takes a model with as many key/value heads in every layer"));
        }
        let all = left.len() * heads;
        let budget = match (self.how.kv_heads, self.how.kv_budget) {
            (Some(kv_heads), _) => kv_heads * left.len(),
            (None, Some(share)) => surgery::heads_of_budget(share, left.len(), all)?,
            (None, None) => cells.iter().flat_map(|layer| layer.fused_heads()).sum(),
        };
        let told: Vec<String> = left.iter().map(|cell| format!("{cell:.2e}")).collect();
        (self.caller.tell)(&format!("left to fuse: {}", told.join(" ")));
        Ok((original, Grouping::Each(surgery::allocate_by_need(&left, heads, budget))))
    }
}
