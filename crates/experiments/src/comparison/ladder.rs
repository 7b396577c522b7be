//! `[ladder]`: sizes and compute budgets. Its rungs are settings of the comparison: arms of one size and budget are compared with
//! each other as everywhere.

use polyhead_models::ConfigError;
use polyhead_recipe::folder_name;
use polyhead_runs::costs::Totals;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Comparison, Setting};

/// Tokens for each parameter where nothing is said: about what is best for a budget (Hoffmann et al. 2022).
const TOKENS_PER_PARAMETER: f64 = 20.0;
/// A law through fewer points has no interval.
pub const FEWEST: usize = 3;
/// Operations of a training step for each of a forward pass: the backward pass takes two.
pub const PASSES: f64 = 3.0;

/// Sizes and budgets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ladder {
    /// The sizes that every arm is trained at, each with what it changes of the base recipe.
    pub size: Vec<Setting>,
    /// Tokens that each size is trained on, for each parameter of the base arm. Default: 20, where no flops are given.
    #[serde(default)]
    pub tokens_per_parameter: Option<f64>,
    /// Budgets of training operations (3 for each of a forward pass): every size is trained with each of them, on as many tokens as
    /// it buys the base arm. The law is then about the best size at each budget.
    #[serde(default)]
    pub flops: Vec<f64>,
    /// The part of the metric that no size gets below: a number that is known, or "fit". Default: 0.
    #[serde(default)]
    pub irreducible: Irreducible,
}

/// The part of a metric that no size gets below.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number, or \"fit\"")]
pub enum Irreducible {
    /// It is known.
    Known(f64),
    /// It is sought with the law.
    Sought(Fit),
}

/// The word for what is sought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// "fit".
    Fit,
}

impl Default for Irreducible {
    fn default() -> Self {
        Self::Known(0.0)
    }
}

/// A size with a budget.
#[derive(Debug, Clone, PartialEq)]
pub struct Rung {
    /// The number of its `[[ladder.size]]`.
    pub size: usize,
    /// The number of its budget, where there are some.
    pub budget: Option<usize>,
    /// What it is called.
    pub name: String,
}

impl Ladder {
    /// Every size with every budget.
    pub fn rungs(&self) -> Vec<Rung> {
        let of_size = |(size, setting): (usize, &Setting)| -> Vec<Rung> {
            let name = &setting.name;
            let at = |(budget, flops)| Rung { size, budget: Some(budget), name: format!("{name}, {flops:e} FLOPs") };
            match self.flops.is_empty() {
                true => vec![Rung { size, budget: None, name: name.clone() }],
                false => self.flops.iter().enumerate().map(at).collect(),
            }
        };
        self.size.iter().enumerate().flat_map(of_size).collect()
    }

    /// What is wrong with it.
    pub fn problems(&self) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, key: &str, message: String| {
            problems.extend((!holds).then(|| ConfigError::new(format!("ladder.{key}"), format!("ladder: {message}"))));
        };
        let (points, of) = if self.flops.is_empty() { (self.size.len(), "size") } else { (self.flops.len(), "flops") };
        rule(points >= FEWEST, of, format!("a law takes {FEWEST} points or more; {of} gives {points}"));
        for (at, size) in self.size.iter().enumerate() {
            let earlier = self.size[..at].iter().all(|other| folder_name(&other.name) != folder_name(&size.name));
            let named = !folder_name(&size.name).is_empty() && earlier;
            let message =
                format!("size `{}`: a name must hold a letter or a digit, and differ from the others", size.name);
            rule(named, &format!("size.{at}.name"), message);
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if let Some(tokens) = self.tokens_per_parameter {
            rule(positive(tokens), "tokens_per_parameter", format!("tokens_per_parameter ({tokens}) must be above 0"));
            let alone = self.flops.is_empty();
            rule(
                alone,
                "tokens_per_parameter",
                "tokens_per_parameter and flops both say how long to train: give one".into(),
            );
        }
        for (at, &flops) in self.flops.iter().enumerate() {
            let fresh = !self.flops[..at].contains(&flops);
            rule(
                positive(flops) && fresh,
                "flops",
                format!("flops ({flops:e}) must be above 0, and differ from the others"),
            );
        }
        if let Irreducible::Known(part) = self.irreducible {
            let message = format!("irreducible ({part}) must be 0 or more, or \"fit\"");
            rule(part.is_finite() && part >= 0.0, "irreducible", message);
        }
        problems
    }

    /// Steps of a rung, for a base arm with these costs.
    ///
    /// # Errors
    /// If the budget buys none.
    pub fn steps(&self, rung: &Rung, base: &Totals, tokens_per_step: u64) -> Result<u64, String> {
        let tokens = match rung.budget {
            Some(budget) => self.flops[budget] / (PASSES * base.flops_per_token.max(1) as f64),
            None => self.tokens_per_parameter.unwrap_or(TOKENS_PER_PARAMETER) * base.parameters as f64,
        };
        let steps = (tokens / tokens_per_step as f64).round();
        match steps >= 1.0 {
            true => Ok(steps as u64),
            false => Err(format!(
                "{} is {tokens:.0} tokens, less than a step of {tokens_per_step}: raise the budget, or lower training.batch_size",
                rung.name
            )),
        }
    }
}

/// The rungs as settings.
pub fn settings(comparison: &Comparison) -> Vec<Setting> {
    let Some(ladder) = &comparison.ladder else { return comparison.setting.clone() };
    let setting = |rung: Rung| Setting { name: rung.name, recipe: ladder.size[rung.size].recipe.clone() };
    ladder.rungs().into_iter().map(setting).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn budgets_become_steps() {
        let ladder: Ladder =
            toml::from_str("flops = [6e9, 1.2e10, 2.4e10]\n[[size]]\nname = \"small\"\n[[size]]\nname = \"large\"\n")
                .unwrap();
        assert!(ladder.problems().is_empty());
        let rungs = ladder.rungs();
        let names: Vec<&str> = rungs.iter().map(|rung| rung.name.as_str()).collect();
        assert_eq!(names[0], "small, 6e9 FLOPs");
        assert_eq!((names.len(), names[5]), (6, "large, 2.4e10 FLOPs"));
        let totals = Totals { parameters: 1000, flops_per_token: 2000, ..Totals::default() };
        assert_eq!(ladder.steps(&rungs[1], &totals, 100), Ok(20_000));
        let sizes = Ladder { flops: Vec::new(), tokens_per_parameter: None, ..ladder.clone() };
        assert_eq!(sizes.steps(&sizes.rungs()[0], &totals, 100), Ok(200));
        assert!(sizes.steps(&sizes.rungs()[0], &totals, 1 << 20).unwrap_err().contains("less than a step"));
        for (change, told) in [
            (Ladder { flops: vec![1.0, 2.0], ..ladder.clone() }, "a law takes 3 points or more; flops gives 2"),
            (Ladder { flops: vec![1.0, 1.0, 2.0], ..ladder.clone() }, "differ from the others"),
            (Ladder { flops: vec![1.0, -1.0, 2.0], ..ladder.clone() }, "must be above 0"),
            (Ladder { tokens_per_parameter: Some(20.0), ..ladder.clone() }, "give one"),
            (Ladder { tokens_per_parameter: Some(f64::NAN), ..sizes.clone() }, "must be above 0"),
            (sizes, "size gives 2"),
            (Ladder { irreducible: Irreducible::Known(-1.0), ..ladder.clone() }, "must be 0 or more"),
            (Ladder { size: vec![ladder.size[0].clone(), ladder.size[0].clone()], ..ladder }, "differ from the others"),
        ] {
            let problems: Vec<String> = change.problems().into_iter().map(|error| error.problem).collect();
            assert!(problems.iter().any(|problem| problem.contains(told)), "{told}: {problems:?}");
        }
    }
}
