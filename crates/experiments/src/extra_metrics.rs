//! Numbers beside those that every run has: what was logged last, what the comparison's tasks told, and how soon arms caught
//! up with the base arm.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::metric::Metric;
use super::outcome::{Outcome, RunOutcome, curve};
use super::statistics::Summary;

/// What lines of a log hold besides: numbers of training, and scores that the report has already.
const ELSEWHERE: [&str; 15] = [
    "step",
    "loss",
    "loss_bits",
    "bits_per_byte",
    "penalty",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "memory",
    "skipped",
    "validation_loss",
    "validation_loss_bits",
    "validation_bits_per_byte",
    "validation_accuracy",
    "validation_targets",
];

/// What mechanisms tell about themselves begins with this.
pub const MECHANISM: &str = "attention/";

/// A number with its values, by arm and seed; runs that have none are missing.
pub struct Further {
    /// What it is called: as logs name it, or `attention/NAME` for the mean over layers.
    pub metric: Metric,
    /// By arm.
    pub values: Vec<Vec<(u64, f64)>>,
}

/// Everything further that some run has.
pub fn further(outcome: &Outcome) -> Vec<Further> {
    let caught_up = Further {
        metric: Metric::logged(&outcome.in_units("tokens until the last loss of the base arm")),
        values: (0..outcome.arms.len()).map(|arm| catching_up(outcome, arm)).collect(),
    };
    let last: Vec<Vec<(u64, BTreeMap<String, f64>)>> = outcome
        .arms
        .iter()
        .map(|arm| {
            let finished = arm.runs.iter().filter(|run| run.end.is_ok());
            let all = |run: &RunOutcome| last_values(&run.history).into_iter().chain(run.evaluated.clone()).collect();
            finished.map(|run| (run.seed, all(run))).collect()
        })
        .collect();
    let names: BTreeSet<&String> = last.iter().flatten().flat_map(|(_, values)| values.keys()).collect();
    let logged = names.into_iter().map(|name| {
        let of_arm = |runs: &Vec<(u64, BTreeMap<String, f64>)>| {
            runs.iter().filter_map(|(seed, values)| Some((*seed, *values.get(name)?))).collect()
        };
        Further { metric: Metric::logged(name), values: last.iter().map(of_arm).collect() }
    });
    [caught_up].into_iter().chain(logged).collect()
}

/// The names of a log's further numbers; observations of mechanisms once for all layers, as `attention/NAME`.
pub fn names(history: &[Value]) -> BTreeSet<String> {
    let keys = history.iter().filter_map(Value::as_object).flat_map(|line| line.iter());
    let further = keys.filter(|(key, value)| value.is_number() && !ELSEWHERE.contains(&key.as_str()));
    further
        .map(|(key, _)| match of_layer(key) {
            Some(name) => format!("{MECHANISM}{name}"),
            None => key.clone(),
        })
        .collect()
}

/// What a line of a log says about a further number: the value, or the mean over layers.
pub fn value(line: &Value, name: &str) -> Option<f64> {
    let Some(observed) = name.strip_prefix(MECHANISM) else { return line[name].as_f64() };
    let values = line.as_object()?.iter().filter(|(key, _)| of_layer(key) == Some(observed));
    Some(Summary::of(&values.filter_map(|(_, value)| value.as_f64()).collect::<Vec<_>>())?.mean)
}

/// The name in `attention/layer_NN/NAME`.
fn of_layer(key: &str) -> Option<&str> {
    Some(key.strip_prefix(MECHANISM)?.strip_prefix("layer_")?.split_once('/')?.1)
}

fn last_values(history: &[Value]) -> BTreeMap<String, f64> {
    let last = |name: String| {
        let value = history.iter().rev().find_map(|line| value(line, &name))?;
        Some((name, value))
    };
    names(history).into_iter().filter_map(last).collect()
}

/// Tokens until a run's validation loss was that of the base arm's run of the same seed at its end. Runs that never came
/// there are missing.
fn catching_up(outcome: &Outcome, arm: usize) -> Vec<(u64, f64)> {
    let validations = |arm: usize, seed: u64| {
        let of = &outcome.arms[arm];
        let run = of.runs.iter().find(|run| run.seed == seed && run.end.is_ok())?;
        Some(curve(&run.history, of.tokens_per_step, |line| line["validation_loss"].as_f64()))
    };
    let of_seed = |&seed: &u64| {
        let goal = validations(outcome.comparison.base_of(arm), seed)?.last()?.value;
        let reached = validations(arm, seed)?.into_iter().find(|point| point.value <= goal)?;
        Some((seed, reached.tokens))
    };
    outcome.comparison.seeds.iter().filter_map(of_seed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn layers_are_averaged_and_scores_left_out() {
        let history = [
            json!({ "step": 5, "loss": 2.0, "facts/ees": 0.5, "bits_per_byte": null }),
            json!({ "step": 5, "attention/layer_00/entropy": 1.0, "attention/layer_01/entropy": 3.0 }),
            json!({ "step": 9, "facts/ees": 0.25 }),
        ];
        assert_eq!(names(&history).into_iter().collect::<Vec<_>>(), ["attention/entropy", "facts/ees"]);
        let expected = [("attention/entropy".to_owned(), 2.0), ("facts/ees".to_owned(), 0.25)];
        assert_eq!(last_values(&history), expected.into_iter().collect());
    }
}
